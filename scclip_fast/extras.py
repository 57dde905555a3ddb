"""What to say where a package is missing that one of our extras brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed; the message names the extra that brings it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports of optional packages in the `with` block raise MissingPackageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if message := advice(error, extra):
            raise MissingPackageError(message, name=error.name) from error
        raise


def advice(error: ModuleNotFoundError, extra: str) -> str | None:
    """What to do about it; None where the module that is missing is one of ours."""
    package = (error.name or __package__).partition(".")[0]
    if package == __package__:
        return None
    return f'needs the package {package}: pip install "scclip_fast[{extra}]"'

"""The error for a missing package that one of the extras of this package installs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed; the message names the extra that installs it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Makes imports of missing optional packages in the `with` block raise MissingPackageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if message := advice(error, extra):
            raise MissingPackageError(message, name=error.name) from error
        raise


def advice(error: ModuleNotFoundError, extra: str) -> str | None:
    """The command that installs the missing package, or None if this package lacks the module."""
    package = (error.name or __package__).partition(".")[0]
    if package == __package__:
        return None
    return f'needs the package {package}: pip install "scclip_fast[{extra}]"'

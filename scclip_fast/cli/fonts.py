"""The check of `scclip-fast segment --font`."""

from __future__ import annotations

from pathlib import Path

from ..plots import fonts
from .common import CommandError


def check(file: Path) -> None:
    """Raises CommandError unless Pillow and matplotlib can read the font file."""
    try:
        fonts.check(file)
    except ValueError as error:
        raise CommandError(f"--font {error}") from None

"""Fonts that have the characters of a name, in any script."""

from __future__ import annotations

import subprocess
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

_DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


class Face(NamedTuple):
    """A font file, and the index of one font in it."""

    path: str
    index: int = 0

    def sized(self, em: int) -> ImageFont.FreeTypeFont:
        """Returns the font with an em of that many pixels."""
        return ImageFont.truetype(self.path, em, self.index)


DEFAULT = Face(str(_DEJAVU))  # matplotlib brings it


def check(file: Path) -> None:
    """Raises ValueError unless Pillow and matplotlib can read the font file."""
    try:
        Face(str(file)).sized(16)
        _characters(Face(str(file)))
    except Exception as error:  # Pillow raises OSError, matplotlib RuntimeError
        raise ValueError(f"{file} is not a font that can be drawn: {error}") from None


def faces(names: Sequence[str], file: Path | None = None) -> list[Face | None]:
    """Returns the font of each name, or None where no font has all characters of the name.

    The first font that has them is taken: the font file, then matplotlib's DejaVu Sans, then a font
    of this machine, if fontconfig is installed.
    """
    candidates = [*([Face(str(file))] if file else []), DEFAULT]
    chosen = []
    for name in names:
        face = next((face for face in candidates if _has_characters(face, name)), None)
        if face is None and (face := _system_face(_visible(name))) is not None:
            candidates.append(face)
        chosen.append(face)
    return chosen


def _visible(name: str) -> str:
    """Returns the characters that need a glyph: all but spaces, controls and format characters."""
    return "".join(sorted({char for char in name if unicodedata.category(char)[0] not in "CZ"}))


def _has_characters(face: Face, name: str) -> bool:
    return _characters(face).issuperset(map(ord, _visible(name)))


@cache
def _characters(face: Face) -> frozenset[int]:
    return frozenset(FT2Font(face.path).get_charmap())


@cache
def _system_face(characters: str) -> Face | None:
    """Returns the font that fontconfig ranks first for these characters, if it has all of them."""
    charset = " ".join(f"{ord(char):x}" for char in characters)
    command = ["fc-match", "--format=%{file}\n%{index}", f"sans:charset={charset}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        path, index = done.stdout.splitlines()
        face = Face(path, int(index) & 0xFFFF)  # the upper bits number instances of variable fonts
        face.sized(16)  # raises for bitmap fonts, which have other sizes
        return face if _has_characters(face, characters) else None
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError):
        return None

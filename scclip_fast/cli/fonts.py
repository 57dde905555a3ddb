"""Fonts of legends: one that has the characters of a name, in any script."""

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

from .options import CommandError

_DEFAULT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


class Face(NamedTuple):
    """A font file, and which of the fonts in it."""

    path: str
    index: int = 0

    def sized(self, em: int) -> ImageFont.FreeTypeFont:
        """The font with an em of so many pixels."""
        return ImageFont.truetype(self.path, em, self.index)


DEFAULT = Face(str(_DEFAULT))  # comes with matplotlib


def check(file: Path) -> None:
    """CommandError unless a file holds a font that can be drawn."""
    try:
        Face(str(file)).sized(16)
        _characters(Face(str(file)))
    except Exception as error:  # OSError of Pillow, RuntimeError of matplotlib
        raise CommandError(f"--font {file} is not a font that can be drawn: {error}") from None


def faces(names: Sequence[str], file: Path | None = None) -> list[Face | None]:
    """The font of each name, None where no font has all of its characters.

    The first that fits of: the file, matplotlib's DejaVu Sans, and what fontconfig finds on this
    machine, where it is installed.
    """
    known = [*([Face(str(file))] if file else []), DEFAULT]
    found = []
    for name in names:
        face = next((face for face in known if _has(face, name)), None)
        if face is None and (face := _of_the_system(_drawn(name))) is not None:
            known.append(face)
        found.append(face)
    return found


def _drawn(name: str) -> str:
    """The characters that need a glyph: all but spaces, controls and marks without a shape."""
    return "".join(sorted({char for char in name if unicodedata.category(char)[0] not in "CZ"}))


def _has(face: Face, name: str) -> bool:
    return _characters(face).issuperset(map(ord, _drawn(name)))


@cache
def _characters(face: Face) -> frozenset[int]:
    return frozenset(FT2Font(face.path).get_charmap())


@cache
def _of_the_system(characters: str) -> Face | None:
    """The font that fontconfig holds for the best with all these characters."""
    charset = " ".join(f"{ord(char):x}" for char in characters)
    command = ["fc-match", "--format=%{file}\n%{index}", f"sans:charset={charset}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        path, index = done.stdout.splitlines()
        face = Face(path, int(index) & 0xFFFF)  # above stand instances of variable fonts
        face.sized(16)  # bitmap fonts have no such size
        # The best may still lack some.
        return face if _has(face, characters) else None
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError):
        return None

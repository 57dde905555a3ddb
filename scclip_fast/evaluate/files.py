"""The files of a data set: lists of names, folders of images, masks of class indices."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ..segment.image import suffixes

_LISTED = 5  # the most names in a message
_VALUES = "a mask is a PNG of 8 or 16 bits with the index of one class a pixel"


class DataError(ValueError):
    """A file of a data set cannot be used; the message names it, the reason and the remedy."""


class DatasetNotFoundError(FileNotFoundError):
    """Files of a data set are missing; the message names them and where to get them."""


class MissingFilesError(DatasetNotFoundError):
    """Some names have no image or no labels, which a data set may leave out."""


def read_list(path: Path) -> list[str]:
    """Reads the names in a text file, one a line.

    Blank lines and blanks around names do not count.

    Args:
        path: a file in UTF-8, or in UTF-16 with a byte order mark, with line ends of any system.

    Raises:
        DataError: the file cannot be read, has another encoding or no name, or repeats a name.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:  # UTF-16 or UTF-32 without a byte order mark
        raise DataError(f"{path}: null characters are no text; save the file as UTF-8")
    names = [name for line in text.splitlines() if (name := line.strip())]
    if not names:
        raise DataError(f"{path}: no names; the file must hold one a line")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: names on several lines ({listed(repeated)}); leave one line each")
    return names


def find_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Finds the files with a suffix in a folder and in those below it.

    Hidden files and folders do not count.

    Args:
        folder: the folder to search.
        suffix: the end of a file's name, in ASCII; capitals count as small letters.

    Returns:
        The files by name: their path from the folder, without the suffix.

    Raises:
        DataError: two files differ only in the case of their suffix.
    """
    paths: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if file.startswith(".") or not file.lower().endswith(suffix.lower()):
                continue
            path = Path(parent, file)
            name = path.relative_to(folder).as_posix()[: -len(suffix)]
            if name in paths:
                raise DataError(f"{path} and {paths[name].name} have one name; remove one of them")
            paths[name] = path
    return paths


def find_photos(folder: Path, others: Iterable[Path]) -> dict[str, Path]:
    """Finds the photos in a folder and in those below it, of all suffixes that are read.

    Hidden files and folders do not count.

    Args:
        folder: the folder to search.
        others: files that are no photos, such as the masks beside them.

    Returns:
        The files by name: their path from the folder, without the suffix.

    Raises:
        DataError: two files differ only in their suffix.
    """
    photos: dict[str, Path] = {}
    skipped = set(others)
    for suffix in sorted(suffixes()):
        for name, path in find_files(folder, suffix).items():
            if path in skipped:
                continue
            if name in photos:
                raise DataError(f"{path} and {photos[name].name} have one name; remove one of them")
            photos[name] = path
    return photos


def read_colors(path: Path) -> np.ndarray:
    """Reads the colours of classes, one a line: red, green and blue, each 0 to 255.

    What follows the three numbers, such as the name of the class, does not count.

    Returns:
        (lines, 3), uint8.

    Raises:
        DataError: as `read_list`, a line has no colour, or two lines have one.
    """
    colors = []
    for line in read_list(path):
        numbers = line.replace(",", " ").split()[:3]
        if len(numbers) < 3 or not all(n.isdecimal() and int(n) < 256 for n in numbers):
            raise DataError(f"{path}: {line!r} has no colour; a line begins with R G B, 0 to 255")
        colors.append(tuple(map(int, numbers)))
    if repeated := [color for color, count in Counter(colors).items() if count > 1]:
        lines = [" ".join(map(str, color)) for color in repeated]
        raise DataError(f"{path}: colours on several lines ({listed(lines)}); leave one line each")
    return np.array(colors, np.uint8)


def mask_values(mask: Image.Image) -> np.ndarray:
    """Returns the values of an opened mask, (H, W), of an integer dtype.

    Raises:
        ValueError: the mask has colours or fewer than 8 bits of grey, or its format does not keep
            values. Pillow scales 1, 2 and 4 bits of grey to 0..255, so that the class of a value is
            lost. The indices of a palette may have any number of bits.
    """
    if not isinstance(mask, PngImagePlugin.PngImageFile):
        raise ValueError(f"a mask in the format {mask.format}; {_VALUES}")
    bits = {"1": 1, "L;2": 2, "L;4": 4}.get(mask.tile[0][3])
    if bits:
        raise ValueError(f"a mask of {bits} bit{'s' * (bits > 1)} of grey; {_VALUES}")
    values = np.asarray(mask)
    if values.ndim != 2:
        raise ValueError(f"a mask of colours ({mask.mode}); {_VALUES}")
    return values


def listed(names: Sequence[str]) -> str:
    """Returns the first five names, and how many more there are, for a message."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")

"""Class names from a command line, a file or the page, as `Segmenter` takes them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import models
from .common import CommandError


def from_options(args: argparse.Namespace) -> list[str]:
    """The classes of --classes or --classes-file, by default those of --model scenes.

    Returns:
        A string a class, its synonyms after commas.

    Raises:
        CommandError: no classes, a file that cannot be read, or what `checked` refuses.
    """
    if args.classes is None and args.classes_file is None:
        if args.model != "scenes":
            raise CommandError('name what to look for: --classes "sky, tree, person|man|woman"')
        from ..scenes.draw import CLASSES

        return list(CLASSES)
    if args.classes is not None:
        option, entries = "--classes", split(args.classes)
    else:
        option = str(args.classes_file)
        entries = [line.rstrip(", \t").split(",") for line in _lines(args.classes_file)]
    if not models.is_sam3(args.model):
        return checked(entries, option)
    classes = checked(entries, option, most=255)  # the background is one more
    if "background" in map(first_name, classes):
        raise CommandError(f"{option} names the background, which a SAM3 has besides its classes")
    return classes


def split(text: str) -> list[list[str]]:
    """The names of each class in a list with commas or lines between classes, "|" in synonyms.

    Nothing between two commas, or after the last, is no class.
    """
    return [entry.split("|") for entry in re.split(r"[,\n]", text) if entry.strip()]


def checked(entries: list[list[str]], source: str, most: int = 256) -> list[str]:
    """A string a class, its synonyms after commas.

    Args:
        entries: the names of each class.
        source: the option or file that they come from, for errors.
        most: the number of classes allowed, by default that of a palette's colours.

    Raises:
        CommandError: no class, an empty or repeated name, or more than `most` classes.
    """
    entries = [[name.strip() for name in entry] for entry in entries]
    if not entries:
        raise CommandError(f"{source} names no class")
    if not all(all(entry) for entry in entries):
        raise CommandError(f"{source} has an empty name")
    names = [entry[0] for entry in entries]
    if len(names) > most:
        raise CommandError(f"{source} has {len(names)} classes; a palette PNG holds at most {most}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{source} names {', '.join(repeated)} more than once")
    return [", ".join(entry) for entry in entries]


def first_name(entry: str) -> str:
    """The name of a class without its synonyms."""
    return entry.partition(",")[0]


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    return [line for line in lines if line.strip(", \t")]

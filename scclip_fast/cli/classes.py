"""Class names from the command line, a file or the page, in the form that segmenters take."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from . import models
from .options import CommandError

MAX_CLASSES = 2**16  # a label PNG has 16 bits


def from_options(args: argparse.Namespace) -> list[str]:
    """Returns the classes of --classes or --classes-file; the default is those of --model scenes.

    Returns:
        A string a class, its synonyms after commas.

    Raises:
        CommandError: there are no classes, a file cannot be read, or `checked` raises it.
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
    from ..segment.sam3 import MAX_CLASSES as MOST_OF_SAM3

    classes = checked(entries, option, MOST_OF_SAM3)
    if "background" in map(first_name, classes):
        raise CommandError(f"{option} names the background, which a SAM3 has besides its classes")
    return classes


def split(text: str) -> list[list[str]]:
    """Splits a list into the names of each class.

    Commas or line breaks separate the classes, "|" the synonyms of a class. A blank entry, as after
    the last comma, is no class.
    """
    return [entry.split("|") for entry in re.split(r"[,\n]", text) if entry.strip()]


def checked(entries: list[list[str]], source: str, most: int = MAX_CLASSES) -> list[str]:
    """Returns a string a class, its synonyms after commas.

    Args:
        entries: the names of each class.
        source: the option or file that the names come from, for errors.
        most: the number of classes allowed.

    Raises:
        CommandError: there is no class, a name is empty, a first name is repeated, or there are
            more than `most` classes.
    """
    entries = [[name.strip() for name in entry] for entry in entries]
    if not entries:
        raise CommandError(f"{source} names no class")
    if not all(all(entry) for entry in entries):
        raise CommandError(f"{source} has an empty name")
    names = [entry[0] for entry in entries]
    if len(names) > most:
        raise CommandError(f"{source} has {len(names)} classes; at most {most} are taken")
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise CommandError(f"{source} names {', '.join(repeated)} more than once")
    return [", ".join(entry) for entry in entries]


def first_name(entry: str) -> str:
    """Returns the name of a class without its synonyms."""
    return entry.partition(",")[0]


def _lines(path: Path) -> list[str]:
    """Returns the lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    return [line for line in lines if line.strip(", \t")]

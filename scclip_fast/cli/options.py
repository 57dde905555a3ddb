"""The parser of a sub-command, the types of its options, and the errors that end it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

_MAX_INTEGER = 2**31 - 1  # C libraries take these numbers as an int


class CommandError(Exception):
    """The request cannot be carried out; the message is one line with the reason."""


def one_line(message: str) -> str:
    """Returns a message without line breaks, which the user's arguments may bring into it."""
    return " ".join(message.splitlines())


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, except None and that of a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], None],
    *,
    usage: str,
    extra: str,
    smaller: str,
) -> argparse.ArgumentParser:
    """Adds the parser of a sub-command and returns it.

    Args:
        commands: the sub-parsers of the main parser.
        name: the name of the sub-command.
        summary: one line for both helps, without a capital and a full stop.
        run: carries the sub-command out; raises CommandError.
        usage: the text after "usage: ".
        extra: the package's extra that brings the packages that `run` imports.
        smaller: advice for the case that memory runs out.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=usage,
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run, prog=parser.prog, extra=extra, smaller=smaller)
    return parser


def out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that memory has run out."""
    # torch's allocator on the CPU raises a plain RuntimeError.
    expected = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, expected) or "DefaultCPUAllocator" in str(error)


def add_windows(parser: argparse.ArgumentParser, **keywords) -> None:
    """Adds --slide-crop, --slide-stride and --stitch; see `check_windows`.

    Args:
        parser: the parser of a sub-command.
        keywords: further arguments of `add_argument`.
    """
    add = parser.add_argument
    add(
        "--slide-crop",
        metavar="PIXELS",
        type=natural,
        default=224,
        help="side of the sliding windows; 0 segments the whole image at once",
        **keywords,
    )
    add(
        "--slide-stride",
        metavar="PIXELS",
        type=positive,
        default=112,
        help="distance between neighbouring windows",
        **keywords,
    )
    add(
        "--stitch",
        nargs=0,
        const=True,
        default=False,
        help="join the windows of an image before the last block, which then attends to all of it",
        **keywords,
    )


def check_windows(args: argparse.Namespace) -> None:
    """Raises CommandError if there would be gaps between the windows."""
    if args.slide_crop and args.slide_stride > args.slide_crop:
        raise CommandError(
            f"--slide-stride must be at most --slide-crop {args.slide_crop}, "
            f"got {args.slide_stride}"
        )


def file_path(text: str) -> Path:
    """Parses the path of a file."""
    path = Path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"must name a file, got {text!r}")
    return path


def positive(text: str) -> int:
    """Parses a whole number, at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """Parses a whole number, at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    # Python itself refuses to convert more than 4300 digits.
    if not (text.isdecimal() and len(text) <= 4000 and int(text) >= least):
        allowed = " above 0" if least else ", 0 or more"
        raise argparse.ArgumentTypeError(f"must be a whole number{allowed}, got {text!r}")
    if int(text) > _MAX_INTEGER:
        raise argparse.ArgumentTypeError(f"must be at most {_MAX_INTEGER}, got {text}")
    return int(text)


def share(text: str) -> float:
    """Parses a number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text!r}")
    return value


def positive_share(text: str) -> float:
    """Parses a number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def scale(text: str) -> float:
    """Parses a number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")

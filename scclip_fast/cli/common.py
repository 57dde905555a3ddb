"""What the sub-commands share: errors, types of arguments, checks of files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:  # of the extras
    from PIL.Image import Image


_MOST = 2**31 - 1  # what C libraries take for an int


class CommandError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


def one_line(message: str) -> str:
    """A message without the line breaks of the arguments in it."""
    return " ".join(message.splitlines())


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults that say something."""

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
    """A sub-command's parser.

    Args:
        commands: of the main parser.
        name: of the sub-command.
        summary: one line for both helps, without a capital and a full stop.
        run: what it does; raises CommandError.
        usage: what follows "usage: ".
        extra: the package's extra that brings what it needs.
        smaller: what to try when memory runs out.
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


def read_photo(path: Path, max_pixels: int | None = None) -> Image:
    """The picture of a file by `picture.read`, or CommandError."""
    from .. import picture

    try:
        return picture.read(path, max_pixels)
    except picture.PictureError as error:
        raise CommandError(f"cannot read the photo {error}") from None


def check_output(option: str, path: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """Makes the folder of an output file, before the work and not after it.

    Args:
        option: the option that names the file, for errors.
        path: the file.
        suffixes: the endings that stand for a format; no ending stands for the first.
        force: whether a file that is there may be replaced.

    Raises:
        CommandError: the file cannot be written, is there already, or has another ending.
    """
    if path.suffix and path.suffix.lower() not in suffixes:
        allowed = ", ".join(suffixes)
        raise CommandError(f"{option} must end in {allowed}, got {path.name}")
    if os.path.isdir(path):
        raise CommandError(f"cannot write {path}: it is a directory")
    if os.path.exists(path) and not force:
        raise CommandError(f"{path} is there; --force replaces it, another {option} keeps both")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")


def check_windows(args: argparse.Namespace) -> None:
    """CommandError unless windows of --slide-crop, --slide-stride apart, leave nothing out."""
    if args.slide_crop and args.slide_stride > args.slide_crop:
        raise CommandError(
            f"--slide-stride must be at most --slide-crop {args.slide_crop}, "
            f"got {args.slide_stride}"
        )


def out_of_memory(error: Exception) -> bool:
    """Whether it is one of the errors for that."""
    # torch's allocator on the CPU raises a plain RuntimeError.
    expected = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, expected) or "DefaultCPUAllocator" in str(error)


def file_path(text: str) -> Path:
    """An argument's type: the path of a file."""
    path = Path(text)
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"must name a file, got {text!r}")
    return path


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An argument's type: a whole number from 0 on."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not (text.isdecimal() and len(text) <= 4000 and int(text) >= least):
        allowed = " above 0" if least else ", 0 or more"
        raise argparse.ArgumentTypeError(f"must be a whole number{allowed}, got {text!r}")
    if int(text) > _MOST:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST}, got {text}")
    return int(text)

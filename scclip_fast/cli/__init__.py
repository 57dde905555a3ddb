"""The command `scclip-fast`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..clip import NotFiniteError
from ..extras import advice
from . import app, eval, lof, segment
from .options import CommandError, Parser, one_line, out_of_memory

# Each has add(commands) and run(args). What is slow to import is imported in `run`.
_COMMANDS = (segment, eval, lof, app)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
        The exit code: 0; 2 after one line on stderr with the reason; 1 if the reader of stdout has
        gone, as with `| head -1`; 130 after Ctrl+C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(_parser().parse_args(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush the rest to the closed pipe at exit and report the failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    """Runs a parsed command; the errors that a user can mend become one line each."""
    try:
        args.run(args)
    except (CommandError, NotFiniteError) as error:
        return _fail(args, str(error))
    except ModuleNotFoundError as error:
        if message := advice(error, args.extra):
            return _fail(args, message)
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(args, f"out of memory; try {args.smaller}")
    return 0


def _fail(args: argparse.Namespace, message: str) -> int:
    print(f"{args.prog}: error: {one_line(message)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="scclip-fast", description="Training-free dense vision with CLIP.")
    parser.add_argument("--version", action="version", version=f"scclip_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in _COMMANDS:
        command.add(commands)
    return parser

"""The command `scclip-fast`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..extras import advice
from . import app, eval, lof, segment
from .common import CommandError, out_of_memory

# Each: add(commands), run(args); what is heavy they import in run.
_COMMANDS = (segment, eval, lof, app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit code: 0, or 2 after one line on stderr that says why."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
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
    print(f"{args.prog}: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage: one line


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="scclip-fast", description="Training-free dense vision with CLIP.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for command in _COMMANDS:
        command.add(commands)
    return parser

"""`scclip-fast app`: a local web page that segments a photo and shows what each stage changes."""

from __future__ import annotations

import argparse

from . import models, options
from .options import CommandError


def add(commands: argparse._SubParsersAction) -> None:
    """The parser of `scclip-fast app`."""
    parser = options.add_command(
        commands,
        "app",
        "open a local web page: drop a photo, type classes, see what each stage changes",
        run,
        usage="%(prog)s [options]",
        extra="app",
        smaller="a smaller --model",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets the network in")
    add("--port", type=options.positive, default=7860, help="to listen at")
    add(
        "--max-upload",
        metavar="MB",
        type=options.positive,
        default=20,
        help="largest photo, in megabytes",
    )
    add(
        "--short-side",
        metavar="PIXELS",
        type=options.positive,
        default=224,
        help="of a photo, as the model sees it",
    )
    models.add_model(parser, default="scenes")


def run(args: argparse.Namespace) -> None:
    """Load the model and serve the page until Ctrl+C."""
    if args.port > 65535:
        raise CommandError(f"--port must be at most 65535, got {args.port}")
    if ":" in args.host:
        raise CommandError(f"--host must be a name or an IPv4 address, got {args.host}")
    from . import app_page

    encoder, tokenizer = models.load_encoder(args)
    from .app_result import Explorer

    app_page.serve(Explorer(encoder, tokenizer, args.short_side), args)

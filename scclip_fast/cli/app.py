"""`scclip-fast app`: a local web page that segments a photo and shows what each stage changes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from . import models, options
from .options import CommandError

if TYPE_CHECKING:  # of the extra app
    from ..app.explore import Explorer


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser of `scclip-fast app`."""
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
    host = "address that the page listens at; 0.0.0.0 lets the network in"
    add("--host", default="127.0.0.1", help=host)
    port = "port that the page listens at"
    add("--port", type=options.positive, default=7860, help=port)
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
        help="shorter side of a photo, as the model input",
    )
    models.add_model(parser, default="scenes")


def run(args: argparse.Namespace) -> None:
    """Loads the model and serves the page until Ctrl+C."""
    if args.port > 65535:
        raise CommandError(f"--port must be at most 65535, got {args.port}")
    if ":" in args.host:
        raise CommandError(f"--host must be a name or an IPv4 address, got {args.host}")
    from ..app import page  # before the model, as the extra may be missing

    encoder, tokenizer = models.load_encoder(args)
    _serve(page.Explorer(encoder, tokenizer, args.short_side), args)


def _serve(explorer: Explorer, args: argparse.Namespace) -> None:
    """Serves the page until Ctrl+C. Its photos lie in a temporary folder, deleted at the end.

    Raises:
        CommandError: the page cannot listen at --host and --port.
    """
    from ..app import page

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # without it the folder would stay
    for name in ("NO_PROXY", "no_proxy"):  # Gradio requests its own page when it starts
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", args.host]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page.build(explorer, args.model, Path(folder))
        try:
            blocks.launch(
                server_name=args.host,
                server_port=args.port,
                max_file_size=args.max_upload * 2**20,
                share=False,
                inbrowser=False,
                run_history=False,
                footer_links=[],
                prevent_thread_lock=True,
                quiet=True,
                theme=page.THEME,
                css=page.STYLE,
            )
        except OSError:  # its message names settings of Gradio
            raise CommandError(
                f"cannot listen at {args.host}:{args.port}: in use by another, or no address of "
                "this machine; choose another --port or --host"
            ) from None
        print(f"{blocks.local_url}  (Ctrl+C ends it)", flush=True)
        blocks.block_thread()

"""What the sub-commands share: errors, types of arguments, options of the model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # these are in extras
    from PIL.Image import Image

    from ..clip import SCCLIP

METHODS = ("scclip", "clip", "maskclip", "sclip", "clearclip")  # those of scclip_fast.clip
SWITCHES = {  # of SCCLIPConfig, and what is left without
    "repair": "the outlier tokens as they are",
    "pre_aggregate": "no aggregation before the last block",
    "content_attention": "the last block with its self-attention alone",
    "post_aggregate": "no aggregation after the last block",
    "multi_level": "no auxiliary branch",
}


class CommandError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class OnlyFor(argparse.Action):
    """Stores an option of one kind of model, CLIP or SAM3, and that it was given."""

    def __init__(self, *args, kind: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.only_for = {**namespace.only_for, self.option_strings[0]: self.kind}


CLIP, SAM3 = (dict(action=OnlyFor, kind=kind) for kind in ("CLIP", "SAM3"))


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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --pretrained, --method, --no-STAGE, --precision, --device, for `load_encoder`."""
    add_model(
        parser,
        default="ViT-B-16-quickgelu",
        note="; segment also takes facebook/sam3, which it calibrates, or the folder of a download",
    )
    add = parser.add_argument
    what = "what becomes of the patch features"
    add("--method", choices=METHODS, default="scclip", help=what, **CLIP)
    switched_off = dict(nargs=0, default=True, const=False, **CLIP)
    for switch, meaning in SWITCHES.items():
        add(_option(switch), dest=switch, help=f"of scclip: {meaning}", **switched_off)


def add_model(parser: argparse.ArgumentParser, default: str, note: str = "") -> None:
    """--model, --pretrained, --precision, --device, for `load_encoder`."""
    parser.set_defaults(only_for={})
    add = parser.add_argument
    scenes = "scenes: the small one that comes with this package, for drawn scenes only"
    add(
        "--model",
        default=default,
        help=f"open_clip's name of a vision transformer, or {scenes}{note}",
    )
    add(
        "--pretrained",
        metavar="TAG",
        default="openai",
        help="open_clip's name of the weights; scenes, hf-hub:... and local-dir:... bring theirs",
        **CLIP,
    )
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the model")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, for `device`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda or cuda:INDEX")


def load_encoder(args: argparse.Namespace) -> tuple[SCCLIP, Callable]:
    """The model of `add_model_options`, with weights, and its tokenizer.

    Raises:
        CommandError: there is no such model or device, or its weights are out of reach.
    """
    target = device(args.device)
    off = [switch for switch in SWITCHES if not getattr(args, switch)]
    if off and args.method != "scclip":
        raise CommandError(f"{_option(off[0])} is for --method scclip, got {args.method}")
    from ..clip import create_model

    has_weights = brings_weights(args.model)
    if not has_weights and not args.pretrained:
        raise CommandError("--pretrained must name weights; random ones see nothing")
    options = {"method": args.method, "precision": args.precision, "device": target}
    try:
        encoder, tokenizer = create_model(
            args.model, None if has_weights else args.pretrained, **options
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        if has_weights:
            raise CommandError(str(error)) from None
        offline = "without a network there is --model scenes, for drawn scenes only"
        raise CommandError(f"{error}; {offline}") from None
    encoder.config = replace(encoder.config, **dict.fromkeys(off, False))
    return encoder, tokenizer


def _option(switch: str) -> str:
    return f"--no-{switch.replace('_', '-')}"


def check_kind(args: argparse.Namespace) -> None:
    """CommandError where an option is given, be it its default, that --model does not look at."""
    own = "SAM3" if is_sam3(args.model) else "CLIP"
    for option, kind in args.only_for.items():
        if kind != own:
            raise CommandError(f"{option} is for {kind}, not for {args.model}")


def brings_weights(model: str) -> bool:
    """Whether a --model comes with weights, so that --pretrained has no say."""
    return model == "scenes" or ":" in model or is_sam3(model)


def is_sam3(model: str) -> bool:
    """Whether a --model is transformers': OWNER/NAME on the hub, or a folder."""
    return ("/" in model and ":" not in model) or os.path.isdir(model)


def device(name: str) -> torch.device:
    """The device --device names, or CommandError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise CommandError(f"--device {name} is not there: torch finds {found} CUDA device(s)")
    return device


def read_photo(path: Path, max_pixels: int | None = None) -> Image:
    """The picture of a file by `picture.read`, or CommandError."""
    from .. import picture

    try:
        return picture.read(path, max_pixels)
    except picture.PictureError as error:
        raise CommandError(f"cannot read the photo {error}") from None


def check_writable(path: Path) -> None:
    """CommandError unless a file can be written there: before the work, not after it."""
    if os.path.isdir(path):
        raise CommandError(f"cannot write {path}: it is a directory")
    if not os.path.isdir(path.parent):
        raise CommandError(f"cannot write {path}: there is no directory {path.parent}")
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


def positive(text: str) -> int:
    """An argument's type: 1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """An argument's type: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)

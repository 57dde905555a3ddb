"""The options of a model, and the one loader of all sub-commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..clip.sources import HubError, Source, find_source
from .common import CommandError, out_of_memory

if TYPE_CHECKING:  # of the extras
    from ..clip import SCCLIP

METHODS = ("scclip", "clip", "maskclip", "sclip", "clearclip")  # those of scclip_fast.clip
SWITCHES = {  # of SCCLIPConfig, and what is left without
    "repair": "the outlier tokens as they are",
    "pre_aggregate": "no aggregation before the last block",
    "content_attention": "the last block with its self-attention alone",
    "post_aggregate": "no aggregation after the last block",
    "multi_level": "no auxiliary branch",
}
RANDOM = "random"  # the --pretrained of untrained weights
SEED = 0  # of untrained weights
OFFLINE = "--model also takes the folder of a download, or scenes, for drawn scenes only"


class OnlyFor(argparse.Action):
    """Stores an option of one kind of model, CLIP or SAM3, and that it was given."""

    def __init__(self, *args, kind: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.only_for = {**namespace.only_for, self.option_strings[0]: self.kind}


CLIP, SAM3 = (dict(action=OnlyFor, kind=kind) for kind in ("CLIP", "SAM3"))


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds --method and --no-STAGE, after `add_model`."""
    add = parser.add_argument
    meaning = "how the last block's features are made dense"
    add("--method", choices=METHODS, default="scclip", help=meaning, **CLIP)
    switched_off = dict(nargs=0, default=True, const=False, **CLIP)
    for switch, meaning in SWITCHES.items():
        add(_option(switch), dest=switch, help=f"of scclip: {meaning}", **switched_off)


def add_model(
    parser: argparse.ArgumentParser, default: str = "ViT-B-16-quickgelu", *, random: bool = False
) -> None:
    """Adds --model, --pretrained, --precision and --device, for `load_encoder`.

    Args:
        parser: of a sub-command.
        default: the default of --model.
        random: whether untrained weights are of use to the sub-command.
    """
    parser.set_defaults(
        only_for={}, takes_random=random, method="scclip", **dict.fromkeys(SWITCHES, True)
    )
    add = parser.add_argument
    add(
        "--model",
        default=default,
        help="open_clip's or OpenAI's name of a vision transformer; transformers' CLIP by its name "
        "on the hub; a folder with a download of either; scenes, the small model that comes with "
        "this package, for drawn scenes only; for segment alone facebook/sam3, or its folder",
    )
    add(
        "--pretrained",
        metavar="TAG",
        default="openai",
        help="open_clip's name of the weights, which other models bring; for lof alone random, for "
        "untrained weights",
        **CLIP,
    )
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda or cuda:INDEX")


def load_encoder(args: argparse.Namespace) -> tuple[SCCLIP, Callable]:
    """Loads the CLIP of `add_model` with its tokenizer, set as `add_method` chooses.

    Raises:
        CommandError: there is no such CLIP or device, or the weights are out of reach.
    """
    target = device(args.device)
    off = [switch for switch in SWITCHES if not getattr(args, switch)]
    if off and args.method != "scclip":
        raise CommandError(f"{_option(off[0])} is for --method scclip, got {args.method}")
    found = source(args.model)
    if found.kind == "sam3":
        raise CommandError(f"{args.model} is a SAM3, which `scclip-fast segment` alone takes")
    if found.kind == "transformers":
        args.extra = f"{args.extra},sam3"
    encoder, tokenizer = _create(args, found, target)
    encoder.config = replace(encoder.config, **dict.fromkeys(off, False))
    return encoder, tokenizer


def _create(
    args: argparse.Namespace, found: Source, device: torch.device
) -> tuple[SCCLIP, Callable]:
    from ..clip import create_model

    options = {"method": args.method, "precision": args.precision, "device": device}
    try:
        tag = None if found.brings_weights else _tag(args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return create_model(args.model, tag, **options)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        offline = f"; {OFFLINE}" if isinstance(error, HubError) else ""
        raise CommandError(f"{error}{offline}") from None


def _tag(args: argparse.Namespace) -> str | None:
    """--pretrained as `create_model` takes it: None for untrained weights."""
    if args.pretrained != RANDOM:
        if not args.pretrained:
            raise CommandError("--pretrained must name weights, got an empty name")
        return args.pretrained
    if not args.takes_random:
        raise CommandError("--pretrained random is for `scclip-fast lof`: it knows no classes")
    return None


def _option(switch: str) -> str:
    return f"--no-{switch.replace('_', '-')}"


def check_kind(args: argparse.Namespace) -> None:
    """Raises CommandError where an option is given, be it its default, that --model ignores."""
    own = "SAM3" if is_sam3(args.model) else "CLIP"
    for option, kind in args.only_for.items():
        if kind != own:
            raise CommandError(f"{option} is for {kind}, not for {args.model}")


def source(model: str) -> Source:
    """The kind of a --model and its name there, or CommandError."""
    try:
        return find_source(model)
    except ValueError as error:
        raise CommandError(f"--model: {error}") from None
    except HubError as error:
        raise CommandError(f"{error}; {OFFLINE}") from None


def brings_weights(model: str) -> bool:
    """Whether a --model comes with weights, so that --pretrained is not read."""
    return source(model).brings_weights


def is_sam3(model: str) -> bool:
    """Whether a --model is a SAM3."""
    return source(model).kind == "sam3"


def device(name: str) -> torch.device:
    """The device of --device, or CommandError."""
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):  # ValueError: of characters that are no text
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise CommandError(f"--device {name} is not there: torch finds {found} CUDA device(s)")
    return device

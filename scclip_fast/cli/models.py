"""The options that choose a model, and the loader that all sub-commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..clip.sources import HubError, Source, find_source, first_line, load_transformers
from . import options
from .options import CommandError, out_of_memory

if TYPE_CHECKING:  # of the extras
    from transformers import Sam3Model, Sam3Processor

    from ..clip import SCCLIP

PROXY_METHODS = ("proxyclip", "lposs")  # those that need --proxy
METHODS = (  # those of scclip_fast.clip
    *("scclip", "clip", "maskclip", "sclip", "clearclip", "naclip", "resclip"),
    *PROXY_METHODS,
)
SWITCHES = {  # stages in SCCLIPConfig, and the effect of switching each off
    "repair": "keep the outlier tokens as they are",
    "pre_aggregate": "do not aggregate before the last block",
    "content_attention": "leave the last block its self-attention alone",
    "post_aggregate": "do not aggregate after the last block",
    "multi_level": "leave out the auxiliary branch",
}
RANDOM = "random"  # the --pretrained of untrained weights
SEED = 0  # of untrained weights
OFFLINE = "--model also takes the folder of a download, or scenes, for drawn scenes only"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class OnlyFor(argparse.Action):
    """An option of one kind of model, CLIP or SAM3.

    The action stores the value, and in `only_for` that the option was given, for `check_kind`.
    """

    def __init__(self, *args, kind: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.only_for = {**namespace.only_for, self.option_strings[0]: self.kind}


CLIP, SAM3 = (dict(action=OnlyFor, kind=kind) for kind in ("CLIP", "SAM3"))


def add_model(
    parser: argparse.ArgumentParser, default: str = "ViT-B-16-quickgelu", *, random: bool = False
) -> None:
    """Adds --model, --pretrained, --precision and --device, which every sub-command takes.

    Args:
        parser: the parser of a sub-command.
        default: the default of --model.
        random: whether the sub-command takes untrained weights.
    """
    parser.set_defaults(
        only_for={},
        takes_random=random,
        method="scclip",
        proxy=None,
        **dict.fromkeys(SWITCHES, True),
    )
    add = parser.add_argument
    add(
        "--model",
        default=default,
        help="open_clip's or OpenAI's name of a vision transformer; transformers' CLIP by its name "
        "on the hub; a folder with a download of either; scenes, the small model that comes with "
        "this package, for drawn scenes only; for segment and eval facebook/sam3, or its folder",
    )
    add(
        "--pretrained",
        metavar="TAG",
        default="openai",
        help="open_clip's name of the weights, for a model that comes without; for lof alone "
        "random, for untrained weights",
        **CLIP,
    )
    add("--precision", choices=tuple(_DTYPES), default="fp32", help="number format of the model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda or cuda:INDEX")


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds --method and --no-STAGE, after `add_model`."""
    add = parser.add_argument
    meaning = "how the features of the last block are made dense"
    add("--method", choices=METHODS, default="scclip", help=meaning, **CLIP)
    add(
        "--proxy",
        metavar="NAME",
        help="the second model that --method "
        + " and ".join(PROXY_METHODS)
        + " need: dino, dinov2 "
        "or dinov3; a vision transformer of transformers by its name on the hub, or its folder; "
        "timm:NAME for one of timm",
        **CLIP,
    )
    switched_off = dict(nargs=0, default=True, const=False, **CLIP)
    for stage, effect in SWITCHES.items():
        add(switch(stage), dest=stage, help=f"with --method scclip: {effect}", **switched_off)


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Adds --batch; see `batch`."""
    parser.add_argument(
        "--batch",
        metavar="N",
        type=options.positive,
        help="the number of images whose windows are encoded together; by default 1 on a CPU and 8 "
        "on a GPU",
        **CLIP,
    )


def batch(args: argparse.Namespace) -> int:
    """Returns the number of images that are segmented together."""
    if is_sam3(args.model):
        return 1
    return args.batch or (1 if args.device == "cpu" else 8)


def switch(stage: str) -> str:
    """Returns the option that switches a stage off."""
    return f"--no-{stage.replace('_', '-')}"


def check_kind(args: argparse.Namespace) -> None:
    """Raises CommandError for an option that --model ignores, even if its value is the default."""
    model_kind = "SAM3" if is_sam3(args.model) else "CLIP"
    for option, kind in args.only_for.items():
        if kind != model_kind:
            raise CommandError(f"{option} is for {kind}, not for {args.model}")


def load_encoder(args: argparse.Namespace) -> tuple[SCCLIP, Callable]:
    """Loads the CLIP of `add_model` with its tokenizer, set as `add_method` chooses.

    Raises:
        CommandError: there is no such CLIP or device, or the weights are out of reach.
    """
    target = device(args.device)
    off = [stage for stage in SWITCHES if not getattr(args, stage)]
    if off and args.method != "scclip":
        raise CommandError(f"{switch(off[0])} is for --method scclip, got {args.method}")
    if (args.method in PROXY_METHODS) is not (args.proxy is not None):
        need = "needs" if args.proxy is None else "has no use for"
        raise CommandError(f"--method {args.method} {need} --proxy")
    model_source = source(args.model)
    if model_source.kind == "sam3":
        raise CommandError(f"{args.model} is a SAM3, which `scclip-fast segment` and `eval` take")
    if model_source.kind == "transformers":
        args.extra = f"{args.extra},sam3"
    encoder, tokenizer = _create(args, model_source, target)
    encoder.config = replace(encoder.config, **dict.fromkeys(off, False))
    return encoder, tokenizer


def _create(
    args: argparse.Namespace, model_source: Source, device: torch.device
) -> tuple[SCCLIP, Callable]:
    from ..clip import create_model

    options = dict(method=args.method, proxy=args.proxy, precision=args.precision, device=device)
    try:
        tag = None if model_source.brings_weights else _tag(args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return create_model(args.model, tag, **options)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except HubError as error:
        raise CommandError(f"{error}; {OFFLINE}") from None
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise CommandError(str(error)) from None


def _tag(args: argparse.Namespace) -> str | None:
    """Returns --pretrained in the form of `create_model`: None for untrained weights."""
    if args.pretrained != RANDOM:
        if not args.pretrained:
            raise CommandError("--pretrained must name weights, got an empty name")
        return args.pretrained
    if not args.takes_random:
        raise CommandError(
            "--pretrained random is for `scclip-fast lof`: untrained weights do not tell classes "
            "apart"
        )
    return None


def load_sam3(args: argparse.Namespace) -> tuple[Sam3Model, Sam3Processor]:
    """Loads the SAM3 of `add_model`, not calibrated, with its processor.

    Raises:
        CommandError: there is no such device, or the weights are damaged or out of reach.
    """
    target = device(args.device)
    from transformers import Sam3Model, Sam3Processor

    try:
        model, processor = load_transformers(
            Sam3Model, Sam3Processor, args.model, _DTYPES[args.precision]
        )
    except torch.OutOfMemoryError:
        raise
    except HubError as error:
        raise CommandError(f"{error}; {OFFLINE}") from None
    except Exception as error:  # from transformers, safetensors or the file system
        raise CommandError(f"cannot load {args.model}: {first_line(error)}") from None
    return model.to(target).eval(), processor


def source(model: str) -> Source:
    """Returns the kind of a --model and its name there, or raises CommandError."""
    try:
        return find_source(model)
    except ValueError as error:
        raise CommandError(f"--model: {error}") from None
    except HubError as error:
        raise CommandError(f"{error}; {OFFLINE}") from None


def brings_weights(model: str) -> bool:
    """Whether a --model comes with weights, so that --pretrained has no effect."""
    return source(model).brings_weights


def is_sam3(model: str) -> bool:
    """Whether a --model is a SAM3."""
    return source(model).kind == "sam3"


def local_device(args: argparse.Namespace) -> torch.device:
    """Returns the device of this process, or raises CommandError; of torchrun's, each has a GPU."""
    if "LOCAL_RANK" in os.environ and args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return device(args.device)


def device(name: str) -> torch.device:
    """Returns the device of --device, or raises CommandError."""
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):  # ValueError: the name holds bytes that are no text
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise CommandError(f"--device {name} is not there: torch finds {count} CUDA device(s)")
    return device

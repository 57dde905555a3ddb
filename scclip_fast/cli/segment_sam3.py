"""The options of `segment` and `eval` for a SAM3, and the segmenter of `segment`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ..sam3.config import STAGES, Sam3CalibrationConfig
from . import models, options
from .models import SAM3
from .options import CommandError

if TYPE_CHECKING:  # these need packages of the extras
    from transformers import Sam3Model

    from ..segment import ImageSegmenter

_HEADS = {  # the heads of `Sam3Segmenter` by the value of --heads
    "both": ("instance", "semantic"),
    "instance": ("instance",),
    "semantic": ("semantic",),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the calibration, the prompts and the margin of a SAM3."""
    add = parser.add_argument
    add(
        "--sam3-stages",
        metavar="NAMES",
        help="the stages that calibrate a SAM3, with commas between them: trunk_repair, "
        "trunk_aggregate, trunk_attention, trunk_fusion, which are the default; cross_attention, "
        "decoder_calibration, mask_repair, mask_threshold; or none, for the frozen model",
        **SAM3,
    )
    add(
        "--sam3-preset",
        choices=("depth", "seed"),
        default="depth",
        help="the layers that the stages read: SC-CLIP's fractions of the depth, or 2 to 7, as in "
        "the design document of this package",
        **SAM3,
    )
    add(
        "--heads",
        choices=tuple(_HEADS),
        default="both",
        help="the heads of a SAM3 that score a class: instances, the semantic map, or the better "
        "of both at each pixel",
        **SAM3,
    )
    add(
        "--preview",
        metavar="SHARE",
        type=options.positive_share,
        help="the share of the classes that a SAM3 decodes in full, 40 at most, chosen by a cheap "
        "pass at two thirds of the resolution; by default all",
        **SAM3,
    )
    add(
        "--prompts-per-pass",
        metavar="N",
        type=options.positive,
        help="the number of prompts in a forward pass of a SAM3; by default what fits in memory, "
        "32 at most",
        **SAM3,
    )
    add(
        "--margin-thd",
        metavar="P",
        type=options.share,
        default=0.0,
        help="pixels whose best class is more probable than the second by less than this become "
        "the background",
        **SAM3,
    )


def settings(args: argparse.Namespace, classes: list[str]) -> dict:
    """Returns everything that results depend on, except the image, or raises CommandError."""
    args.extra = "demo,sam3"
    args.smaller = "--prompts-per-pass 1, --precision bf16, or fewer classes"
    return {
        "classes": classes,
        "model": args.model,
        "precision": args.precision,
        "sam3_preset": args.sam3_preset,
        "sam3_stages": stages(args.sam3_stages),
        "heads": args.heads,
        "preview": args.preview,
        "prob_thd": prob_thd(args),
        "margin_thd": args.margin_thd,
    }


def prob_thd(args: argparse.Namespace) -> float:
    """Returns --prob-thd, which is 0.5 by default."""
    return 0.5 if args.prob_thd is None else args.prob_thd


def segmenter(args: argparse.Namespace, classes: list[str]) -> ImageSegmenter:
    """Loads the SAM3 of --model and returns its segmenter.

    Raises:
        CommandError: the model cannot be loaded, or the calibration does not fit.
        ValueError: a name is too long, or two are the same.
    """
    model, processor = models.load_sam3(args)
    from ..segment import Sam3Segmenter

    return Sam3Segmenter(
        model, processor, classes, calibration(args, model), **segmenter_options(args)
    )


def segmenter_options(args: argparse.Namespace) -> dict:
    """Returns the arguments of `Sam3Segmenter` that the options choose, but for the calibration."""
    from ..segment import Preview

    return {
        "heads": _HEADS[args.heads],
        "preview": None if args.preview is None else Preview(share=args.preview),
        "prompts_per_pass": args.prompts_per_pass,
        "prob_thd": prob_thd(args),
        "margin_thd": args.margin_thd,
    }


def calibration(args: argparse.Namespace, model: Sam3Model) -> Sam3CalibrationConfig:
    """Returns the calibration of --sam3-preset and --sam3-stages, or raises CommandError."""
    layers, chosen = len(model.vision_encoder.backbone.layers), stages(args.sam3_stages)
    try:
        seed = args.sam3_preset == "seed"
        preset = Sam3CalibrationConfig.seed() if seed else Sam3CalibrationConfig.for_depth(layers)
        config = replace(preset, **{name: name in chosen for name in STAGES})
        config.check(layers, len(model.detr_decoder.layers))
    except ValueError as error:
        raise CommandError(f"--sam3-preset {args.sam3_preset} does not fit: {error}") from None
    return config


def stages(text: str | None) -> list[str]:
    """Returns the stages of --sam3-stages in the order of `STAGES`; None for its default."""
    if text is None:
        return [name for name in STAGES if getattr(Sam3CalibrationConfig, name)]
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in STAGES]:
        allowed = ", ".join(STAGES)
        raise CommandError(f"--sam3-stages must be none or some of {allowed}; got {unknown[0]!r}")
    return [name for name in STAGES if name in names]

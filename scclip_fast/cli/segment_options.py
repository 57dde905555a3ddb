"""The options of `scclip-fast segment`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import common
from .models import CLIP, SAM3


def add_files(parser: argparse.ArgumentParser) -> None:
    """What to segment, and what to write of it."""
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        nargs="*",
        help="files, folders and globs; with --model scenes, none is an example",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--classes",
        metavar="NAMES",
        help='with commas between them, synonyms with "|"; with --model scenes, by default its own',
    )
    classes.add_argument(
        "--classes-file",
        metavar="FILE",
        type=Path,
        help="a class a line, its synonyms after commas",
    )
    add("--recursive", action="store_true", help="look into the folders of folders")
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("segments"),
        help="gets NAME_labels.png and NAME_overlay.png of each image",
    )
    add(
        "--font",
        metavar="FILE",
        type=Path,
        help="draws the names of legends; by default a font of this machine that has the letters",
    )
    add("--json", action="store_true", help="NAME.json too: the share of each class and more")
    add(
        "--compare",
        nargs=0,
        default=False,
        const=True,
        help="with a SAM3, NAME_compare.png too: the outliers among its tokens, and what it finds "
        "frozen and calibrated",
        **SAM3,
    )
    add("--force", action="store_true", help="replace results that are there")


def add_clip(parser: argparse.ArgumentParser) -> None:
    """Sizes, windows and thresholds of `Segmenter`."""
    add = parser.add_argument
    pixels = dict(metavar="PIXELS", type=common.natural, **CLIP)
    add("--short-side", default=336, help="resize to this; 0 for the image's own size", **pixels)
    add("--slide-crop", default=224, help="side of the windows; 0 for the whole image", **pixels)
    pixels["type"] = common.positive
    add("--slide-stride", default=112, help="of the windows", **pixels)
    scale = dict(metavar="X", type=_scale, **CLIP)
    add("--logit-scale", default=40.0, help="sharpness of probabilities", **scale)
    add(
        "--prob-thd",
        metavar="P",
        type=_share,
        default=0.0,
        help="pixels less sure than this become the background",
        **CLIP,
    )
    add(
        "--area-thd",
        metavar="SHARE",
        type=_share,
        help="classes of at most this share of what is no background are taken out",
        **CLIP,
    )
    add("--background", metavar="NAME", help="the class that is the background", **CLIP)
    steps = dict(metavar="N", type=common.natural, default=0, **CLIP)
    add("--pamr-steps", help="of refinement by PAMR", **steps)


def add_sam3(parser: argparse.ArgumentParser) -> None:
    """The calibration of a SAM3, for `segment_sam3`."""
    add = parser.add_argument
    add(
        "--sam3-stages",
        metavar="NAMES",
        help="what calibrates a SAM3, with commas between them: trunk_repair, trunk_aggregate, "
        "trunk_attention, trunk_fusion, which are the default; cross_attention, "
        "decoder_calibration, mask_repair, mask_threshold; or none, for the frozen model",
        **SAM3,
    )
    add(
        "--sam3-preset",
        choices=("depth", "seed"),
        default="depth",
        help="the layers that it reads: SC-CLIP's fractions of the depth, or 2 to 7, as the design "
        "that this follows has them",
        **SAM3,
    )


def _share(text: str) -> float:
    """An argument's type: a number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text!r}")
    return value


def _scale(text: str) -> float:
    """An argument's type: a number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")

"""The options of `scclip-fast eval folder`: a user's own images and masks."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import classes as class_lists
from . import models, options
from .options import CommandError

if TYPE_CHECKING:  # of the extra eval
    from ..evaluate import Dataset, OwnProtocol

NAME = "folder"
_OPTIONS = (
    *("images", "masks", "names", "palette", "ignore", "background", "suffix"),
    *("short_side", "logit_scale", "prob_thd", "area_thd"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the data set `folder`."""
    add = parser.add_argument
    add("--images", metavar="FOLDER", type=Path, help="of `folder`: the images, in any depth")
    add(
        "--masks",
        metavar="FOLDER",
        type=Path,
        help="of `folder`: the masks, PNG files of the images' names: indices of classes in 8 or "
        "16 bits, or colours (--palette)",
    )
    add(
        "--names",
        metavar="FILE",
        type=Path,
        help="of `folder`: a text file with one class a line, its synonyms after commas",
    )
    add(
        "--palette",
        metavar="FILE",
        type=Path,
        help="of `folder`: a text file with the colour of each class a line, as R G B, in the "
        "order of --names; lines beyond the classes are colours that --ignore may name",
    )
    add(
        "--ignore",
        metavar="VALUE",
        help="of `folder`: the value in masks, or the line of --palette counted from 0, of pixels "
        "that do not count; by default 255; none counts all",
    )
    add(
        "--background",
        metavar="NAME",
        help="of `folder`: the class of pixels whose best class is less probable than --prob-thd",
    )
    add(
        "--suffix",
        metavar="TEXT",
        help="of `folder`: what masks have after the image's name; by default .png",
    )
    add(
        "--short-side",
        metavar="PIXELS",
        type=options.natural,
        help="of `folder`: resize the image's shorter side to this; 0 keeps the size; by default "
        "336",
        **models.CLIP,
    )
    add(
        "--logit-scale",
        metavar="X",
        type=options.scale,
        help="of `folder`: sharpness of the probabilities; by default 40",
        **models.CLIP,
    )
    add(
        "--prob-thd",
        metavar="P",
        type=options.share,
        help="of `folder`: see --background; with a SAM3, of every data set with a background, "
        "where it is 0.5 by default",
    )
    add(
        "--area-thd",
        metavar="SHARE",
        type=options.share,
        help="of `folder`: remove classes with at most this share of the pixels that are not "
        "background",
        **models.CLIP,
    )


def check(args: argparse.Namespace) -> None:
    """Raises CommandError for options of `folder` elsewhere, and for those that it lacks."""
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if args.dataset != NAME:
        if given == ["prob_thd"] and models.is_sam3(args.model):
            return
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise CommandError(f"{option} is for the data set {NAME}, not for {args.dataset}")
        return
    if args.root is not None:
        raise CommandError(f"--root is not for the data set {NAME}, which takes --images")
    if missing := [name for name in ("images", "masks", "names") if name not in given]:
        raise CommandError(f"{NAME} needs --{missing[0]}")
    if args.background is None and (args.prob_thd or args.area_thd is not None):
        raise CommandError("--prob-thd and --area-thd need --background NAME")
    if args.background is not None and not models.is_sam3(args.model):
        if not args.prob_thd and args.area_thd is None:
            raise CommandError(
                "--background needs --prob-thd or --area-thd, as it does nothing alone"
            )


def protocol(args: argparse.Namespace) -> OwnProtocol:
    """Returns the settings of the data set, or raises CommandError."""
    from .. import evaluate

    try:
        lines = evaluate.read_list(args.names)
        colors = None if args.palette is None else evaluate.read_colors(args.palette)
    except evaluate.DataError as error:
        raise CommandError(str(error)) from None
    entries = [line.rstrip(", \t").split(",") for line in lines]
    prompts = class_lists.checked(entries, str(args.names))
    names = list(map(class_lists.first_name, prompts))
    if args.background is not None and args.background not in names:
        raise CommandError(f"--background must be one of the classes, got {args.background!r}")
    if colors is not None and len(colors) < len(names):
        raise CommandError(f"{args.palette} has {len(colors)} colours for {len(names)} classes")
    return evaluate.OwnProtocol(
        NAME,
        partial(_open, args, len(names), colors),
        short_side=336 if args.short_side is None else args.short_side or None,
        logit_scale=args.logit_scale or 40.0,
        prob_thd=args.prob_thd or 0.0,
        area_thd=args.area_thd,
        background=None if args.background is None else names.index(args.background),
        prompts=tuple(prompts),
    )


def _open(
    args: argparse.Namespace,
    num_classes: int,
    colors: object,
    root: None,
    limit: int | None,
    allow_missing: bool,
) -> Dataset:
    """Opens the data set, or raises CommandError for an --ignore that is no such value."""
    from ..evaluate import DataError, OwnDataset

    try:
        return OwnDataset(
            args.images,
            args.masks,
            num_classes,
            ignored=_ignored(args.ignore),
            colors=colors,
            suffix=args.suffix or ".png",
            limit=limit,
            allow_missing=allow_missing,
        )
    except DataError:
        raise
    except ValueError as error:
        raise CommandError(f"--ignore: {error}") from None


def _ignored(text: str | None) -> int | None:
    """Returns the value of --ignore."""
    if text in (None, "none"):
        return 255 if text is None else None
    if not (text.isdecimal() and len(text) < 10):
        raise CommandError(f"--ignore must be a whole number or none, got {text!r}")
    return int(text)

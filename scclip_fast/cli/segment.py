"""`scclip-fast segment`: photos and class names to masks and pictures."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import classes as class_lists
from . import common, models, segment_options
from .common import CommandError

if TYPE_CHECKING:  # these are in extras
    from ..segment import Segmenter
    from .segment_sam3 import Sam3Segmenter


def add(commands: argparse._SubParsersAction) -> None:
    """The parser of `scclip-fast segment`."""
    parser = common.add_command(
        commands,
        "segment",
        "find classes that you name in photos: masks, and pictures of them",
        run,
        usage='%(prog)s IMAGE ... --classes "sky, tree, person|man|woman" [options]',
        extra="demo",
        smaller="",  # by the options, see `_smaller`
    )
    segment_options.add_files(parser)
    segment_options.add_clip(parser)
    segment_options.add_sam3(parser)
    models.add_model(parser)
    models.add_method(parser)


def run(args: argparse.Namespace) -> None:
    """Segment what isn't done yet."""
    from . import results

    classes = class_lists.from_options(args)
    args.smaller = _smaller(args)
    settings = _settings(args, classes)
    if args.font is not None:
        from . import fonts

        fonts.check(args.font)
        settings["font"] = str(args.font)
    paths = results.find_images(args.images, args.recursive, args.out) if args.images else [None]
    results.make_folder(args.out)
    kinds = ["labels", "overlay", *(kind for kind in ("compare", "json") if getattr(args, kind))]
    jobs = results.jobs(paths, args.out, settings, kinds=kinds, force=args.force)
    jobs = [job for job in jobs if job.files]
    if done := len(paths) - len(jobs):
        print(f"{done} of {len(paths)} done already; --force makes them again", file=sys.stderr)
    failures = 0
    if jobs:
        segmenter = _segmenter(args, classes)
        from . import segment_images

        failures = segment_images.segment(segmenter, jobs, args.font)
    print(f"{_images(len(jobs) - failures)} segmented. Results: {args.out}")
    if failures:
        raise CommandError(f"{_images(failures)} could not be read, see above")
    if len(classes) == 1 and not models.is_sam3(args.model):
        hint = "hint: a single class gets every pixel; name what else may be in the images"
        print(hint, file=sys.stderr)


def _settings(args: argparse.Namespace, classes: list[str]) -> dict:
    """All that results depend on, except the image; CommandError where they don't fit."""
    if not args.images and args.model != "scenes":
        raise CommandError("name an IMAGE: a file, a folder or a glob")
    models.check_kind(args)
    if models.is_sam3(args.model):
        args.extra, args.smaller = "demo,sam3", "--precision bf16, or smaller images"
        from . import segment_sam3

        return {"classes": classes} | segment_sam3.settings(args)
    names = list(map(class_lists.first_name, classes))
    if args.background is not None and args.background not in names:
        raise CommandError(f"--background must be one of the classes, got {args.background!r}")
    has_threshold = args.prob_thd > 0 or args.area_thd is not None
    if args.background is None and has_threshold:
        raise CommandError("--prob-thd and --area-thd need --background NAME")
    if args.background is not None and not has_threshold:
        raise CommandError("--background needs --prob-thd or --area-thd, as it does nothing alone")
    common.check_windows(args)
    used = ("model", "pretrained", "method", *models.SWITCHES, "precision", "short_side")
    used += (
        "slide_crop",
        "slide_stride",
        "logit_scale",
        "prob_thd",
        "area_thd",
        "background",
        "pamr_steps",
    )
    settings = {"classes": classes} | {name: getattr(args, name) for name in used}
    return settings | ({"pretrained": None} if models.brings_weights(args.model) else {})


def _smaller(args: argparse.Namespace) -> str:
    """What to try when memory runs out: what the options leave to try."""
    ways = ["--pamr-steps 0"] if args.pamr_steps else []
    ways += ["a smaller --short-side" if args.short_side else "--short-side 336"]
    ways += [] if args.slide_crop else ["windows (--slide-crop 224)"]
    ways += ["--precision bf16"] if args.precision == "fp32" else []
    return f"{', '.join(ways)}, or fewer classes; finished images are kept"


def _segmenter(args: argparse.Namespace, classes: list[str]) -> Segmenter | Sam3Segmenter:
    if models.is_sam3(args.model):
        from .segment_sam3 import load

        return load(args, classes)
    encoder, tokenizer = models.load_encoder(args)
    from ..segment import Segmenter

    names = list(map(class_lists.first_name, classes))
    try:
        return Segmenter(
            encoder,
            tokenizer,
            classes,
            logit_scale=args.logit_scale,
            prob_thd=args.prob_thd,
            area_thd=args.area_thd,
            background=None if args.background is None else names.index(args.background),
            slide_crop=args.slide_crop or None,
            slide_stride=args.slide_stride,
            short_side=args.short_side or None,
            pamr_steps=args.pamr_steps,
        )
    except ValueError as error:  # of names: too long, or equal
        raise CommandError(str(error)) from None


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"

"""`scclip-fast segment`: photos and class names to masks and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..ranks import process_group
from . import classes as class_lists
from . import files, models, options, segment_sam3
from .models import CLIP
from .options import CommandError

if TYPE_CHECKING:  # these need packages of the extras
    from ..segment import ImageSegmenter


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser of `scclip-fast segment`."""
    parser = options.add_command(
        commands,
        "segment",
        "find classes that you name in photos: masks, and pictures of them",
        run,
        usage='%(prog)s IMAGE ... --classes "sky, tree, person|man|woman" [options]',
        extra="demo",
        smaller="",  # `_smaller` makes it from the options
    )
    _add_files(parser)
    _add_clip(parser)
    segment_sam3.add_options(parser)
    models.add_model(parser)
    models.add_method(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the images, the classes and the results."""
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        nargs="*",
        help="files, folders and globs; with --model scenes, none segments an example",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--classes",
        metavar="NAMES",
        help='the classes, with commas between them and "|" between synonyms; --model scenes has '
        "its own by default",
    )
    classes.add_argument(
        "--classes-file",
        metavar="FILE",
        type=Path,
        help="a text file with one class a line, its synonyms after commas",
    )
    add("--recursive", action="store_true", help="search the folders inside folders too")
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("segments"),
        help="the folder for NAME_labels.png and NAME_overlay.png of each image; labels have "
        "8 bits and a palette, or 16 bits for more than 256 classes",
    )
    add(
        "--font",
        metavar="FILE",
        type=Path,
        help="the font of the legends; by default a font of this machine that has the letters",
    )
    add(
        "--json",
        action="store_true",
        help="also write NAME.json with the share of each class and more",
    )
    add(
        "--compare",
        action="store_true",
        help="also write NAME_compare.png: the masks of the frozen model, which for a CLIP is "
        "--method clip, and of the calibrated one, with the outlier tokens of a SAM3",
    )
    add("--force", action="store_true", help="replace existing results")
    models.add_batch(parser)


def _add_clip(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes, windows and thresholds of `Segmenter`."""
    add = parser.add_argument
    add(
        "--short-side",
        metavar="PIXELS",
        type=options.natural,
        default=336,
        help="resize the image's shorter side to this; 0 keeps the image's own size",
        **CLIP,
    )
    options.add_windows(parser, **CLIP)
    add(
        "--logit-scale",
        metavar="X",
        type=options.scale,
        default=40.0,
        help="sharpness of the probabilities",
        **CLIP,
    )
    add(
        "--prob-thd",
        metavar="P",
        type=options.share,
        help="pixels whose best class is less probable than this become the background; by default "
        "0 with a CLIP and 0.5 with a SAM3",
    )
    add(
        "--area-thd",
        metavar="SHARE",
        type=options.share,
        help="remove classes that have at most this share of the pixels that are not background",
        **CLIP,
    )
    add("--background", metavar="NAME", help="the class that is the background", **CLIP)
    add(
        "--pamr-steps",
        metavar="N",
        type=options.natural,
        default=0,
        help="number of refinement steps by PAMR",
        **CLIP,
    )


def run(args: argparse.Namespace) -> None:
    """Makes the results that are missing."""
    classes = class_lists.from_options(args)
    args.smaller = _smaller(args)
    settings = _settings(args, classes)
    if args.font is not None:
        from ..plots import fonts

        try:
            fonts.check(args.font)
        except ValueError as error:
            raise CommandError(f"--font {error}") from None
        settings["font"] = str(args.font)
    paths = files.find_images(args.images, args.recursive, args.out) if args.images else [None]
    files.make_folder(args.out)
    kinds = ["labels", "overlay", *(kind for kind in ("compare", "json") if getattr(args, kind))]
    device = models.local_device(args)
    with process_group(device) as ranks:
        share = slice(ranks.rank, None, ranks.world_size)
        jobs = files.jobs(paths, args.out, settings, kinds=kinds, force=args.force, share=share)
        jobs = [job for job in jobs if job.files]
        failures = 0
        if jobs:
            segmenter = _segmenter(args, classes)
            from . import segment_images

            failures = segment_images.segment(segmenter, jobs, args.font, models.batch(args), ranks)
        todo, failures = (ranks.total(count, device) for count in (len(jobs), failures))
    if ranks.rank == 0:
        _report(args, classes, len(paths), todo, failures)


def _report(
    args: argparse.Namespace, classes: list[str], images: int, todo: int, failures: int
) -> None:
    """Prints what was done, or raises CommandError if an image could not be read."""
    if done := images - todo:
        print(f"{done} of {images} done already; --force makes them again", file=sys.stderr)
    print(f"{_images(todo - failures)} segmented. Results: {args.out}")
    if failures:
        raise CommandError(f"{_images(failures)} could not be read, see above")
    if len(classes) == 1 and not models.is_sam3(args.model):
        hint = "hint: a single class gets every pixel; name what else may be in the images"
        print(hint, file=sys.stderr)


def _settings(args: argparse.Namespace, classes: list[str]) -> dict:
    """Returns everything that results depend on, except the image.

    Raises:
        CommandError: options do not fit each other or the model.
    """
    if not args.images and args.model != "scenes":
        raise CommandError("name an IMAGE: a file, a folder or a glob")
    models.check_kind(args)
    if models.is_sam3(args.model):
        return segment_sam3.settings(args, classes)
    args.prob_thd = args.prob_thd or 0.0
    names = list(map(class_lists.first_name, classes))
    if args.background is not None and args.background not in names:
        raise CommandError(f"--background must be one of the classes, got {args.background!r}")
    has_threshold = args.prob_thd > 0 or args.area_thd is not None
    if args.background is None and has_threshold:
        raise CommandError("--prob-thd and --area-thd need --background NAME")
    if args.background is not None and not has_threshold:
        raise CommandError("--background needs --prob-thd or --area-thd, as it does nothing alone")
    options.check_windows(args)
    if args.compare and args.method == "clip":
        raise CommandError("--compare shows plain CLIP beside another --method, got clip")
    used = ("model", "pretrained", "method", "proxy", *models.SWITCHES, "precision", "short_side")
    used += (
        "slide_crop",
        "slide_stride",
        "stitch",
        "logit_scale",
        "prob_thd",
        "area_thd",
        "background",
        "pamr_steps",
    )
    settings = {"classes": classes} | {name: getattr(args, name) for name in used}
    return settings | ({"pretrained": None} if models.brings_weights(args.model) else {})


def _smaller(args: argparse.Namespace) -> str:
    """Returns the advice for the case that memory runs out, which depends on the options."""
    ways = ["--pamr-steps 0"] if args.pamr_steps else []
    ways += ["a smaller --short-side" if args.short_side else "--short-side 336"]
    ways += [] if args.slide_crop else ["windows (--slide-crop 224)"]
    ways += ["--precision bf16"] if args.precision == "fp32" else []
    return f"{', '.join(ways)}, or fewer classes; finished images are kept"


def _segmenter(args: argparse.Namespace, classes: list[str]) -> ImageSegmenter:
    """Loads the model of --model and returns its segmenter, or raises CommandError."""
    try:
        make = segment_sam3.segmenter if models.is_sam3(args.model) else _clip
        return make(args, classes)
    except ValueError as error:  # from the names: one is too long, or two are the same
        raise CommandError(str(error)) from None


def _clip(args: argparse.Namespace, classes: list[str]) -> ImageSegmenter:
    encoder, tokenizer = models.load_encoder(args)
    from ..segment import Segmenter

    names = list(map(class_lists.first_name, classes))
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
        stitch=args.stitch,
        short_side=args.short_side or None,
        pamr_steps=args.pamr_steps,
    )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"

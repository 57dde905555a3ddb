"""`scclip-fast segment`: photos and class names to masks and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import common
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
        smaller="a smaller --short-side, or windows (--slide-crop 224); finished images are kept",
    )
    _add_files(parser)
    _add_settings(parser)
    common.add_model_options(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
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
    add("--json", action="store_true", help="NAME.json too: the share of each class and more")
    add("--force", action="store_true", help="replace results that are there")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    pixels = dict(metavar="PIXELS", type=common.natural)
    add("--short-side", default=336, help="resize to this; 0 for the image's own size", **pixels)
    add("--slide-crop", default=224, help="side of the windows; 0 for the whole image", **pixels)
    add(
        "--slide-stride", metavar="PIXELS", type=common.positive, default=112, help="of the windows"
    )
    add("--logit-scale", metavar="X", type=_scale, default=40.0, help="sharpness of probabilities")
    add(
        "--prob-thd",
        metavar="P",
        type=_share,
        default=0.0,
        help="pixels less sure than this become the background",
    )
    add(
        "--area-thd",
        metavar="SHARE",
        type=_share,
        help="classes of at most this share of what is no background are taken out",
    )
    add("--background", metavar="NAME", help="the class that is the background")
    add("--pamr-steps", metavar="N", type=common.natural, default=0, help="of refinement by PAMR")


def run(args: argparse.Namespace) -> None:
    """Segment what isn't done yet."""
    from . import results

    classes = _classes(args)
    settings = _settings(args, classes)
    paths = results.find_images(args.images, args.recursive, args.out) if args.images else [None]
    results.make_folder(args.out)
    jobs = results.jobs(paths, args.out, settings, json=args.json, force=args.force)
    jobs = [job for job in jobs if job.files]
    if done := len(paths) - len(jobs):
        print(f"{done} of {len(paths)} done already; --force makes them again", file=sys.stderr)
    failures = 0
    if jobs:
        segmenter = _segmenter(args, classes)
        from . import segment_images

        failures = segment_images.segment(segmenter, jobs)
    print(f"{_images(len(jobs) - failures)} segmented. Results: {args.out}")
    if failures:
        raise CommandError(f"{_images(failures)} could not be read, see above")


def _classes(args: argparse.Namespace) -> list[str]:
    """A string a class, the synonyms after commas, as Segmenter takes them."""
    if args.classes is None and args.classes_file is None:
        if args.model != "scenes":
            raise CommandError('name what to look for: --classes "sky, tree, person|man|woman"')
        from ..scenes.draw import CLASSES

        return list(CLASSES)
    if args.classes is not None:
        option, entries = "--classes", [text.split("|") for text in args.classes.split(",")]
    else:
        option = str(args.classes_file)
        entries = [line.split(",") for line in _lines(args.classes_file) if line.strip()]
    return class_entries(entries, option)


def class_entries(entries: list[list[str]], source: str) -> list[str]:
    """A string a class, its synonyms after commas, as Segmenter takes them.

    Args:
        entries: the names of each class.
        source: where they were given, for errors.

    Raises:
        CommandError: an empty or repeated name, or more classes than a palette has colours.
    """
    entries = [[name.strip() for name in entry] for entry in entries]
    if not entries or not all(all(entry) for entry in entries):
        raise CommandError(f"{source} has an empty name")
    names = [entry[0] for entry in entries]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{source} names {', '.join(repeated)} more than once")
    if len(names) > 256:
        raise CommandError(f"{source} has {len(names)} classes; a palette PNG holds at most 256")
    return [", ".join(entry) for entry in entries]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


def _settings(args: argparse.Namespace, classes: list[str]) -> dict:
    """All that results depend on, except the image; CommandError where they don't fit."""
    names = [entry.partition(",")[0] for entry in classes]
    if not args.images and args.model != "scenes":
        raise CommandError("name an IMAGE: a file, a folder or a glob")
    if args.background is not None and args.background not in names:
        raise CommandError(f"--background must be one of the classes, got {args.background!r}")
    if args.background is None and (args.prob_thd > 0 or args.area_thd is not None):
        raise CommandError("--prob-thd and --area-thd need --background NAME")
    common.check_windows(args)
    if common.is_sam3(args.model):
        common.check_no_clip_options(args)
    used = ("model", "pretrained", "method", *common.SWITCHES, "precision", "short_side")
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
    return settings | ({"pretrained": None} if common.brings_weights(args.model) else {})


def _segmenter(args: argparse.Namespace, classes: list[str]) -> Segmenter | Sam3Segmenter:
    if common.is_sam3(args.model):
        from .segment_sam3 import load

        return load(args, classes)
    encoder, tokenizer = common.load_encoder(args)
    from ..segment import Segmenter

    names = [entry.partition(",")[0] for entry in classes]
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


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


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

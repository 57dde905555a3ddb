"""`scclip-fast segment`: photos and class names to masks and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import common, segment_options
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
    common.add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Segment what isn't done yet."""
    from . import results

    classes = _classes(args)
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
    if not common.is_sam3(args.model):
        return class_entries(entries, option)
    entries = class_entries(entries, option, most=255)  # the background is one more
    if "background" in (entry.partition(",")[0] for entry in entries):
        raise CommandError(f"{option} names the background, which a SAM3 has besides its classes")
    return entries


def class_entries(entries: list[list[str]], source: str, most: int = 256) -> list[str]:
    """A string a class, its synonyms after commas, as Segmenter takes them.

    Args:
        entries: the names of each class.
        source: where they were given, for errors.
        most: so many classes, as many as a palette has colours.

    Raises:
        CommandError: an empty or repeated name, or more than `most` classes.
    """
    entries = [[name.strip() for name in entry] for entry in entries]
    if not entries or not all(all(entry) for entry in entries):
        raise CommandError(f"{source} has an empty name")
    names = [entry[0] for entry in entries]
    if len(names) > most:
        raise CommandError(f"{source} has {len(names)} classes; a palette PNG holds at most {most}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CommandError(f"{source} names {', '.join(repeated)} more than once")
    return [", ".join(entry) for entry in entries]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


def _settings(args: argparse.Namespace, classes: list[str]) -> dict:
    """All that results depend on, except the image; CommandError where they don't fit."""
    if not args.images and args.model != "scenes":
        raise CommandError("name an IMAGE: a file, a folder or a glob")
    common.check_kind(args)
    if common.is_sam3(args.model):
        args.extra, args.smaller = "demo,sam3", "--precision bf16, or smaller images"
        from . import segment_sam3

        return {"classes": classes} | segment_sam3.settings(args)
    names = [entry.partition(",")[0] for entry in classes]
    if args.background is not None and args.background not in names:
        raise CommandError(f"--background must be one of the classes, got {args.background!r}")
    if args.background is None and (args.prob_thd > 0 or args.area_thd is not None):
        raise CommandError("--prob-thd and --area-thd need --background NAME")
    common.check_windows(args)
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


def _smaller(args: argparse.Namespace) -> str:
    """What to try when memory runs out: what the options leave to try."""
    ways = ["--pamr-steps 0"] if args.pamr_steps else []
    ways += ["a smaller --short-side" if args.short_side else "--short-side 336"]
    ways += [] if args.slide_crop else ["windows (--slide-crop 224)"]
    ways += ["--precision bf16"] if args.precision == "fp32" else []
    return f"{', '.join(ways)}, or fewer classes; finished images are kept"


def _segmenter(args: argparse.Namespace, classes: list[str]) -> Segmenter | Sam3Segmenter:
    if common.is_sam3(args.model):
        from .segment_sam3 import load

        return load(args, classes)
    encoder, tokenizer = common.load_encoder(args)
    from ..segment import Segmenter

    names = [entry.partition(",")[0] for entry in classes]
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

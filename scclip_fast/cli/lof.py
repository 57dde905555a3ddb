"""`scclip-fast lof`: the outlier patches of a photo, drawn and as data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import files, models
from .files import check_output
from .options import CommandError, add_command, file_path, positive

if TYPE_CHECKING:  # of the extra demo
    from ..plots.outliers import PhotoOutliers

_SAMPLE = "scikit-learn's china.jpg"
_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
_SETTINGS = ("photo", "model", "precision", "device", "neighbors", "contamination")


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser of `scclip-fast lof`."""
    lof = add_command(
        commands,
        "lof",
        "find the outlier patches of a photo, and draw them",
        run,
        usage="%(prog)s [PHOTO] [options]",
        extra="demo",
        smaller="a smaller --size",
    )
    add = lof.add_argument
    add("photo", metavar="PHOTO", nargs="?", default=_SAMPLE, help="a picture file")
    add(
        "--size",
        metavar="PIXELS",
        nargs="+",
        type=positive,
        default=[1008, 1152],
        help="side of the square that the photo is cut to; the picture has a row for each size",
    )
    add("--neighbors", metavar="K", type=positive, default=30, help="neighbours in LOF")
    add("--contamination", metavar="SHARE", type=_share, default=0.05, help="share of outliers")
    models.add_model(lof, random=True)
    formats = ", ".join(_FORMATS)
    file = dict(metavar="FILE", type=file_path)
    add("--out", default=Path("lof.png"), help=f"the picture: {formats}", **file)
    add("--json", help="scores, outliers and settings as JSON", **file)
    scores = "scores (rows, columns) of the patches, float32; several sizes add _SIZE to the name"
    add("--npy", help=scores, **file)
    add("--force", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> None:
    """Prints a table of the outliers, and writes the picture and the scores."""
    _check_outputs(args)
    from . import lof_photo

    photo = lof_photo.load_photo(None if args.photo == _SAMPLE else Path(args.photo))
    encoder, tokenizer = models.load_encoder(args)
    for size in args.size:
        lof_photo.check_size(encoder.patch_size, size, args.neighbors)

    print(f"photo    {args.photo}, {photo.width} × {photo.height}")
    print(f"model    {args.model}, {args.precision}")
    print(f"weights  {_weights(args)}")
    print(f"device   {encoder.tower.device}; torch {torch.__version__}")
    print("\nsize   tokens outliers", flush=True)
    rows = []
    for size in args.size:
        row = lof_photo.find(encoder, tokenizer, photo, size, args.neighbors, args.contamination)
        rows.append(row)
        print(f"{size:<5}{row.mask.numel():>8}{int(row.mask.sum()):>9}", flush=True)
    _write(args, rows)


def _check_outputs(args: argparse.Namespace) -> None:
    check_output("--out", args.out, _FORMATS, force=args.force)
    if args.json is not None:
        check_output("--json", args.json, (".json",), force=args.force)
    if args.npy is not None:
        for path in _arrays(args):
            check_output("--npy", path, (".npy",), force=args.force)
    paths = [args.out, args.json, *(_arrays(args) if args.npy is not None else ())]
    paths = [os.path.abspath(path) for path in paths if path is not None]
    if len(set(paths)) < len(paths):
        raise CommandError("--out, --json and --npy must name different files")


def _arrays(args: argparse.Namespace) -> list[Path]:
    """Returns the file of --npy for each size."""
    path = args.npy
    if len(args.size) == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{size}{path.suffix}") for size in args.size]


def _weights(args: argparse.Namespace) -> str:
    if models.brings_weights(args.model):
        return "those of the model"
    return f"random (seed {models.SEED})" if args.pretrained == models.RANDOM else args.pretrained


def _write(args: argparse.Namespace, rows: list[PhotoOutliers]) -> None:
    """Writes the files that the options name, each whole or not at all."""
    from ..plots import outliers
    from . import lof_photo

    heading = f"Outlier patches of {args.model}, weights: {_weights(args)}"
    format = args.out.suffix[1:].lower() or "png"
    files.write(args.out, outliers.draw(rows, heading, format))
    print(f"\nPicture: {args.out}")
    if args.json is not None:
        settings = {name: getattr(args, name) for name in _SETTINGS} | {"weights": _weights(args)}
        files.write(args.json, files.encode_json(lof_photo.report(rows, settings)))
        print(f"Data: {args.json}")
    if args.npy is not None:
        for path, row in zip(_arrays(args), rows, strict=True):
            files.write(path, lof_photo.encode_npy(row))
            print(f"Scores: {path}")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in (0, 0.5], got {text!r}")
    return value

"""`scclip-fast lof`: the outlier patches of a photo, measured and drawn."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import files, models
from .files import check_output
from .options import CommandError, add_command, file_path, positive

if TYPE_CHECKING:  # of the extra demo
    from ..measure import Measurement
    from .lof_demo import Comparison

_SAMPLE = "scikit-learn's china.jpg"
_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
_SETTINGS = ("photo", "model", "precision", "device", "neighbors", "contamination")


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the parser of `scclip-fast lof`."""
    lof = add_command(
        commands,
        "lof",
        "find the outlier patches of a photo, measure how long that takes, and draw them",
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
        help="side of the square the photo is cut to; several give a row of the picture each",
    )
    add("--neighbors", metavar="K", type=positive, default=30, help="neighbours in LOF")
    add("--contamination", metavar="SHARE", type=_share, default=0.05, help="share of outliers")
    models.add_model(lof, random=True)
    formats = ", ".join(_FORMATS)
    file = dict(metavar="FILE", type=file_path)
    add("--out", default=Path("lof.png"), help=f"the picture: {formats}", **file)
    add("--json", help="scores, outliers, times and settings as JSON", **file)
    scores = "scores (rows, columns) of the patches, float32; several sizes add _SIZE to the name"
    add("--npy", help=scores, **file)
    add("--force", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes the picture and the scores."""
    _check_outputs(args)
    from . import lof_demo

    photo = lof_demo.load_photo(None if args.photo == _SAMPLE else Path(args.photo))
    encoder, tokenizer = models.load_encoder(args)
    for size in args.size:
        lof_demo.check_size(encoder.patch_size, size, args.neighbors)

    print(f"photo    {args.photo}, {photo.width} × {photo.height}")
    print(f"model    {args.model}, {args.precision}")
    print(f"weights  {_weights(args)}")
    print(f"device   {_device_name(encoder.tower.device)}; torch {torch.__version__}")
    print(f"\n{_HEADER}", flush=True)
    comparisons = []
    for size in args.size:
        comparisons.append(
            lof_demo.compare(encoder, tokenizer, photo, size, args.neighbors, args.contamination)
        )
        print(_table_row(comparisons[-1]), flush=True)
    print(
        f"\nMedians of {lof_demo.REPEATS} alternating runs. Memory: by how much the process grew. "
        "Score errors: relative\nto float64."
    )
    _write(args, comparisons)


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
        raise CommandError("two of the files that --out, --json and --npy name are one")


def _arrays(args: argparse.Namespace) -> list[Path]:
    """The file of --npy for each size."""
    path = args.npy
    if len(args.size) == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{size}{path.suffix}") for size in args.size]


def _weights(args: argparse.Namespace) -> str:
    if models.brings_weights(args.model):
        return "those of the model"
    return f"random (seed {models.SEED})" if args.pretrained == models.RANDOM else args.pretrained


def _write(args: argparse.Namespace, comparisons: list[Comparison]) -> None:
    """Writes what the options name, each file whole or not at all."""
    from . import lof_data, lof_picture

    heading = f"Outlier patches of {args.model}, weights: {_weights(args)}"
    format = args.out.suffix[1:].lower() or "png"
    files.write(args.out, lof_picture.draw(comparisons, heading, format))
    print(f"\nPicture: {args.out}")
    if args.json is not None:
        settings = {name: getattr(args, name) for name in _SETTINGS} | {"weights": _weights(args)}
        files.write(args.json, files.encode_json(lof_data.report(comparisons, settings)))
        print(f"Data: {args.json}")
    if args.npy is not None:
        for path, comparison in zip(_arrays(args), comparisons, strict=True):
            files.write(path, lof_data.encode_npy(comparison))
            print(f"Scores: {path}")


_HEADER = """\
                       scclip_fast.lof        matmul + topk                  same  largest error
size   tokens outliers      time    memory      time    memory speed-up  outliers   ours  matmul"""


def _table_row(comparison: Comparison) -> str:
    found, tokens = int(comparison.mask.sum()), comparison.mask.numel()
    ours, plain = comparison.ours, comparison.plain
    return (
        f"{comparison.size:<5}{tokens:>8}{found:>9}"
        f"{_time(ours):>10}{_memory(ours):>10}{_time(plain):>10}{_memory(plain):>10}"
        f"{plain.seconds / ours.seconds:>8.2f}x{comparison.shared_outliers:>10}"
        f"{comparison.our_error:>7.0e}{comparison.plain_error:>8.0e}"
    )


def _time(run: Measurement) -> str:
    milliseconds = 1e3 * run.seconds
    return f"{milliseconds:.{0 if milliseconds >= 100 else 2}f} ms"


def _memory(run: Measurement) -> str:
    return "unknown" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:.0f} MiB"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return (
                next(line for line in file if line.startswith("model name")).split(": ")[1].strip()
            )
    except (OSError, StopIteration):  # not Linux, or an architecture without that line
        return platform.processor() or platform.machine()


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in (0, 0.5], got {text!r}")
    return value

"""`scclip-fast lof`: the outlier patches of a photo, measured and drawn."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .common import CommandError, add_command, add_device, check_writable, device, positive

if TYPE_CHECKING:  # these load open_clip
    from ..measure import Measurement
    from .lof_demo import Comparison

_SAMPLE = "scikit-learn's china.jpg"


def add(commands: argparse._SubParsersAction) -> None:
    """The parser of `scclip-fast lof`."""
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
    add("--model", default="ViT-B-16-quickgelu", help="open_clip's name of a vision transformer")
    add("--pretrained", metavar="TAG", default="openai", help="open_clip's name of its weights")
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
    add_device(lof)
    add("--out", metavar="PNG", type=Path, default=Path("lof.png"), help="the picture")


def run(args: argparse.Namespace) -> None:
    """Measure, print a table, draw."""
    target = device(args.device)
    check_writable(args.out)
    from ..clip.loading import fetch_weights
    from . import lof_demo, lof_picture

    photo = lof_demo.load_photo(None if args.photo == _SAMPLE else Path(args.photo))
    lof_demo.check_model(args.model, args.pretrained)
    for size in args.size:
        lof_demo.check_size(args.model, size, args.neighbors)
    failure = fetch_weights(args.model, args.pretrained)
    tag = args.pretrained if failure is None else None
    absent = f'as "{args.pretrained}" could not be downloaded: {failure}'

    print(f"photo    {args.photo}, {photo.width} × {photo.height}")
    print(f"model    {args.model}")
    print(f"weights  {tag or f'random (seed {lof_demo.SEED}), {absent}'}")
    print(f"device   {_device_name(target)}; torch {torch.__version__}")
    print(f"\n{_HEADER}", flush=True)
    comparisons = []
    encoder = lof_demo.load_model(args.model, tag).to(target)
    for size in args.size:
        comparisons.append(
            lof_demo.compare(encoder, photo, size, args.neighbors, args.contamination)
        )
        print(_table_row(comparisons[-1]), flush=True)
    print(
        f"\nMedians of {lof_demo.REPEATS} alternating runs. Memory: by how much the process grew. "
        "Score errors: relative\nto float64."
    )
    heading = f"Outlier patches of {args.model}, {tag or 'random'} weights"
    try:
        lof_picture.draw(comparisons, heading, args.out)
    except OSError as error:
        raise CommandError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"\nPicture: {args.out}")


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

"""The command `scclip-fast`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:  # these load open_clip
    from .lof_demo import Comparison
    from .measure import Measurement


_SAMPLE = "scikit-learn's china.jpg"


class CommandError(Exception):
    """What the user asked for can't be done; the message is one line that says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit code: 0, or 2 after one line on stderr that says why."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
        return _fail(args, str(error))
    except ModuleNotFoundError as error:
        if (error.name or "scclip_fast").startswith("scclip_fast"):
            raise
        return _fail(args, f'needs the package {error.name}: pip install "scclip_fast[demo]"')
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail(args, "out of memory; try a smaller --size")
    return 0


def _fail(args: argparse.Namespace, message: str) -> int:
    print(f"{args.prog}: error: {message}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    # torch's allocator on the CPU raises a plain RuntimeError.
    expected = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, expected) or "DefaultCPUAllocator" in str(error)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage: one line


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="scclip-fast", description="Training-free dense vision with CLIP.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_lof(commands)
    return parser


def _add_lof(commands: argparse._SubParsersAction) -> None:
    summary = "find the outlier patches of a photo, measure how long that takes, and draw them"
    lof = commands.add_parser(
        "lof",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage="%(prog)s [PHOTO] [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lof.set_defaults(run=_run_lof, prog=lof.prog)
    gpu = torch.cuda.is_available()
    add = lof.add_argument
    add("photo", metavar="PHOTO", nargs="?", default=_SAMPLE, help="a picture file")
    add("--model", default="ViT-B-16-quickgelu", help="open_clip's name of a vision transformer")
    add("--pretrained", metavar="TAG", default="openai", help="open_clip's name of its weights")
    add(
        "--size",
        metavar="PIXELS",
        nargs="+",
        type=_positive,
        default=[1008, 1152],
        help="side of the square the photo is cut to; several give a row of the picture each",
    )
    add("--neighbors", metavar="K", type=_positive, default=30, help="neighbours in LOF")
    add("--contamination", metavar="SHARE", type=_share, default=0.05, help="share of outliers")
    add("--device", default="cuda" if gpu else "cpu", help="cpu, cuda or cuda:INDEX")
    add("--out", metavar="PNG", type=Path, default=Path("lof.png"), help="the picture")


def _run_lof(args: argparse.Namespace) -> None:
    device = _device(args.device)
    _check_writable(args.out)
    from . import lof_demo, lof_picture

    photo = lof_demo.load_photo(None if args.photo == _SAMPLE else Path(args.photo))
    lof_demo.check_model(args.model, args.pretrained)
    for size in args.size:
        lof_demo.check_size(args.model, size, args.neighbors)
    failure = lof_demo.fetch_weights(args.model, args.pretrained)
    tag = args.pretrained if failure is None else None
    absent = f'as "{args.pretrained}" could not be downloaded: {failure}'

    print(f"photo    {args.photo}, {photo.width} × {photo.height}")
    print(f"model    {args.model}")
    print(f"weights  {tag or f'random (seed {lof_demo.SEED}), {absent}'}")
    print(f"device   {_device_name(device)}; torch {torch.__version__}")
    print(f"\n{_HEADER}", flush=True)
    comparisons = []
    for size in args.size:
        model = lof_demo.load_model(args.model, tag, size).to(device)
        comparisons.append(lof_demo.compare(model, photo, args.neighbors, args.contamination))
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise CommandError(f"--device {name} is not there: torch finds {found} CUDA device(s)")
    return device


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


def _check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if os.path.isdir(path):
        raise CommandError(f"cannot write {path}: it is a directory")
    if not os.path.isdir(path.parent):
        raise CommandError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 0.5:
        raise argparse.ArgumentTypeError(f"must be in (0, 0.5], got {text!r}")
    return value

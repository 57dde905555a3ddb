"""A photo with many classes through a full-size SAM3: python bench/vocabulary.py --out JSON

The model has 840 million random weights. Beside `Sam3Segmenter` runs what the segmenter replaced:
after the trunk, a pass for each prompt, and the maps of all classes at the photo's size. Times are
the CPU seconds of all threads, so that other work on the machine adds little to them. The command
runs on a CPU alone; on a GPU `bench/targets.py vocabulary` times the same calls.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_sam3
import harness
import numpy as np
from measure import measure
from tiny_sam3 import tiny_processor
from torch import Tensor

from scclip_fast.segment import Sam3Segmenter

SIZE = (1500, 2000)  # of the photo, (H, W)
CLASSES = (1, 32, 151)  # 151: those of ADE20K and the background
LETTERS = "abcdefghijklm"
NAMES = [first + second for first in LETTERS for second in LETTERS]


def in_batches(segmenter: Sam3Segmenter, photo: np.ndarray) -> Tensor:
    """Returns the labels (H, W)."""
    return segmenter(photo)


def one_by_one(segmenter: Sam3Segmenter, photo: np.ndarray) -> Tensor:
    """Returns the labels (H, W), from one prompt a pass and all maps at the photo's size."""
    segmenter.prompts_per_pass = 1
    return segmenter.probabilities(photo)[1:].argmax(dim=0) + 1


PROVIDERS = {"scclip_fast": in_batches, "one prompt a pass": one_by_one}


def calls(count: int, device: str, dtype: str) -> dict[str, Callable[[], Tensor]]:
    """The calls to compare, of a frozen model with `count` classes."""
    model = bench_sam3.loaded(device, dtype)
    processor = tiny_processor(bench_sam3.SHAPE[-1])
    photo = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return {
        name: partial(run, Sam3Segmenter(model, processor, NAMES[:count], prob_thd=0.0), photo)
        for name, run in PROVIDERS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows in it are kept")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    arguments = parser.parse_args()
    out = arguments.out
    rows = json.loads(out.read_text())["vocabulary"] if out.exists() else []
    for count in arguments.classes:
        for name in arguments.providers:
            call = calls(count, "cpu", "float32")[name]
            before = time.process_time()
            peak = measure(call).peak_bytes
            seconds = time.process_time() - before
            rows.append(dict(classes=count, provider=name, cpu_seconds=seconds, peak_bytes=peak))
            print(f"{count} classes, {name}: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)
            result = harness.provenance("cpu") | dict(size=SIZE, vocabulary=rows)
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Images a second from files to files on a CPU: python bench/throughput.py --out JSON

`scclip-fast segment` runs on photos, which are crops of one photograph of scikit-learn, with the
small CLIP of this package. Beside it runs the published way: image by image, window by window,
everything in turn. The calls take turns in one process, and the shortest time of each counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from scclip_fast.cli import segment_images
from scclip_fast.cli.files import Job, jobs
from scclip_fast.clip import create_model
from scclip_fast.scenes.draw import CLASSES
from scclip_fast.segment import Segmenter
from scclip_fast.segment import clip as segment_clip

PHOTOS = 200
BATCHES = (1, 2, 4, 8)
ROUNDS = 3


def write_photos(folder: Path, count: int) -> list[Path]:
    """Writes crops of a photograph, of sizes around 480 x 360."""
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    rng, paths = np.random.default_rng(0), []
    for index in range(count):
        width, height = rng.integers(440, 520), rng.integers(330, 390)
        left, top = rng.integers(photograph.width - width), rng.integers(photograph.height - height)
        paths.append(folder / f"{index}.jpg")
        photograph.crop((left, top, left + width, top + height)).save(paths[-1], quality=92)
    return paths


def by_windows(segmenter: Segmenter, some: list[Job]) -> None:
    """Reads, segments and writes an image after the other, a window in a forward pass."""
    most, segment_clip._MAX_WINDOWS = segment_clip._MAX_WINDOWS, 1
    try:
        for job in some:
            photo = segment_images._photo(job)
            (bands,) = segmenter.bands([photo])
            result = segment_images._result(segmenter, photo, bands, job)
            segment_images._write(segmenter.classes, photo, result, job, None)
    finally:
        segment_clip._MAX_WINDOWS = most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=PHOTOS)
    arguments = parser.parse_args()
    segmenter = Segmenter(*create_model("scenes"), list(CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), arguments.photos)
        todo = jobs(paths, Path(folder), {}, kinds=["labels", "overlay"], force=True)
        calls: dict[str, Callable] = {"window by window": partial(by_windows, segmenter, todo)}
        for batch in BATCHES:
            calls[f"batch {batch}"] = partial(segment_images.segment, segmenter, todo, None, batch)
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
                print(f"{name}: {arguments.photos / best[name]:.2f} images/s", flush=True)
    rates = {name: arguments.photos / seconds for name, seconds in best.items()}
    result = harness.provenance("cpu") | {"threads": torch.get_num_threads(), "throughput": rates}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

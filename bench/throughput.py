"""Images a second on a CPU: python bench/throughput.py --out JSON

`scclip-fast segment` goes from files to files, with photos that are crops of one photograph of
scikit-learn; `scclip-fast eval scenes` compares labels. Both run the small CLIP of this package.
Beside them runs the published way: image by image, window by window, everything in turn. The calls
take turns in one process, and the shortest time of each counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from scclip_fast.evaluate.datasets import Scenes
from scclip_fast.evaluate.loop import run
from scclip_fast.evaluate.metric import confusion_matrix
from scclip_fast.evaluate.record import RunRecord
from scclip_fast.scenes.draw import CLASSES
from scclip_fast.segment import Segmenter, cosines

PHOTOS = 200
SCENES = 60
BATCHES = (1, 2, 4, 8)
ROUNDS = 3
PUBLISHED = "window by window"


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


@contextmanager
def single_windows() -> Iterator[None]:
    """A forward pass takes one window."""
    most, cosines.MAX_WINDOWS = cosines.MAX_WINDOWS, 1
    try:
        yield
    finally:
        cosines.MAX_WINDOWS = most


@single_windows()
def photos_by_windows(segmenter: Segmenter, some: list[Job]) -> None:
    """Reads, segments and writes an image after the other."""
    for job in some:
        photo = segment_images._photo(job)
        (bands,) = segmenter.bands([photo])
        result = segment_images._result(segmenter, photo, bands, job)
        segment_images._write(segmenter.classes, photo, result, job, None)


@single_windows()
def scenes_by_windows(segmenter: Segmenter, dataset: Scenes) -> None:
    """Draws, segments and compares a scene after the other."""
    for sample in map(dataset.__getitem__, range(len(dataset))):
        confusion_matrix(segmenter(sample.image), sample.labels, dataset.num_classes)


def evaluate(segmenter: Segmenter, dataset: Scenes, folder: Path, batch: int) -> None:
    record = RunRecord(folder / "eval.json", {})
    record.clear()
    run(segmenter, dataset, record, batch=batch)


def race(calls: dict[str, Callable], images: int) -> dict[str, float]:
    """Returns the images a second of each call."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: images / seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=PHOTOS)
    parser.add_argument("--scenes", type=int, default=SCENES)
    arguments = parser.parse_args()
    segmenter = Segmenter(*create_model("scenes"), list(CLASSES))
    dataset = Scenes(limit=arguments.scenes)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), arguments.photos)
        todo = jobs(paths, Path(folder), {}, kinds=["labels", "overlay"], force=True)
        segment: dict[str, Callable] = {PUBLISHED: partial(photos_by_windows, segmenter, todo)}
        scenes: dict[str, Callable] = {PUBLISHED: partial(scenes_by_windows, segmenter, dataset)}
        for batch in BATCHES:
            name = f"batch {batch}"
            segment[name] = partial(segment_images.segment, segmenter, todo, None, batch)
            scenes[name] = partial(evaluate, segmenter, dataset, Path(folder), batch)
        rates = {
            f"segment, {arguments.photos} photos": race(segment, arguments.photos),
            f"eval scenes, {arguments.scenes} scenes": race(scenes, arguments.scenes),
        }
    result = harness.provenance("cpu") | {"threads": torch.get_num_threads(), "throughput": rates}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

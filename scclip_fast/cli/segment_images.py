"""The work of `scclip-fast segment`: a mask, a picture and a report for each image."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..plots import fonts
from ..plots import segmentation as overlay
from ..plots.palette import palette
from ..ranks import Ranks
from ..scenes.draw import scene
from ..segment import ImageSegmenter
from ..segment.base import Band
from ..threads import Behind, ahead, batches
from . import files
from .files import Job
from .options import CommandError

#: The drawn scene that is segmented where no image is given: larger than a window.
EXAMPLE = ("benchmark", 21, (336, 448))


def segment(
    segmenter: ImageSegmenter,
    jobs: list[Job],
    font: Path | None = None,
    batch: int = 1,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
) -> int:
    """Writes the results of all jobs and returns how many images could not be read.

    While the model works, the next images are read, and results are drawn and written, in threads.

    Args:
        segmenter: the model with the classes.
        jobs: the images and their results.
        font: a file to draw the legends with; a name that it lacks characters for gets another
            font.
        batch: the number of images that are segmented together.
        ranks: the number of this process, of which the first alone shows a progress bar.
    """
    unknown = fonts.faces(segmenter.classes, font).count(None)
    if unknown and ranks.rank == 0:
        tqdm.write(
            f"no font has the characters of {unknown} class names; legends give their numbers; "
            "--font FILE chooses another font",
            file=sys.stderr,
        )
    failures = 0
    # None: only on a terminal.
    bar = tqdm(total=len(jobs), unit="image", disable=ranks.rank > 0 or None)
    with bar, Behind(2 * batch) as writers:
        for some in batches(ahead(_photo, jobs, 2 * batch), batch):
            read = {}  # photos by the place of their jobs
            for place, (_, photo) in enumerate(some):
                try:
                    read[place] = photo.result()
                except CommandError as error:
                    tqdm.write(str(error), file=sys.stderr)
                    failures += 1
            found = segmenter.bands(list(read.values()))
            for (place, photo), bands in zip(read.items(), found, strict=True):
                result = _result(segmenter, photo, bands, some[place][0])
                writers.call(_write, segmenter.classes, photo, result, some[place][0], font)
            bar.update(len(some))
    return failures


class _Result(NamedTuple):
    """The labels and other results that a segmenter finds in an image."""

    labels: np.ndarray  # (H, W), see `_labels`
    means: list[float]
    left_out: list[str]  # the classes that the preview of a SAM3 left out
    frozen: np.ndarray | None  # (H, W), the labels of the frozen model, for --compare
    outliers: np.ndarray | None  # of a SAM3's tokens


def _photo(job: Job) -> Image.Image:
    if job.path is not None:
        return files.read_photo(job.path)
    return Image.fromarray(scene(*EXAMPLE).image)


def _result(
    segmenter: ImageSegmenter, photo: Image.Image, bands: Iterable[Band], job: Job
) -> _Result:
    """Returns the result of a job from the bands of its image."""
    labels, means = _labels(bands, len(segmenter.classes))
    left_out, outliers = (getattr(segmenter, name, None) for name in ("left_out", "outliers"))
    frozen = None
    if "compare" in job.files:
        frozen, _ = _labels(segmenter.frozen().bands(photo), len(segmenter.classes))
    return _Result(labels, means, left_out or [], frozen, outliers)


def _write(
    names: list[str], photo: Image.Image, result: _Result, job: Job, font: Path | None
) -> None:
    """Draws and writes the results of a job."""
    labels = result.labels
    if "labels" in job.files:
        mask = Image.fromarray(labels)
        if labels.dtype == np.uint8:  # PNG has no palette for 16 bits
            mask.putpalette(palette()[: len(names)].tobytes())
        files.write(job.files["labels"], files.encode_png(mask, job.settings))
    if "overlay" in job.files:
        picture = overlay.draw(photo, labels, names, font)
        files.write(job.files["overlay"], files.encode_png(picture, job.settings))
    if "compare" in job.files:
        picture = overlay.compare(photo, result.outliers, result.frozen, labels, names, font)
        files.write(job.files["compare"], files.encode_png(picture, job.settings))
    if "json" in job.files:
        report = _report(names, labels, result.means, job)
        if result.left_out:
            report["left_out"] = result.left_out
        files.write(job.files["json"], files.encode_json(report))


def _labels(bands: Iterable[Band], count: int) -> tuple[np.ndarray, list[float]]:
    """Returns the class of each pixel (H, W), and the mean probability of each class.

    The classes are uint8, or uint16 if there are more than 256. The mean is over the pixels of the
    class, and NaN for a class without pixels.
    """
    dtype = np.uint8 if count <= len(palette()) else np.uint16
    labels, total = [], torch.zeros(2, count, dtype=torch.float64)  # probabilities, then pixels
    for band, probabilities in bands:
        largest = probabilities.gather(0, band[None]).double()
        total[0] += band.flatten().bincount(largest.flatten(), minlength=count).cpu()
        total[1] += band.flatten().bincount(minlength=count).cpu()
        labels.append(band.cpu().numpy().astype(dtype))
    return np.concatenate(labels), (total[0] / total[1]).tolist()


def _report(names: list[str], labels: np.ndarray, means: list[float], job: Job) -> dict:
    """Returns the contents of NAME.json; the mean probability of a class without pixels is None."""
    shares = (np.bincount(labels.ravel(), minlength=len(names)) / labels.size).tolist()
    return {
        "image": "example" if job.path is None else str(job.path),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "settings": job.settings,
        "classes": [
            {
                "index": index,
                "name": name,
                "share": share,
                "mean_probability": mean if share else None,
            }
            for index, (name, share, mean) in enumerate(zip(names, shares, means, strict=True))
        ],
    }

"""The work of `scclip-fast segment`: a mask, a picture and a report for each image."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..plots import fonts
from ..plots import segmentation as overlay
from ..plots.palette import palette
from ..scenes.draw import scene
from ..segment import ImageSegmenter
from . import files
from .files import Job
from .options import CommandError

EXAMPLE = ("benchmark", 18)  # the drawn scene that is segmented where no image is given


def segment(segmenter: ImageSegmenter, jobs: list[Job], font: Path | None = None) -> int:
    """Writes the results of all jobs and returns how many images could not be read.

    Args:
        segmenter: the model with the classes.
        jobs: the images and their results.
        font: a file to draw the legends with; a name that it lacks characters for gets another
            font.
    """
    unknown = fonts.faces(segmenter.classes, font).count(None)
    if unknown:
        tqdm.write(
            f"no font has the characters of {unknown} class names; legends give their numbers; "
            "--font FILE chooses another font",
            file=sys.stderr,
        )
    failures = 0
    for job in tqdm(jobs, unit="image", disable=None):  # None: only on a terminal
        try:
            photo = _photo(job.path)
        except CommandError as error:
            tqdm.write(str(error), file=sys.stderr)
            failures += 1
        else:
            _segment_one(segmenter, photo, job, font)
    return failures


def _photo(path: Path | None) -> Image.Image:
    if path is not None:
        return files.read_photo(path)
    return Image.fromarray(scene(*EXAMPLE).image)


def _segment_one(
    segmenter: ImageSegmenter, photo: Image.Image, job: Job, font: Path | None = None
) -> None:
    labels, means = _labels(segmenter, photo)
    left_out = getattr(segmenter, "left_out", [])  # a SAM3's alone
    if "labels" in job.files:
        mask = Image.fromarray(labels)
        if labels.dtype == np.uint8:  # PNG has no palette for 16 bits
            mask.putpalette(palette()[: len(segmenter.classes)].tobytes())
        files.write(job.files["labels"], files.encode_png(mask, job.settings))
    if "overlay" in job.files:
        picture = overlay.draw(photo, labels, segmenter.classes, font)
        files.write(job.files["overlay"], files.encode_png(picture, job.settings))
    if "compare" in job.files:  # a SAM3's alone
        outliers, names = segmenter.outliers, segmenter.classes
        frozen, _ = _labels(segmenter.frozen(), photo)
        picture = overlay.compare(photo, outliers, frozen, labels, names, font)
        files.write(job.files["compare"], files.encode_png(picture, job.settings))
    if "json" in job.files:
        report = _report(segmenter.classes, labels, means, job)
        if left_out:
            report["left_out"] = left_out
        files.write(job.files["json"], files.encode_json(report))


def _labels(segmenter: ImageSegmenter, photo: Image.Image) -> tuple[np.ndarray, list[float]]:
    """Returns the class of each pixel (H, W), and the mean probability of each class.

    The classes are uint8, or uint16 if there are more than 256. The mean is over the pixels of the
    class, and NaN for a class without pixels.
    """
    count = len(segmenter.classes)
    dtype = np.uint8 if count <= len(palette()) else np.uint16
    labels, total = [], torch.zeros(2, count, dtype=torch.float64)  # probabilities, then pixels
    for band, probabilities in segmenter.bands(photo):
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

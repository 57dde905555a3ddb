"""The work of `scclip-fast segment`: a mask, a picture and a report of each image."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..plots import fonts
from ..plots import segmentation as overlay
from ..scenes.draw import scene
from ..segment import Segmenter
from . import results
from .common import CommandError, read_photo
from .results import Job

EXAMPLE = ("benchmark", 18)  # the drawn scene that stands in where no image is given


def segment(segmenter: Segmenter, jobs: list[Job], font: Path | None = None) -> int:
    """Write the results of all jobs; returns how many images could not be read.

    Legends are drawn with a font file, as far as it has the characters of the names.
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
        return read_photo(path)
    return Image.fromarray(scene(*EXAMPLE).image)


def _segment_one(
    segmenter: Segmenter, photo: Image.Image, job: Job, font: Path | None = None
) -> None:
    labels, means = _labels(segmenter, photo)
    if "labels" in job.files:
        mask = Image.fromarray(labels)
        mask.putpalette(overlay.palette()[: len(segmenter.classes)].tobytes())
        results.write(job.files["labels"], results.encode_png(mask, job.settings))
    if "overlay" in job.files:
        picture = overlay.draw(photo, labels, segmenter.classes, font)
        results.write(job.files["overlay"], results.encode_png(picture, job.settings))
    if "compare" in job.files:
        before, _ = _labels(segmenter.frozen(), photo)
        names = segmenter.classes
        found = overlay.compare(photo, segmenter.outliers, before, labels, names, font)
        results.write(job.files["compare"], results.encode_png(found, job.settings))
    if "json" in job.files:
        report = _report(segmenter.classes, labels, means, job)
        results.write(job.files["json"], results.encode_json(report))


def _labels(segmenter: Segmenter, photo: Image.Image) -> tuple[np.ndarray, list[float]]:
    """The class of each pixel (H, W), uint8, and over the pixels of each its mean probability."""
    count = len(segmenter.classes)
    labels, total = [], torch.zeros(count, dtype=torch.float64)
    for band, probabilities in segmenter.bands(photo):
        own = probabilities.gather(0, band[None]).double()
        total += band.flatten().bincount(own.flatten(), minlength=count).cpu()
        labels.append(band.to(torch.uint8).cpu())
    mask = torch.cat(labels)
    return mask.numpy(), (total / mask.flatten().bincount(minlength=count)).tolist()


def _report(names: list[str], labels: np.ndarray, means: list[float], job: Job) -> dict:
    """What the JSON holds; a class that has no pixel has no mean probability."""
    shares = [(labels == index).mean().item() for index in range(len(names))]
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

"""Confusion matrices, and the numbers made of them.

Rows are labels, columns predictions. Everything is summed in whole numbers, so that neither the
order of images nor the number of processes can change a digit.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .datasets import IGNORED


def confusion_matrix(prediction: Tensor, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of pixels by label and prediction.

    Args:
        prediction: (H, W), class indices.
        labels: (H, W), class indices, or 255 where the pixel doesn't count.
        num_classes: C.

    Returns:
        (C, C), int64.

    Raises:
        ValueError: different shapes.
    """
    if tuple(prediction.shape) != labels.shape:
        raise ValueError(
            f"prediction and labels must have one shape, got {tuple(prediction.shape)} "
            f"and {labels.shape}"
        )
    return multiclass_confusion_matrix(
        prediction.cpu(),
        torch.from_numpy(labels.astype(np.int64)),
        num_classes,
        ignore_index=IGNORED,
        validate_args=False,  # sorts both maps; the data set has checked the labels
    ).numpy()


def areas(confusion: np.ndarray) -> np.ndarray:
    """(C, C) -> (3, C): a class's pixels hit, labelled and predicted."""
    return np.stack([np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)])


def iou(areas: np.ndarray) -> np.ndarray:
    """Intersection over union, (..., 3, C) -> (..., C).

    NaN for a class that no pixel was labelled or predicted as.
    """
    hit, labelled, predicted = np.moveaxis(areas, -2, 0)
    return _ratio(hit, labelled + predicted - hit)


def summary(areas: np.ndarray) -> dict:
    """The usual numbers from summed areas (3, C), each in [0, 1], as mmsegmentation defines them.

    Returns:
        "mIoU" and "mAcc", means over the classes that occur (in labels or predictions, for "mAcc"
        in labels); "aAcc", the share of right pixels; "IoU" and "Acc", lists a class. None where
        there is nothing to divide by.
    """
    hit, labelled, _ = areas
    classwise = {"IoU": iou(areas), "Acc": _ratio(hit, labelled)}
    numbers = {f"m{name}": _mean(values) for name, values in classwise.items()}
    numbers["aAcc"] = _mean(_ratio(hit.sum(keepdims=True), labelled.sum(keepdims=True)))
    return numbers | {name: [_mean(v) for v in values] for name, values in classwise.items()}


def confidence_interval(
    confusions: Iterable[np.ndarray], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """How far the mIoU would vary on other images: percentiles of a bootstrap over images.

    Args:
        confusions: (images, C, C), the confusion matrix of each image; an array, or one by one.
        level: the share of resamples inside the interval, in (0, 1).
        resamples: how many times as many images are drawn, with replacement.
        seed: of the draws.

    Returns:
        The lower and the upper end, in [0, 1]; NaN if no image has a pixel that counts.

    Raises:
        ValueError: no image, a level outside (0, 1), or no resamples.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be in (0, 1), resamples positive, got {level}, {resamples}")
    by_image = [areas(np.asarray(confusion)) for confusion in confusions]
    if not by_image:
        raise ValueError("there must be at least one confusion matrix")
    stacked = np.stack(by_image).astype(float)  # (images, 3, C); whole numbers far below 2^53
    resampled = bootstrap(stacked, resamples, seed)
    means = [mean for values in iou(resampled) if (mean := _mean(values)) is not None]
    if not means:
        return float("nan"), float("nan")
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def bootstrap(by_image: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over as many images, drawn with replacement: (images, ...) -> (resamples, ...).

    The same images for the same seed, so that differences of two methods are paired.
    """
    images = len(by_image)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    return (draws.astype(float) @ by_image.reshape(images, -1)).reshape(-1, *by_image.shape[1:])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where `whole` is 0."""
    return np.divide(part, whole, where=whole > 0, out=np.full(np.shape(whole), np.nan))


def _mean(values: np.ndarray | float) -> float | None:
    """Over those that are not NaN; None if all are."""
    present = np.ravel(values)
    present = present[~np.isnan(present)]
    return float(present.mean()) if present.size else None

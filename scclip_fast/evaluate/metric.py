"""Confusion matrices, and the numbers computed from them.

Rows are labels, columns predictions. All sums are of whole numbers, so neither the order of images
nor the number of processes changes a digit of the results.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

IGNORED = -1  # in the labels that torchmetrics takes


def confusion_matrix(prediction: Tensor, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by label and prediction.

    Args:
        prediction: (H, W), class indices.
        labels: (H, W), class indices; pixels with any other number do not count.
        num_classes: the number C of classes.

    Returns:
        (C, C), int64.

    Raises:
        ValueError: prediction and labels have different shapes.
    """
    if tuple(prediction.shape) != labels.shape:
        raise ValueError(
            f"prediction and labels must have one shape, got {tuple(prediction.shape)} "
            f"and {labels.shape}"
        )
    target = torch.from_numpy(labels.astype(np.int64))
    return multiclass_confusion_matrix(
        prediction.cpu(),
        target.masked_fill((target < 0) | (target >= num_classes), IGNORED),
        num_classes,
        ignore_index=IGNORED,
        validate_args=False,  # it would sort both maps, and the data set has checked the labels
    ).numpy()


def areas(confusion: np.ndarray) -> np.ndarray:
    """Returns the pixels (3, C) of each class that are hit, labelled and predicted."""
    return np.stack([np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)])


def iou(areas: np.ndarray) -> np.ndarray:
    """Returns the intersection over union (..., C) of areas (..., 3, C).

    A class that no pixel is labelled or predicted as has NaN.
    """
    hit, labelled, predicted = np.moveaxis(areas, -2, 0)
    return _ratio(hit, labelled + predicted - hit)


def summary(areas: np.ndarray) -> dict:
    """Computes mmsegmentation's numbers, each in [0, 1], from summed areas (3, C).

    Returns:
        "IoU" and "Acc": lists with a number for each class. "mIoU": the mean over classes that
        occur in labels or predictions. "mAcc": the mean over classes that occur in labels. "aAcc":
        the share of right pixels. A number whose divisor is 0 is None.
    """
    hit, labelled, _ = areas
    classwise = {"IoU": iou(areas), "Acc": _ratio(hit, labelled)}
    numbers = {f"m{name}": _mean(values) for name, values in classwise.items()}
    numbers["aAcc"] = _mean(_ratio(hit.sum(keepdims=True), labelled.sum(keepdims=True)))
    return numbers | {name: [_mean(v) for v in values] for name, values in classwise.items()}


def confidence_interval(
    confusions: Iterable[np.ndarray], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Estimates how much the mIoU varies with the images, by a bootstrap over images.

    Args:
        confusions: (images, C, C), the confusion matrix of each image; an array or an iterable.
        level: the share of resamples inside the interval, in (0, 1).
        resamples: the number of bootstrap samples, each of as many images as there are, drawn with
            replacement.
        seed: the seed of the draws.

    Returns:
        The lower and the upper end of the interval, percentiles of the samples' mIoU, in [0, 1];
        NaN if no image has a pixel that counts.

    Raises:
        ValueError: there is no image, the level is outside (0, 1), or resamples is below 1.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be in (0, 1), resamples positive, got {level}, {resamples}")
    by_image = [areas(np.asarray(confusion)) for confusion in confusions]
    if not by_image:
        raise ValueError("there must be at least one confusion matrix")
    means = _resampled_miou(np.stack(by_image), resamples, seed)
    means = means[~np.isnan(means)]
    if not means.size:
        return float("nan"), float("nan")
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def miou_difference(
    by_image: np.ndarray, others: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float | None, tuple[float | None, float | None]]:
    """Computes the mIoU of one method minus that of another on the same images.

    The interval is a paired bootstrap (Efron and Tibshirani, 1993): every resample draws the same
    images for both methods, so that what all methods find hard does not widen it.

    Args:
        by_image, others: (images, 3, C), the areas of each image by both methods, see `areas`.
        resamples, seed: as for `confidence_interval`.

    Returns:
        The difference, and the ends of its 95 % interval, in [-1, 1]; None where no pixel counts.
    """
    values = [_mean(iou(each.sum(axis=0))) for each in (by_image, others)]
    if None in values:
        return None, (None, None)
    first, second = (_resampled_miou(each, resamples, seed) for each in (by_image, others))
    lower, upper = np.nanquantile(first - second, [0.025, 0.975])
    return values[0] - values[1], (float(lower), float(upper))


def _resampled_miou(by_image: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns the mIoU (resamples,) of areas (images, 3, C) drawn anew; NaN without a pixel."""
    resampled = bootstrap(by_image.astype(float), resamples, seed)  # whole numbers far below 2^53
    means = [_mean(values) for values in iou(resampled)]
    return np.array([np.nan if mean is None else mean for mean in means])


def bootstrap(by_image: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums the values (images, ...) over images drawn with replacement: (resamples, ...).

    The same seed draws the same images, so that differences between two methods are paired.
    """
    images = len(by_image)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    return (draws.astype(float) @ by_image.reshape(images, -1)).reshape(-1, *by_image.shape[1:])


def _ratio(numerator: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """Divides; the result is NaN for a divisor of 0."""
    undefined = np.full(np.shape(divisor), np.nan)
    return np.divide(numerator, divisor, where=divisor > 0, out=undefined)


def _mean(values: np.ndarray | float) -> float | None:
    """Returns the mean of the values that are not NaN; None if all are NaN."""
    present = np.ravel(values)
    present = present[~np.isnan(present)]
    return float(present.mean()) if present.size else None

"""The pictures of a result, and their captions, for the page of `scclip-fast app`."""

from __future__ import annotations

from matplotlib.figure import Figure
from PIL import Image

from ..plots import segmentation
from ..plots.outliers import heat_map
from .explore import Result

_SIDE = 720  # pixels of a large picture's longer side, at least
_SMALL_SIDE = 240  # pixels of the longer side of a variant's pictures


def classes(result: Result) -> Image.Image:
    """Draws the segmentation by SC-CLIP, with its legend."""
    photo, labels = result.photo, result.variants[0].labels
    if (scale := _SIDE // max(photo.size)) > 1:  # the browser would blur the lines
        photo = photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC)
        labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    return segmentation.draw(photo, labels, result.names)


def outliers(result: Result) -> tuple[Figure | None, str]:
    """Draws the LOF scores with the outliers outlined; returns the figure and a sentence."""
    if result.scores is None:
        h, w = result.variants[0].colours.shape[:2]
        return None, f"There are no outliers: {h} × {w} patches are too few for so many neighbours."
    count, total = int(result.outliers.sum()), result.outliers.numel()
    sentence = f"{count:,} of {total:,} patches are outliers, outlined in cyan."
    return heat_map(result.scores, result.outliers), sentence


def variants(result: Result) -> list[tuple[Image.Image, str]]:
    """Draws the classes of each variant, then the features of each; returns them with captions."""
    by_class, by_feature = [], []
    for variant in result.variants:
        picture = segmentation.blend(result.photo, variant.labels)
        picture.thumbnail((_SMALL_SIDE, _SMALL_SIDE), Image.Resampling.LANCZOS)
        change = f"{segmentation.percent(variant.changed)} changed"
        if variant is result.variants[0]:
            change = "as set"
        by_class.append((picture, f"{variant.name}: classes, {change}"))
        colours = Image.fromarray(variant.colours)
        scale = max(1, _SMALL_SIDE // max(colours.size))  # the browser would blur the patches
        colours = colours.resize((scale * colours.width, scale * colours.height), 0)
        by_feature.append((colours, f"{variant.name}: features"))
    return by_class + by_feature

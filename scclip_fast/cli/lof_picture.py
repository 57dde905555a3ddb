"""The picture of `scclip-fast lof`: a row of panels for each size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from ..ops import repair
from .lof_demo import Comparison

_DPI = 120
_TITLES = (
    "Photo, as the model sees it",
    "Local Outlier Factor",
    "Features (PCA), outliers outlined",
    "Features after repair",
)


def draw(comparisons: list[Comparison], heading: str, path: Path) -> None:
    """Write a PNG with a row for each comparison: photo, LOF, features before and after repair.

    Raises:
        OSError: the file can't be written.
    """
    rows = len(comparisons)
    figure = Figure(figsize=(13.5, 0.75 + 3.2 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    figure.suptitle(heading, fontsize=15, fontweight="bold")
    axes = figure.subplots(rows, 4, squeeze=False)
    for title, top in zip(_TITLES, axes[0], strict=True):
        top.set_title(title, fontsize=12.5)
    for row, comparison in zip(axes, comparisons, strict=True):
        _draw_row(row, comparison)
    figure.savefig(path, format="png", dpi=_DPI)


def _draw_row(row: Iterable[Axes], comparison: Comparison) -> None:
    photo, scores, before, after = row
    mask = comparison.mask.cpu().unflatten(0, comparison.grid)
    colours_before, colours_after = _colours(comparison)
    photo.imshow(comparison.photo.numpy())
    size, outliers = comparison.size, int(mask.sum())
    label = f"{size} × {size} pixels\n{mask.numel():,} tokens, {outliers:,} outliers"
    photo.set_ylabel(label, fontsize=11.5, labelpad=10, linespacing=1.4)
    _draw_scores(scores, comparison.scores.cpu().unflatten(0, comparison.grid))
    before.imshow(colours_before, interpolation="nearest")
    before.add_collection(_outline(mask))
    after.imshow(colours_after, interpolation="nearest")
    for axes in row:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _draw_scores(axes: Axes, scores: Tensor) -> None:
    """scores (H, W), logarithmic as LOF is a ratio, from the 1st to the 99th percentile."""
    low, high = torch.quantile(scores[scores.isfinite()], torch.tensor([0.01, 0.99])).tolist()
    norm = LogNorm(low, max(high, low * 1.01), clip=True)
    image = axes.imshow(scores.numpy(), norm=norm, cmap="magma", interpolation="nearest")
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.035, 1)))
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _colours(comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components as RGB (H, W, 3), before and after repair.

    Components and colour range are those of the repaired features: with those of the raw ones, a
    few outliers would take all the contrast.
    """
    raw = comparison.tokens
    repaired = repair(raw, comparison.mask, comparison.grid)
    mean = repaired.mean(dim=0)
    centred = (repaired - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1).to(raw.dtype)
    axes = axes * axes.sum(dim=0).sign()  # eigh leaves the sign open
    images = [(features - mean) @ axes for features in (raw, repaired)]
    low, high = (images[1].quantile(share, dim=0) for share in (0.02, 0.98))
    return tuple(
        ((image - low) / (high - low)).clamp(0, 1).unflatten(0, comparison.grid).cpu().numpy()
        for image in images
    )


def _outline(mask: Tensor) -> LineCollection:
    """The borders between outliers and the rest, for a mask (H, W) drawn by imshow."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    lines = []
    for y, x in (padded[1:] != padded[:-1])[:, 1:-1].nonzero().tolist():
        lines.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in (padded[:, 1:] != padded[:, :-1])[1:-1].nonzero().tolist():
        lines.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    return LineCollection(lines, colors="black", linewidths=1.2)

"""The picture of `scclip-fast lof`: a row of panels for each size."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

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


def draw(comparisons: list[Comparison], heading: str, format: str) -> bytes:
    """A picture with a row a comparison: photo, LOF, features before and after repair.

    Args:
        comparisons: the rows.
        heading: a line above all.
        format: matplotlib's name of the file format, such as "png".
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
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=_DPI)
    return file.getvalue()


def _draw_row(row: Iterable[Axes], comparison: Comparison) -> None:
    photo, scores, before, after = row
    mask = comparison.mask.cpu().unflatten(0, comparison.grid)
    raw, grid = comparison.tokens, comparison.grid
    repaired = repair(raw, comparison.mask, grid)
    colours_before, colours_after = (
        colours.unflatten(0, grid).cpu().numpy()
        for colours in pca_colours([raw, repaired], repaired)
    )
    photo.imshow(comparison.photo.numpy())
    size, outliers = comparison.size, int(mask.sum())
    label = f"{size} × {size} pixels\n{mask.numel():,} tokens, {outliers:,} outliers"
    photo.set_ylabel(label, fontsize=11.5, labelpad=10, linespacing=1.4)
    draw_scores(scores, comparison.scores.cpu().unflatten(0, comparison.grid))
    before.imshow(colours_before, interpolation="nearest")
    before.add_collection(outline(mask))
    after.imshow(colours_after, interpolation="nearest")
    for axes in row:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def draw_scores(axes: Axes, scores: Tensor) -> None:
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


def pca_colours(features: Sequence[Tensor], basis: Tensor) -> list[Tensor]:
    """The first three principal components of features (N, D) each, as RGB (N, 3) in [0, 1].

    Components and colour range are those of `basis` (N, D): repaired features, as with those of raw
    ones a few outliers would take all the contrast.
    """
    mean = basis.mean(dim=0)
    centred = (basis - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1).to(basis.dtype)
    axes = axes * axes.sum(dim=0).sign()  # eigh leaves the sign open
    low, high = ((basis - mean) @ axes).quantile(torch.tensor([0.02, 0.98]).to(basis), dim=0)
    width = (high - low).clamp(min=torch.finfo(low.dtype).tiny)  # a plain picture has none
    return [(((tokens - mean) @ axes - low) / width).clamp(0, 1) for tokens in features]


def outline(mask: Tensor, color: str = "black") -> LineCollection:
    """The borders between outliers and the rest, for a mask (H, W) drawn by imshow."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    lines = []
    for y, x in (padded[1:] != padded[:-1])[:, 1:-1].nonzero().tolist():
        lines.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in (padded[:, 1:] != padded[:, :-1])[1:-1].nonzero().tolist():
        lines.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    return LineCollection(lines, colors=color, linewidths=1.2)

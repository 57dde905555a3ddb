"""Pictures of outlier patches: LOF scores as a heat map, and features before and after repair."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from ..ops import repair

_DPI = 120
_TITLES = (
    "Photo, as the model sees it",
    "Local Outlier Factor",
    "Features (PCA), outliers outlined",
    "Features after repair",
)


class PhotoOutliers(NamedTuple):
    """The patch tokens of a square photo, and their outliers. N = grid[0] * grid[1]."""

    photo: Tensor  # (size, size, 3) in [0, 1], as cropped for the model
    grid: tuple[int, int]
    tokens: Tensor  # (N, D)
    scores: Tensor  # (N,)
    mask: Tensor  # bool (N,), True for outliers


def draw(rows: list[PhotoOutliers], heading: str, format: str) -> bytes:
    """Draws a row for each photo: the photo, its scores, its features before and after repair.

    Args:
        rows: the photos with their outliers.
        heading: the title of the picture.
        format: matplotlib's name of the file format, such as "png".

    Returns:
        The file.
    """
    figure = Figure(figsize=(13.5, 0.75 + 3.2 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    figure.suptitle(heading, fontsize=15, fontweight="bold")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for title, top in zip(_TITLES, axes[0], strict=True):
        top.set_title(title, fontsize=12.5)
    for row_axes, row in zip(axes, rows, strict=True):
        _draw_row(row_axes, row)
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=_DPI)
    return file.getvalue()


def _draw_row(axes: Iterable[Axes], row: PhotoOutliers) -> None:
    photo, scores, before, after = axes
    mask = row.mask.cpu().unflatten(0, row.grid)
    repaired = repair(row.tokens, row.mask, row.grid)
    colours_before, colours_after = (
        colours.unflatten(0, row.grid).cpu().numpy()
        for colours in pca_colours([row.tokens, repaired], repaired)
    )
    photo.imshow(row.photo.numpy())
    size, count = len(row.photo), int(mask.sum())
    label = f"{size} × {size} pixels\n{mask.numel():,} tokens, {count:,} outliers"
    photo.set_ylabel(label, fontsize=11.5, labelpad=10, linespacing=1.4)
    draw_scores(scores, row.scores.cpu().unflatten(0, row.grid))
    before.imshow(colours_before, interpolation="nearest")
    before.add_collection(outline(mask))
    after.imshow(colours_after, interpolation="nearest")
    for panel in axes:
        _hide_frame(panel)


def heat_map(scores: Tensor, mask: Tensor) -> Figure:
    """Draws LOF scores (h, w) with a colour bar, and outlines the outliers (h, w) in cyan."""
    h, w = scores.shape
    size = 4.8 / max(h, w)  # inches a patch
    figure = Figure(figsize=(1.2 * w * size, h * size), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    axes = figure.subplots()
    draw_scores(axes, scores)
    axes.add_collection(outline(mask, "cyan"))
    _hide_frame(axes)
    return figure


def _hide_frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_scores(axes: Axes, scores: Tensor) -> None:
    """Draws scores (h, w) and a colour bar, from the 1st to the 99th percentile.

    The colours are logarithmic, because LOF is a ratio.
    """
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
    """Returns the first three principal components of each features (N, D), as RGB in [0, 1].

    Components and range of colours come from `basis` (N, D). Repaired features are a good basis:
    with raw ones, a few outliers take all the contrast.
    """
    mean = basis.mean(dim=0)
    centred = (basis - mean).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1).to(basis.dtype)
    axes = axes * axes.sum(dim=0).sign()  # eigh does not fix the sign
    low, high = ((basis - mean) @ axes).quantile(torch.tensor([0.02, 0.98]).to(basis), dim=0)
    width = (high - low).clamp(min=torch.finfo(low.dtype).tiny)  # 0 where all features are equal
    return [(((tokens - mean) @ axes - low) / width).clamp(0, 1) for tokens in features]


def outline(mask: Tensor, color: str = "black") -> LineCollection:
    """Returns the borders of the outliers in a mask (h, w), in the coordinates of imshow."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    lines = []
    for y, x in (padded[1:] != padded[:-1])[:, 1:-1].nonzero().tolist():
        lines.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in (padded[:, 1:] != padded[:, :-1])[1:-1].nonzero().tolist():
        lines.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    return LineCollection(lines, colors=color, linewidths=1.2)

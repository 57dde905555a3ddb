"""The best of many maps at each pixel of a larger image, in bands of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiles
from .tiles import compute_dtype, spans

#: Tensors of a band that a step holds at a time: the two factors of the columns and of the rows.
COPIES = 4
#: Rows of a band where all classes do not fit it. Neighbouring rows share the widened rows of maps:
#: 151 maps to 6000 x 400 pixels take 1.05 s in bands of 16 rows, and 1.36 s in bands of all classes
#: (6 rows; one core).
BAND_ROWS = 16


def upsampled_labels(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`reference.upsampled_labels` of maps (B, C, h, w), with labels in `label_dtype`."""
    batch, classes, source, _ = maps.shape
    height, width = size
    labels = maps.new_zeros((batch, height, width), dtype=label_dtype(classes))
    values = maps.new_full(labels.shape, -torch.inf, dtype=compute_dtype(maps))
    # The rows of maps that a row of pixels needs are widened too.
    row_bytes = COPIES * values.itemsize * max(width, maps.shape[3]) * (1 + -(-source // height))
    most = tiles.WORKSPACE_BYTES // 2
    band = max(1, min(BAND_ROWS, height, most // row_bytes))
    some_classes = max(1, min(classes, most // (row_bytes * band)))
    for image in range(batch):
        for rows in spans(height, band):
            for chosen in spans(classes, some_classes):
                scores = upsampled_rows(maps[image, chosen], size, rows)
                best, label = scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf).max(dim=0)
                better = best > values[image, rows]
                label = (label + chosen.start).to(labels.dtype)
                labels[image, rows] = torch.where(better, label, labels[image, rows])
                values[image, rows] = torch.where(better, best, values[image, rows])
    return labels, values


def label_dtype(classes: int) -> torch.dtype:
    """Returns the first of uint8, int16 and int32 that holds the labels 0 to classes - 1."""
    # torch computes nothing with uint16: no comparison, no indexing, no masked_fill.
    if classes <= 2**8:
        return torch.uint8
    return torch.int16 if classes <= 2**15 else torch.int32


def upsampled_rows(
    maps: Tensor, size: tuple[int, int], rows: slice, *, first: int = 0, source: int | None = None
) -> Tensor:
    """Returns some rows (C, n, W) of maps (C, h, w) that are upsampled bilinearly to a size (H, W).

    The result is a new tensor, in float32 at least. The columns are computed first, and of the few
    rows that the band needs alone.

    Args:
        maps: the maps, or those of their rows that `needed_rows` lists.
        size: (H, W), where H or W may also be smaller than that of the maps.
        rows: the rows of the result, out of H.
        first: the number of the first row of `maps`, if these are not all.
        source: h, if `maps` are not all rows.
    """
    source, dtype = source or maps.shape[1], compute_dtype(maps)
    needed = needed_rows(source, size[0], rows)
    maps = maps[:, needed.start - first : needed.stop - first].to(dtype)
    if maps.shape[2] != size[1]:
        columns = sources(maps.shape[2], size[1], slice(0, size[1]), dtype, maps.device)
        maps = _between(maps, 2, *columns)
    low, high, share = sources(source, size[0], rows, dtype, maps.device)
    return _between(maps, 1, low - needed.start, high - needed.start, share[:, None])


def needed_rows(source: int, target: int, rows: slice) -> slice:
    """Returns the rows out of `source` that some rows out of `target` lie between.

    The limits are those of exact positions and one more row on either side, because `sources`
    rounds positions.
    """
    first, last = (
        ((2 * row + 1) * source - target) // (2 * target) for row in (rows.start, rows.stop - 1)
    )
    return slice(min(max(first - 1, 0), source - 1), min(last + 3, source))


def sources(
    source: int, target: int, some: slice, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two pixels out of `source` between which each of some out of `target` lies.

    The third result is the weight of the second pixel. The rule, its dtype and the order of its
    roundings are those of `torch.nn.functional.interpolate` with align_corners=False.
    """
    # One rounding to dtype, as of a fused multiply-add: so do torch's compiled loops.
    exact = tiles.longest_dtype(device)
    pixels = torch.arange(some.start, some.stop, dtype=exact, device=device) + 0.5
    scale = torch.tensor(source / target, dtype=dtype).item()
    position = (pixels * scale - 0.5).to(dtype).clamp_(min=0)
    low = position.long().clamp_(max=source - 1)
    # At the same size no pixel enters another one, not even with a weight of 0, which keeps NaN.
    high = low if source == target else (low + 1).clamp_(max=source - 1)
    return low, high, (position - low).clamp_(max=1)


def _between(maps: Tensor, dim: int, low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """Returns a new tensor of weighted means of the slices `low` and `high` along a dimension."""
    mean = _taken(maps, dim, low).mul_(1 - share)
    return mean.add_(_taken(maps, dim, high).mul_(share))


def _taken(maps: Tensor, dim: int, index: Tensor) -> Tensor:
    """Returns the slices of maps (C, h, w) at the indices along dimension 1 or 2."""
    if dim == 1:
        return maps.index_select(1, index)
    # Along the last dimension `gather` takes a third of the time of `index_select` on a CPU.
    return maps.gather(2, index.expand(maps.shape[0], maps.shape[1], -1))

"""Labels of pixels from maps of classes at a smaller size."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import chunked, reference
from ..backend import NAMESPACE, operands, resolve
from . import _check


@torch.library.custom_op(f"{NAMESPACE}::upsampled_labels", mutates_args=())
def _upsampled_labels(maps: Tensor, height: int, width: int, backend: str) -> tuple[Tensor, Tensor]:
    """`reference.upsampled_labels` of maps (B, C, h, w), with labels in the least dtype."""
    size = (height, width)
    if backend == "triton":
        from ..kernels.upsample import upsampled_labels_triton

        return upsampled_labels_triton(maps, size, chunked.label_dtype(maps.shape[1]))
    if backend == "torch":
        return chunked.upsampled_labels(maps, size)
    labels, values = reference.upsampled_labels(maps, size)
    return labels.to(chunked.label_dtype(maps.shape[1])), values


@_upsampled_labels.register_fake
def _(maps: Tensor, height: int, width: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (maps.shape[0], height, width)
    labels = maps.new_empty(shape, dtype=chunked.label_dtype(maps.shape[1]))
    return labels, maps.new_empty(shape, dtype=chunked.compute_dtype(maps))


def upsampled_labels(
    maps: Tensor, size: tuple[int, int], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the best class of each pixel, without a tensor of all classes at the pixels' size.

    The maps are interpolated bilinearly to `size`, as by `torch.nn.functional.interpolate` with
    `align_corners=False` and without antialiasing, and each pixel gets the class with the largest
    value. The first of equal classes wins. NaN counts as -inf and never wins: a pixel with nothing
    but NaN has label 0 and the value -inf. A NaN or an infinity of the maps reaches the same pixels
    as in `interpolate`, also with a weight of 0, which makes an infinity NaN.

    The results are constants for autograd. Factors of classes belong into the small maps:
    `maps * factors[:, None, None]`.

    Args:
        maps: (C, h, w) or (B, C, h, w), floating, any strides: scores of C classes.
        size: (H, W) in pixels, larger or smaller than (h, w).
        backend: "triton", "torch", "reference" or None for the default (see `scclip_fast.backend`).

    Returns:
        labels: (H, W) or (B, H, W); uint8 up to 256 classes, int16 up to 32768, int32 beyond.
        values: the value of this class, of the same shape; float32, or float64 for float64 maps.

    Raises:
        TypeError: maps is not floating.
        ValueError: maps has another shape or is empty beyond its batch, size is not two integers of
            at least 1, a backend that cannot run.
    """
    _check.floating("maps", maps)
    batch = _check.batched("maps", maps, "B, C, h, w").detach()
    height, width = _check_size(size)
    resolved = resolve(backend, maps)
    (batch,) = operands(resolved, batch)
    labels, values = _upsampled_labels(batch, height, width, resolved)
    values = values.to(chunked.compute_dtype(maps))
    return (labels, values) if maps.dim() == 4 else (labels[0], values[0])


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size (H, W) in pixels, or raises ValueError."""
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f"size must be (H, W) in pixels, got {size!r}") from None
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (Integral, torch.SymInt)) or side < 1:
            raise ValueError(f"size must be two integers (H, W) of at least 1, got {size!r}")
    return height, width

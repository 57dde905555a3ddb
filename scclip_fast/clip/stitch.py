"""OV-Stitcher (arXiv 2604.08110): the tokens of the windows of an image on one grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Corner = tuple[int, int]


class Stitch:
    """Averages the tokens of windows on the patch grid of their image.

    OV-Stitcher (Moon et al., CVPR 2026 Findings) encodes each window alone up to the last block,
    whose queries, keys and values it then averages where windows overlap, so that the block attends
    to the whole image. The first patch of a window lies at its corner divided by the side of a
    patch, rounded down. Other tokens than those of patches are left out.

    Args:
        corners: the row and column, in pixels, of the first pixel of each window.
        size: (H, W) of all windows, in pixels.
        grid: (h, w) of all windows, in patches.
        device: that of the tokens.

    Attributes:
        grid: (h, w) of the image, in patches.

    Raises:
        ValueError: corners are no pairs of integers of at least 0, or a patch lies in no window.
    """

    def __init__(
        self,
        corners: Sequence[Corner],
        size: tuple[int, int],
        grid: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._window = grid
        self._places = [_place(corner, size, grid) for corner in corners]
        height, width = (max(place[axis].stop for place in self._places) for axis in (0, 1))
        self.grid = height, width
        counts = torch.zeros(height, width, 1)
        for place in self._places:
            counts[place] += 1
        if not counts.all():
            row, column, _ = (counts == 0).nonzero()[0].tolist()
            raise ValueError(
                f"corners must be those of windows that cover the image, but its patch "
                f"({row}, {column}) lies in none"
            )
        self._counts = counts.to(device, non_blocking=True)  # once, and without a wait for a GPU

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns patches (1, ..., h w, D) of the image for tokens (W, ..., P + n, D) of windows.

        The sums are in float32 at least, one window after the other, so that two runs agree in
        every bit.
        """
        patches = tokens[..., -self._window[0] * self._window[1] :, :].unflatten(-2, self._window)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        sums = patches.new_zeros(*patches.shape[1:-3], *self.grid, patches.shape[-1], dtype=dtype)
        for (rows, columns), window in zip(self._places, patches, strict=True):
            sums[..., rows, columns, :] += window
        means = sums / self._counts.to(dtype)
        return means.to(tokens.dtype).flatten(-3, -2)[None]


def _place(corner: Corner, size: tuple[int, int], grid: tuple[int, int]) -> tuple[slice, slice]:
    """Returns the rows and columns of the image's grid that a window fills."""
    if len(corner) != 2 or not all(isinstance(pixel, int) and pixel >= 0 for pixel in corner):
        raise ValueError(f"corners must be pairs of integers of at least 0, got {corner!r}")
    row, column = (
        pixel * patches // pixels for pixel, patches, pixels in zip(corner, grid, size, strict=True)
    )
    return slice(row, row + grid[0]), slice(column, column + grid[1])

"""Tiles of a symmetric matrix of products y y^T, each computed once, on a CPU.

One triangle of the matrix is computed and the other copied. On one core that takes 1/1.1 (196
tokens of 768 channels) to 1/1.4 (2304 of 1024) of the time of the whole.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from . import tiles
from .tiles import Scratch, spans

ROWS = 128  # rows of one product
#: The least number of products of a tile on the diagonal. On one core 196 tokens take 0.39 ms in
#: three products, 0.51 ms in two and 0.57 ms in one.
STRIPS = 3


def tile_pairs(tokens: int, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """The tiles (rows, columns) of the upper triangle. Those of the diagonal have equal slices.

    A tile takes at most 7/16 of the workspace, 28 MiB: `lof_scores` of 5184 tokens takes 0.40 s so,
    and 0.42 s in tiles of 8 MiB.
    """
    side = max(1, math.isqrt(tiles.WORKSPACE_BYTES * 7 // 16 // dtype.itemsize))
    side = -(-tokens // -(-tokens // side))  # tiles of nearly equal sizes
    return list(combinations_with_replacement(spans(tokens, side), 2))


def images_per_step(tokens: int, width: int, dtype: torch.dtype) -> int:
    """The number of images whose tokens, and whose tiles, fit a sixth of the workspace, 10.7 MiB.

    The calls of a step take half a millisecond, and larger steps gain nothing more.
    """
    row_bytes = max(1, tokens, width) * dtype.itemsize
    return max(1, tiles.WORKSPACE_BYTES // 6 // (tokens * row_bytes))


def gram(
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    scratch: Scratch,
    squares: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Writes the products of rows (b, r, D) and columns (b, c, D) to out (b, r, c).

    Args:
        columns: the same tensor as rows for a tile of the diagonal.
        out: of the dtype of the products, or shorter.
        scratch: memory for a part of the products.
        squares: the squared norms (b, r) of the rows and (b, c) of the columns, to write squared
            distances in place of products.
    """
    on_diagonal, n_rows = columns is rows, rows.shape[1]
    for part in spans(n_rows, min(ROWS, -(-n_rows // STRIPS))):
        first = part.start if on_diagonal else 0
        left, right = rows[:, part], columns[:, first:].mT
        # A tensor of their own: torch multiplies the images of a batch one by one, and each on all
        # threads, if it writes to a part of another tensor.
        strip = scratch.take("strip", (*left.shape[:2], right.shape[2]), rows.dtype)
        if squares is None:
            out[:, part, first:] = torch.bmm(left, right, out=strip)
        else:
            torch.baddbmm(squares[1][:, None, first:], left, right, alpha=-2, out=strip)
            torch.add(strip, squares[0][:, part, None], out=out[:, part, first:])
        if on_diagonal and part.stop < n_rows:
            out[:, part.stop :, part] = out[:, part, part.stop :].mT
    return out

"""Tiles of a symmetric matrix of products y y^T, each computed once, on a CPU.

One triangle of the matrix is computed and the other copied. On one core that takes 1/1.2 (196
tokens of 768 channels) to 1/1.6 (2304) of the time of the whole.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from . import tiles
from .tiles import spans

ROWS = 128  # rows of one product; 64 are as fast


def tile_pairs(tokens: int, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """The tiles (rows, columns) of the upper triangle. Those of the diagonal have equal slices.

    A tile takes at most 7/16 of the workspace, 28 MiB: `topk` of 34 numbers is slower on less than
    34 * 64 columns.
    """
    side = max(1, math.isqrt(tiles.WORKSPACE_BYTES * 7 // 16 // dtype.itemsize))
    side = -(-tokens // -(-tokens // side))  # tiles of nearly equal sizes
    return list(combinations_with_replacement(spans(tokens, side), 2))


def images_per_step(tokens: int, width: int) -> int:
    """The number of images whose tokens and tiles, in float32, fit an eighth of the workspace."""
    return max(1, tiles.WORKSPACE_BYTES // 8 // (tokens * max(1, tokens, width) * 4))


def gram(rows: Tensor, columns: Tensor, out: Tensor, depth: int | None = None) -> Tensor:
    """Writes the products of rows (b, r, D) and columns (b, c, D) to out (b, r, c).

    Args:
        columns: the same tensor as rows for a tile of the diagonal.
        depth: channels of one product; the products of all channels are added up.
    """
    for part in spans(rows.shape[1], ROWS):
        first = part.start if columns is rows else 0
        strip = out[:, part, first:]
        for channels in spans(rows.shape[-1], depth or rows.shape[-1]):
            operands = rows[:, part, channels], columns[:, first:, channels].mT
            if channels.start == 0:
                torch.bmm(*operands, out=strip)
            else:
                # A matrix library that adds to `strip` itself may round once a channel.
                strip += torch.bmm(*operands)
        if columns is rows and part.stop < rows.shape[1]:
            out[:, part.stop :, part] = out[:, part, part.stop :].mT
    return out


def roundings(width: int, depth: int) -> int:
    """The number of roundings in a sum over `width` channels, `depth` of them at a time."""
    return min(width, depth) + (-(-width // depth) - 1)

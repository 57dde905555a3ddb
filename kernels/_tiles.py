"""The tile that a program of a matrix product takes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_below_diagonal(pid):
    """Returns row and column of the pid-th tile of a lower triangle, row by row."""
    row = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)  # the root is rounded
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    return row, pid - row * (row + 1) // 2


@triton.jit
def grouped_tile(pid, down, across, GROUP: tl.constexpr):
    """Returns row and column of the pid-th tile, GROUP rows at a time, so that they stay cached."""
    top = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - top, GROUP)
    return top + pid % (GROUP * across) % height, pid % (GROUP * across) // height

"""The panel: c of every row and column in half precision, for sets with few columns.

    p_ij = fp16(max(c_ij, 0)),   c_ij = a_i^2 + a_j^2 - 2 y_i y_j        y and a of `rounding.py`

-> panel (B, R, padded N) float16, +inf for columns without a usable token and from 65520 on.

c is that of `bins.py`, from the same product, and `select.py` adds the rounding to fp16 to the
bounds. The scale of `rounding.py` makes c of typical tokens D / 1300, within a factor of 2: 0.3 to
1.2 at 768 channels. fp16 has all its digits from 6e-5 on, and up to 2000 channels it holds c of
tokens that are 200 times as far from the centre as usual.

A search within one set leaves out the diagonal, which is +inf, and computes only the tiles on and
below it. It stores each of these twice, the second time transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import Launch
from .._tiles import grouped_tile, tile_below_diagonal
from .table import Rounded

BLOCK_D = 64  # channels of a step


@triton.jit(do_not_specialize=["first", "tiles"])
def _panel_kernel(
    # tensors
    rows_desc,
    cols_desc,
    row_a2_ptr,
    col_a2_ptr,
    panel_ptr,
    # sizes
    first,
    rows_per_image,
    padded_m,
    padded_n,
    padded_d,
    tiles,
    EXCLUDE_SELF: tl.constexpr,
    # tile
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    image = pid // tiles
    if EXCLUDE_SELF:
        i, j = tile_below_diagonal(pid % tiles)
    else:
        i, j = grouped_tile(pid % tiles, rows_per_image // TILE, padded_n // TILE, GROUP)
    local = i * TILE + tl.arange(0, TILE)
    cols = j * TILE + tl.arange(0, TILE)
    rows_above = image * padded_m + first  # positions before the rows of the pass
    cols_above = image * padded_n
    dot = tl.zeros([TILE, TILE], tl.float32)
    for d in range(0, padded_d, BLOCK_D):
        left = rows_desc.load([rows_above + i * TILE, d])
        dot = tl.dot(left, cols_desc.load([cols_above + j * TILE, d]).T, dot)
    row_a2 = tl.load(row_a2_ptr + rows_above + local)
    col_a2 = tl.load(col_a2_ptr + cols_above + cols)
    c = (row_a2[:, None] + col_a2[None, :]) - 2.0 * dot
    if EXCLUDE_SELF:
        c = tl.where(local[:, None] == cols[None, :], float("inf"), c)
    p = tl.maximum(c, 0.0).to(tl.float16)
    panel_ptr += (image * rows_per_image).to(tl.int64) * padded_n
    tl.store(panel_ptr + local.to(tl.int64)[:, None] * padded_n + cols[None, :], p)
    if EXCLUDE_SELF:
        if i != j:
            transposed = cols.to(tl.int64)[:, None] * padded_n + local[None, :]
            tl.store(panel_ptr + transposed, tl.trans(p))


def panel_launch(
    rows: Rounded,
    columns: Rounded,
    exclude_self: bool,
    panel: torch.Tensor,
    first: int,
    tile: int,
) -> Launch:
    """Fills panel (B, R, padded N) of the rows at first, ..., first + R - 1 of each image.

    A search within one set takes all rows of an image at once.
    """
    batch, rows_per_image, padded_n = panel.shape
    padded_d = columns.padded_d
    down, across = rows_per_image // tile, padded_n // tile
    assert rows_per_image % tile == padded_n % tile == first % tile == 0
    assert panel.is_contiguous() and padded_n == columns.padded_n and rows.padded_d == padded_d
    assert first + rows_per_image <= rows.padded_n
    assert not exclude_self or rows_per_image == rows.padded_n == padded_n
    tiles = across * (across + 1) // 2 if exclude_self else down * across
    flat_rows, flat_columns = rows.y.view(-1, padded_d), columns.y.view(-1, padded_d)
    return Launch(
        _panel_kernel,
        batch * tiles,
        rows_desc=TensorDescriptor.from_tensor(flat_rows, [tile, BLOCK_D]),
        cols_desc=TensorDescriptor.from_tensor(flat_columns, [tile, BLOCK_D]),
        row_a2_ptr=rows.a2,
        col_a2_ptr=columns.a2,
        panel_ptr=panel,
        first=first,
        rows_per_image=rows_per_image,
        padded_m=rows.padded_n,
        padded_n=padded_n,
        padded_d=padded_d,
        tiles=tiles,
        EXCLUDE_SELF=exclude_self,
        TILE=tile,
        BLOCK_D=BLOCK_D,
        GROUP=8,
        num_warps=8,
        num_stages=3,
    )

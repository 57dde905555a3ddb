"""The last step of a search: measures the candidates that are not sure, and orders all.

    d2(i, j) = sum (q_i - x_j)^2        exactly 0 for duplicates

rows q (B, M, D), columns x (B, N, D) and the table (B, R, 64) int32 of `select.py`, or of
`certify.py` and `collect.py` -> indices (B, M, k) int64 and squared distances (B, M, k or 1)
float32, by token. Rows with an empty table are left as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, cdiv, power_of_two, strides
from .search import NO_PAIR, distance_bits, infinities_to_nan
from .table import NO_COLUMN, ROWS, SURE, token_at


@triton.jit(do_not_specialize=["M", "K", "first"])
def _settle_kernel(
    # tensors
    q_ptr,
    x_ptr,
    table_ptr,
    indices_ptr,
    distances_ptr,
    # sizes
    M,
    D,
    K,
    first,
    rows_per_image,
    # strides
    stride_qb,
    stride_qm,
    stride_qd,
    stride_xb,
    stride_xn,
    stride_xd,
    ALL: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows_per_image, BLOCK_R)
    image = (pid // blocks).to(tl.int64)
    local = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = token_at(first + local)
    inside = (local < rows_per_image) & (token < M)
    x_ptr += image * stride_xb
    row_ptrs = q_ptr + image * stride_qb + token.to(tl.int64)[:, None] * stride_qm  # [BLOCK_R, 1]
    table_ptr += (image * rows_per_image + local)[:, None] * BLOCK_C
    entry = tl.load(
        table_ptr + tl.arange(0, BLOCK_C)[None, :], mask=inside[:, None], other=NO_COLUMN
    )
    exists = entry >= 0  # [BLOCK_R, BLOCK_C]
    measured = exists & (ALL | ((entry & SURE) == 0))  # these stand first in a row
    most = tl.max(tl.sum(measured.to(tl.int32), axis=1), axis=0)
    # Columns that are not measured rank before those that are, as they are neighbours for certain.
    bits = tl.full([BLOCK_R, BLOCK_C // CHUNK, CHUNK], -1, tl.int32)
    for chunk in range(0, tl.cdiv(most, CHUNK)):
        places = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        some = tl.load(table_ptr + places, mask=inside[:, None], other=NO_COLUMN)
        some_measured = (some >= 0) & (ALL | ((some & SURE) == 0))  # [BLOCK_R, CHUNK]
        column = tl.where(some_measured, some & (SURE - 1), 0)
        column_ptrs = x_ptr + column.to(tl.int64)[:, :, None] * stride_xn
        total = tl.zeros([BLOCK_R, CHUNK, BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            row_offsets = dims.to(tl.int64)[None, :] * stride_qd
            column_offsets = dims.to(tl.int64)[None, None, :] * stride_xd
            has_dim = dims < D
            qi = tl.load(
                row_ptrs + row_offsets, mask=inside[:, None] & has_dim[None, :], other=0.0
            )  # [BLOCK_R, BLOCK_D]
            xj = tl.load(
                column_ptrs + column_offsets,
                mask=some_measured[:, :, None] & has_dim[None, None, :],
                other=0.0,
            )  # [BLOCK_R, CHUNK, BLOCK_D]
            difference = infinities_to_nan(qi)[:, None, :] - infinities_to_nan(xj)
            total += difference * difference
        some_bits = tl.where(some_measured, distance_bits(tl.sum(total, axis=2)), -1)
        here = tl.arange(0, BLOCK_C // CHUNK)[None, :, None] == chunk
        bits = tl.where(here, some_bits[:, None, :], bits)

    bits = tl.reshape(bits, [BLOCK_R, BLOCK_C])
    column = tl.where(exists, entry & (SURE - 1), 0)
    key = (bits.to(tl.int64) << 32) | column.to(tl.int64)
    key = tl.where(exists, key, NO_PAIR)
    place = tl.sum((key[:, :, None] > key[:, None, :]).to(tl.int32), axis=2)
    out = (image * M + token)[:, None]
    chosen = exists & (place < K)
    tl.store(indices_ptr + out * K + place, column.to(tl.int64), mask=chosen)
    distance = bits.to(tl.float32, bitcast=True)
    if ALL:
        tl.store(distances_ptr + out * K + place, distance, mask=chosen)
    else:
        tl.store(distances_ptr + out + place * 0, distance, mask=chosen & (place == K - 1))


def settle_launch(
    rows: torch.Tensor,
    columns: torch.Tensor,
    table: torch.Tensor,
    indices: torch.Tensor,
    distances: torch.Tensor,
    first: int,
) -> Launch:
    """Fills indices (B, M, k) and distances (B, M, k or 1) from a table of rows from `first` on."""
    batch, rows_per_image, width = table.shape
    _, m, d = rows.shape
    assert indices.is_contiguous() and distances.is_contiguous()
    return Launch(
        _settle_kernel,
        batch * cdiv(rows_per_image, ROWS),
        q_ptr=rows,
        x_ptr=columns,
        table_ptr=table,
        indices_ptr=indices,
        distances_ptr=distances,
        M=m,
        D=d,
        K=indices.shape[-1],
        first=first,
        rows_per_image=rows_per_image,
        **strides("q", rows, "bmd"),
        **strides("x", columns, "bnd"),
        ALL=distances.shape[-1] == indices.shape[-1],
        BLOCK_R=ROWS,
        BLOCK_C=width,
        BLOCK_D=power_of_two(d, 16, 128),
        CHUNK=8,
        num_warps=1,
    )

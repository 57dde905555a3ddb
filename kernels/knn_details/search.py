"""The nearest neighbours by measured distances, which never leave the chip.

    indices(i) = the k columns j with the smallest (d2(i, j), j), in that order
    d2(i, j)   = sum (q_i - x_j)^2 in float32, +inf where the sum overflows, NaN where q_i or x_j
                 holds a NaN or an infinity; finite < +inf < NaN

rows q (B, M, D) and columns x (B, N, D), any strides -> indices (B, M, k) int64 and squared
distances (B, M, k or 1) float32. A search within one set passes x as q too and leaves out j = i.
The matrix of distances would be M N floats, 27.5 GB at M = N = 82,944.

`search` measures every distance that it compares. Sums of squared differences need no centre and
lose no digits to large norms, so the result needs no certificate: any two distances in the wrong
order tie within their own float32 rounding. A channel of a pair takes two operations, without
tensor cores.

A distance and its column make one 64-bit key, so that the lower column wins a tie. In each tile,
the nearest remaining column of every row replaces the worst of its k best until no row gains: after
c columns a tile brings about k BLOCK_N / c (the selection of FlashLib's insert kernel, here on
keys). Several programs share the columns of a block of rows, and `merge.py` joins their lists.

All rows are searched, or those of a list that is counted on the device (`table.Searched`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, architecture, cdiv, power_of_two, strides
from .table import LARGEST_FLOAT, Searched, programs_for_lists, shares_of

MAX_K = 128
# Rows of a program, and the columns times channels of a step: 64 registers a thread of four warps.
# The interpreter's time goes by the number of operations, not by their size.
BLOCK_M, PAIRS = (64, 4096) if triton.knobs.runtime.interpret else (8, 1024)
MOST_SHARES = 32  # programs that share the columns of one block of rows
NO_PAIR: tl.constexpr = tl.constexpr(2**63 - 1)  # a key without a column
NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)  # one NaN, above the bits of every number


@triton.jit
def infinities_to_nan(x):
    """Returns x in float32 with NaN for infinities, so that all distances of its token are NaN.

    A difference of +-inf would not do: that of finite numbers may overflow to it.
    """
    x = x.to(tl.float32)
    return tl.where(tl.abs(x) <= LARGEST_FLOAT, x, float("nan"))


@triton.jit
def distance_bits(distance):
    """Returns the bits of squared distances, int32 in the same order; NaN comes last."""
    return tl.where(distance == distance, distance.to(tl.int32, bitcast=True), NAN_BITS)


@triton.jit
def keep_nearest(best, key):
    """Returns the K smallest keys of best [R, K] and key [R, C] row by row, in any order."""
    nearest = tl.min(key, axis=1)
    worst = tl.max(best, axis=1)
    while tl.max((nearest < worst).to(tl.int32), axis=0) > 0:
        best = tl.where(
            (nearest < worst)[:, None] & (best == worst[:, None]), nearest[:, None], best
        )
        key = tl.where(key == nearest[:, None], NO_PAIR, key)
        nearest = tl.min(key, axis=1)
        worst = tl.max(best, axis=1)
    return best


@triton.jit(do_not_specialize=["M", "N", "K", "programs"])
def _search_kernel(
    # tensors
    q_ptr,
    x_ptr,
    tokens_ptr,
    n_tokens_ptr,
    keys_ptr,
    # sizes
    M,
    N,
    D,
    K,
    rows_per_image,
    programs,
    # strides
    stride_qb,
    stride_qm,
    stride_qd,
    stride_xb,
    stride_xn,
    stride_xd,
    EXCLUDE_SELF: tl.constexpr,
    LISTED: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MOST_SHARES: tl.constexpr,
):
    pid = tl.program_id(0)
    image = (pid // programs).to(tl.int64)
    count = tl.load(n_tokens_ptr + image) if LISTED else M
    shares = shares_of(count, BLOCK_M, programs, MOST_SHARES)
    block, share = pid % programs // shares, pid % programs % shares
    if block * BLOCK_M >= count:
        return
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Slots beyond the rows repeat a token, and `merge` reads none of them.
    if LISTED:
        token = tl.load(tokens_ptr + image * rows_per_image + slot, mask=slot < count, other=0)
    else:
        token = tl.minimum(slot, M - 1)
    q_ptr += image * stride_qb
    x_ptr += image * stride_xb
    row_ptrs = q_ptr + token.to(tl.int64)[:, None, None] * stride_qm  # [BLOCK_M, 1, 1]
    # The lists of the nearest stay in memory, as the distances need the registers. Only a tile that
    # brings a nearer column loads them.
    slots = tl.arange(0, BLOCK_K)
    keys_ptr += pid.to(tl.int64) * (BLOCK_M * BLOCK_K)
    list_ptrs = keys_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + slots[None, :]
    # Empty slots differ, so that one replacement fills one of them. Slots beyond K are never the
    # worst.
    empty = tl.where(slots < K, NO_PAIR - slots.to(tl.int64), -NO_PAIR)
    tl.store(list_ptrs, tl.zeros([BLOCK_M, 1], tl.int64) + empty[None, :])
    tl.debug_barrier()
    worst = tl.full([BLOCK_M], NO_PAIR, tl.int64)
    for start in range(share * BLOCK_N, N, shares * BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col = tl.minimum(cols, N - 1).to(tl.int64)
        col_ptrs = x_ptr + col[None, :, None] * stride_xn  # [1, BLOCK_N, 1]
        total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_D], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = (d + tl.arange(0, BLOCK_D))[None, None, :]
            row_offsets = dims.to(tl.int64) * stride_qd
            col_offsets = dims.to(tl.int64) * stride_xd
            qi = tl.load(row_ptrs + row_offsets, mask=dims < D, other=0.0)  # [BLOCK_M, 1, BLOCK_D]
            xj = tl.load(col_ptrs + col_offsets, mask=dims < D, other=0.0)  # [1, BLOCK_N, BLOCK_D]
            difference = infinities_to_nan(qi) - infinities_to_nan(xj)
            total += difference * difference
        bits = distance_bits(tl.sum(total, axis=2))  # [BLOCK_M, BLOCK_N]
        key = (bits.to(tl.int64) << 32) | cols.to(tl.int64)[None, :]
        allowed = (cols < N)[None, :]
        if EXCLUDE_SELF:
            allowed = allowed & (cols[None, :] != token[:, None])
        key = tl.where(allowed, key, NO_PAIR)
        if tl.max((tl.min(key, axis=1) < worst).to(tl.int32), axis=0) > 0:
            best = keep_nearest(tl.load(list_ptrs), key)
            worst = tl.max(best, axis=1)
            tl.debug_barrier()
            tl.store(list_ptrs, best)
            tl.debug_barrier()


def search_launch(
    rows: torch.Tensor,
    columns: torch.Tensor,
    exclude_self: bool,
    k: int,
    searched: Searched | None = None,
) -> Launch:
    """Finds the k nearest columns of each row in each share of the columns, as keys for `merge`.

    searched: the listed rows of a pass; None for all rows.
    """
    batch, n, d = columns.shape
    m = rows.shape[1]
    listed = searched is not None
    tokens, n_tokens = searched if listed else (None, None)
    rows_per_image = tokens.shape[1] if listed else m
    blocks = cdiv(rows_per_image, BLOCK_M)
    gpu = architecture(columns.device)
    if listed:
        programs = max(programs_for_lists(gpu) // batch, blocks)
    else:  # as many programs as fill a GPU, in whole blocks
        shares = min(MOST_SHARES, cdiv(n, 128), gpu.multiprocessors // (batch * blocks))
        programs = blocks * max(1, shares)
    block_k = power_of_two(k, 2, MAX_K)
    block_d = power_of_two(d, 16, 64)
    shape = batch * programs, BLOCK_M, block_k
    keys = torch.empty(shape, dtype=torch.int64, device=columns.device)
    return Launch(
        _search_kernel,
        batch * programs,
        q_ptr=rows,
        x_ptr=columns,
        tokens_ptr=tokens,
        n_tokens_ptr=n_tokens,
        keys_ptr=keys,
        M=m,
        N=n,
        D=d,
        K=k,
        rows_per_image=rows_per_image,
        programs=programs,
        **strides("q", rows, "bmd"),
        **strides("x", columns, "bnd"),
        EXCLUDE_SELF=exclude_self,
        LISTED=listed,
        BLOCK_M=BLOCK_M,
        BLOCK_N=PAIRS // block_d,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        MOST_SHARES=MOST_SHARES,
        num_warps=4,
    )

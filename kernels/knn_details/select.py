"""The certificate over a panel: which columns surely hold the k nearest neighbours of each row.

panel of `panel.py`, the rows' a^2 and r and the columns' u of `rounding.py` -> table (B, R, 64)
int32 as `certify.py` writes it. Rows that it does not decide have an empty table and are listed
for the search over measured distances.

A row is read once for its candidates, and once more in part:

1. The k-th smallest minimum of 512 groups of columns is no less than the k-th smallest p, and
   gives a first W.
2. The columns with c <= W by p are in groups whose minimum is as small, a tenth of all groups.
   These groups alone are read again, and the columns written out.
3. The k-th smallest p of these columns gives the W and S2 of the certificate.

Columns that are near each other in an image are in different groups because `rounding.py` rotates
them. `certificate.py` has the bounds; |p - max(c, 0)| <= STORED p + STORED_LEAST.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, power_of_two
from .certificate import errors_of, gamma, kth_smallest, most_c, sure_c
from .rounding import LARGEST_HALF, eta
from .table import (
    CAPACITY,
    NO_KEY,
    ROWS,
    Rounded,
    Searched,
    append,
    store_entries,
    token_at,
)

GROUPS = 512  # of columns: with fewer, the first W is wider; with more, their k-th minimum dearer
NARROWED = 128  # groups, and then columns, that the first W may leave; the second leaves 64
STORED: tl.constexpr = tl.constexpr(2**-11)  # relative error of fp16
STORED_LEAST: tl.constexpr = tl.constexpr(2**-25)  # and the absolute one below its normal range


@triton.jit
def _bits(p):
    """Returns the bits of p >= 0 in the upper half of an int32, which order like p."""
    return p.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def _value(key):
    """Returns p of a key in float32."""
    return (key >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _most_p(tau, a, e, u, gamma):
    """Returns the most that p of a neighbour can be where k columns have p <= tau."""
    W = most_c(tau * (1.0 + STORED) + STORED_LEAST, a, e, u, gamma)
    return W * (1.0 + STORED) + STORED_LEAST


@triton.jit
def _append(list_ptr, count, item, near, most):
    """Appends the items of each row to its list of `count`, and returns the new number.

    list_ptr: [R, 1], lists that hold `most`; items beyond are counted alone.
    """
    place = count[:, None] + tl.cumsum(near.to(tl.int32), axis=1) - 1
    tl.store(list_ptr + place, item + place * 0, mask=near & (place < most))
    return count + tl.sum(near.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["first", "M", "K"])
def _select_kernel(
    # tensors
    panel_ptr,
    row_a2_ptr,
    row_r_ptr,
    col_u_ptr,
    keys_ptr,
    table_ptr,
    tokens_ptr,
    n_tokens_ptr,
    # sizes
    first,
    rows_per_image,
    M,
    padded_m,
    padded_n,
    K,
    gamma,
    eta,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NARROWED: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = rows_per_image // BLOCK_R
    image = (pid // blocks).to(tl.int64)
    local = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    position = first + local
    token = token_at(position)
    if tl.min(token, axis=0) >= M:  # padding alone, whose rows of the table `settle` does not read
        return
    row = image * rows_per_image + local
    rows = image * padded_m + position
    a, e, u = errors_of(row_a2_ptr + rows, row_r_ptr + rows, col_u_ptr + image, eta)

    # The first bound.
    row_ptrs = panel_ptr + row[:, None] * padded_n
    cols = tl.arange(0, BLOCK_N)[None, :]
    minima = tl.full([BLOCK_R, BLOCK_N], float("inf"), tl.float16)
    for start in range(0, padded_n, BLOCK_N):
        p = tl.load(row_ptrs + start + cols, mask=start + cols < padded_n, other=float("inf"))
        minima = tl.minimum(minima, p)
    kth = kth_smallest(_bits(minima), K, 16)
    most_p = _most_p(_value(kth), a, e, u, gamma)
    # A c of 65520 or more is stored as infinity, so that a larger bound holds for no p.
    bounded = most_p <= LARGEST_HALF
    most_p = tl.where(bounded, most_p, -1.0)

    # The groups within it, and their columns within it, as keys of p and column.
    keys_ptr += row[:, None] * NARROWED
    slots = tl.arange(0, NARROWED)[None, :]
    count = tl.zeros([BLOCK_R], tl.int32)
    n_groups = _append(keys_ptr, count, cols, minima.to(tl.float32) <= most_p[:, None], NARROWED)
    tl.debug_barrier()
    group = tl.load(keys_ptr + slots, mask=slots < n_groups[:, None], other=padded_n)
    tl.debug_barrier()
    for start in range(0, padded_n, BLOCK_N):
        col = start + group
        p = tl.load(row_ptrs + col, mask=col < padded_n, other=float("inf"))
        near = p.to(tl.float32) <= most_p[:, None]
        count = _append(keys_ptr, count, _bits(p) | col, near, NARROWED)
    tl.debug_barrier()

    # The bounds by the k-th smallest p itself, which is one of these.
    key = tl.load(keys_ptr + slots, mask=slots < count[:, None], other=NO_KEY)
    tau = _value(kth_smallest(key, K, 16))
    p = _value(key)
    most_p = _most_p(tau, a, e, u, gamma)
    S2 = sure_c(tau * (1.0 - STORED) - STORED_LEAST, a, e, u, gamma)
    candidate = (slots < count[:, None]) & (p <= most_p[:, None])
    sure = candidate & (p * (1.0 + STORED) + STORED_LEAST < S2[:, None])
    n_candidates = tl.sum(candidate.to(tl.int32), axis=1)
    has_token = token < M
    # The list of a row with NARROWED columns or more, which each of as many groups has, is not all.
    decided = has_token & bounded & (count < NARROWED) & (n_candidates <= CAPACITY)
    column = token_at(key & 0xFFFF)
    store_entries(table_ptr + row[:, None] * CAPACITY, column, candidate, sure, decided)
    lists = image * rows_per_image
    append(tokens_ptr + lists, n_tokens_ptr + image, token, has_token & (decided == 0))


def select_launch(
    panel: torch.Tensor,
    rows: Rounded,
    columns: Rounded,
    table: torch.Tensor,
    searched: Searched,
    first: int,
    k: int,
) -> Launch:
    """Fills the table and the list of one pass. The counts of `searched` must be zeros."""
    batch, rows_per_image, padded_n = panel.shape
    assert table.shape == (batch, rows_per_image, CAPACITY.value) and table.is_contiguous()
    assert padded_n <= 2**16  # a key numbers columns in 16 bits
    return Launch(
        _select_kernel,
        batch * (rows_per_image // ROWS),
        panel_ptr=panel,
        row_a2_ptr=rows.a2,
        row_r_ptr=rows.r,
        col_u_ptr=columns.u,
        keys_ptr=table.new_empty(batch, rows_per_image, NARROWED),
        table_ptr=table,
        tokens_ptr=searched.tokens,
        n_tokens_ptr=searched.n_tokens,
        first=first,
        rows_per_image=rows_per_image,
        M=rows.n,
        padded_m=rows.padded_n,
        padded_n=padded_n,
        K=k,
        gamma=gamma(columns.d),
        eta=eta(columns.d),
        BLOCK_R=ROWS,
        BLOCK_N=power_of_two(padded_n, 128, GROUPS),
        NARROWED=NARROWED,
        num_warps=1,
    )

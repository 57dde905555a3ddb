"""The end of the search over measured distances: joins the lists of the programs of each row.

keys of `search.py`, the k nearest columns of each row in each share of the columns -> indices
(B, M, k) int64 and squared distances (B, M, k or 1) float32, nearest first, by token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import Launch, cdiv
from .search import NO_PAIR, keep_nearest
from .table import shares_of


@triton.jit(do_not_specialize=["M", "K", "programs"])
def _merge_kernel(
    # tensors
    keys_ptr,
    tokens_ptr,
    n_tokens_ptr,
    indices_ptr,
    distances_ptr,
    # sizes
    M,
    K,
    rows_per_image,
    programs,
    LISTED: tl.constexpr,
    ALL: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MOST_SHARES: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows_per_image, BLOCK_R)
    image = (pid // blocks).to(tl.int64)
    first = (pid % blocks) * BLOCK_R
    count = tl.load(n_tokens_ptr + image) if LISTED else M
    if first >= count:
        return
    slot = first + tl.arange(0, BLOCK_R)
    exists = slot < count
    if LISTED:
        token = tl.load(tokens_ptr + image * rows_per_image + slot, mask=exists, other=0)
    else:
        token = slot
    shares = shares_of(count, BLOCK_M, programs, MOST_SHARES)
    places = tl.arange(0, BLOCK_K)[None, :]
    holds = exists[:, None] & (places < K)  # what `search` wrote beyond K is below every key
    item = (image * programs + slot // BLOCK_M * shares) * BLOCK_M + slot % BLOCK_M
    key_ptrs = keys_ptr + item[:, None] * BLOCK_K + places  # [BLOCK_R, BLOCK_K]
    best = tl.load(key_ptrs, mask=holds, other=-NO_PAIR)
    for share in range(1, shares):
        ptrs = key_ptrs + share * (BLOCK_M * BLOCK_K)
        best = keep_nearest(best, tl.load(ptrs, mask=holds, other=NO_PAIR))
    best = tl.where(places < K, best, NO_PAIR)
    out = image * M + token
    for place in range(0, K):
        nearest = tl.min(best, axis=1)
        tl.store(indices_ptr + out * K + place, nearest & 0xFFFFFFFF, mask=exists)
        distance = (nearest >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if ALL:
            tl.store(distances_ptr + out * K + place, distance, mask=exists)
        else:
            tl.store(distances_ptr + out, distance, mask=exists & (place == K - 1))
        best = tl.where(best == nearest[:, None], NO_PAIR, best)


def merge_launch(search: Launch, indices: torch.Tensor, distances: torch.Tensor) -> Launch:
    """Fills indices (B, M, k) and distances (B, M, k or 1) from the keys of a search."""
    assert indices.is_contiguous() and distances.is_contiguous()
    block_r, warps = (16, 8) if search.arguments["BLOCK_K"] <= 64 else (4, 4)
    shared = (
        *("tokens_ptr", "n_tokens_ptr", "keys_ptr", "M", "K", "rows_per_image", "programs"),
        *("LISTED", "BLOCK_M", "BLOCK_K", "MOST_SHARES"),
    )
    return Launch(
        _merge_kernel,
        len(indices) * cdiv(search.arguments["rows_per_image"], block_r),
        **{name: search.arguments[name] for name in shared},
        indices_ptr=indices,
        distances_ptr=distances,
        ALL=distances.shape[-1] == indices.shape[-1],
        BLOCK_R=block_r,
        num_warps=warps,
    )

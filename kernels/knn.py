"""Nearest neighbours of every token among the others, fused: distances never leave the chip.

    score(i, j) = ||x_j - m||^2 - 2 (x_i - m)(x_j - m)
    indices(i)  = the k columns j != i with the smallest (score, j), in that order

x (B, N, D) any strides, m (B, D) float32, the mean token -> indices (B, N, K) int64. A score ranks
like the squared distance along a row. The matrix of scores would be N^2 floats, 27.5 GB at
N = 82,944; what is written here is N K indices.

Each program owns BLOCK_M rows and streams over all columns. A score and its column make one 64-bit
key, ties by the lower column. Per tile, the nearest remaining column of every row replaces the
worst of its K best until no row gains: after c columns a tile brings about K BLOCK_N / c (the
selection of FlashLib's insert kernel, here on keys).

`pair_distances` measures chosen pairs as sum (x_i - x_j)^2, exactly 0 for duplicates, where the
score only ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, dot_precision, power_of_two, strides

MAX_K = 128
NO_KEY: tl.constexpr = tl.constexpr(2**63 - 1)
FARTHEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # the largest float32


@triton.jit
def _neighbors_kernel(
    # tensors
    x_ptr,
    mean_ptr,
    indices_ptr,
    # sizes
    N,
    D,
    K,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_M)
    image = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += image * stride_xb
    row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xn  # [BLOCK_M, 1]
    slots = tl.arange(0, BLOCK_K).to(tl.int64)

    # Unlike each other, so that one replacement fills one slot; slots beyond K are never the worst.
    empty = tl.where(slots < K, NO_KEY - slots, -NO_KEY)
    best = tl.zeros([BLOCK_M, 1], tl.int64) + empty[None, :]  # [BLOCK_M, BLOCK_K]
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_ptrs = x_ptr + cols.to(tl.int64)[:, None] * stride_xn  # [BLOCK_N, 1]
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        norm = tl.zeros([BLOCK_N], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D)
            offsets = dims.to(tl.int64)[None, :] * stride_xd
            inside = dims < D
            mean = tl.load(mean_ptr + image * D + dims, mask=inside, other=0.0)
            xi = tl.load(
                row_ptrs + offsets, mask=(rows < N)[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            xj = tl.load(
                col_ptrs + offsets, mask=(cols < N)[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            xi -= mean[None, :]  # [BLOCK_M, BLOCK_D]
            xj -= mean[None, :]  # [BLOCK_N, BLOCK_D]
            dot = tl.dot(xi, tl.trans(xj), dot, input_precision=PRECISION)
            norm += tl.sum(xj * xj, axis=1)
        score = norm[None, :] - 2.0 * dot  # [BLOCK_M, BLOCK_N]
        # A token with a NaN or an infinity is the farthest of all, never chosen before others.
        finite = (norm[None, :] <= FARTHEST) & (tl.abs(score) <= FARTHEST)
        score = tl.where(finite, score, FARTHEST)

        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders like the numbers do
        key = (bits.to(tl.int64) << 32) | cols.to(tl.int64)[None, :]  # [BLOCK_M, BLOCK_N]
        key = tl.where((cols < N)[None, :] & (cols[None, :] != rows[:, None]), key, NO_KEY)

        nearest = tl.min(key, axis=1)
        worst = tl.max(best, axis=1)
        while tl.max((nearest < worst).to(tl.int32), axis=0) > 0:
            best = tl.where(
                (nearest < worst)[:, None] & (best == worst[:, None]), nearest[:, None], best
            )
            key = tl.where(key == nearest[:, None], NO_KEY, key)
            nearest = tl.min(key, axis=1)
            worst = tl.max(best, axis=1)

    best = tl.where((slots < K)[None, :], best, NO_KEY)
    out = indices_ptr + (image * N + rows.to(tl.int64)) * K
    for slot in range(0, K):
        nearest = tl.min(best, axis=1)
        tl.store(out + slot, nearest & 0xFFFFFFFF, mask=rows < N)
        best = tl.where(best == nearest[:, None], NO_KEY, best)


@triton.jit
def _pair_distances_kernel(
    # tensors
    x_ptr,
    indices_ptr,
    distances_ptr,
    # sizes
    pairs,
    N,
    D,
    K,
    # strides
    stride_xb,
    stride_xn,
    stride_xd,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = pair < pairs
    token = pair // K
    image = x_ptr + (token // N) * stride_xb
    left = image + (token % N) * stride_xn
    right = image + tl.load(indices_ptr + pair, mask=exists, other=0) * stride_xn
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D)
        offsets = dims.to(tl.int64)[None, :] * stride_xd
        inside = exists[:, None] & (dims < D)[None, :]
        xi = tl.load(left[:, None] + offsets, mask=inside, other=0.0).to(tl.float32)
        xj = tl.load(right[:, None] + offsets, mask=inside, other=0.0).to(tl.float32)
        total += (xi - xj) * (xi - xj)
    distance = tl.sum(total, axis=1)
    distance = tl.where(distance == distance, distance, float("inf"))
    tl.store(distances_ptr + pair, distance, mask=exists)


def neighbors_launch(
    x: torch.Tensor, mean: torch.Tensor, indices: torch.Tensor, precision: str | None = None
) -> Launch:
    """x (B, N, D), mean (B, D) float32, indices (B, N, K <= 128) int64 to fill; both contiguous."""
    batch, n, d = x.shape
    k = indices.shape[-1]
    assert k <= MAX_K and mean.is_contiguous() and indices.is_contiguous()
    block_k = power_of_two(k, 2, MAX_K)
    # 64 rows are what Hopper's wgmma takes; a list of more than 64 keys, two registers each, leaves
    # room for 16. With these stages neither spills on Triton 3.8 and 3.9; on 3.6 the long list
    # spills 24 bytes.
    block_m, warps, stages = (64, 8, 3) if block_k <= 64 else (16, 4, 1)
    return Launch(
        _neighbors_kernel,
        batch * triton.cdiv(n, block_m),
        dict(x_ptr=x, mean_ptr=mean, indices_ptr=indices, N=n, D=d, K=k, **strides("x", x, "bnd")),
        dict(
            BLOCK_M=block_m,
            BLOCK_N=64,
            BLOCK_D=16,
            BLOCK_K=block_k,
            PRECISION=precision or dot_precision(),
        ),
        dict(num_warps=warps, num_stages=stages),
    )


def pair_distances_launch(
    x: torch.Tensor, indices: torch.Tensor, distances: torch.Tensor
) -> Launch:
    """x (B, N, D), indices (B, N, K) int64, distances (B, N, K) float32, both contiguous."""
    _, n, d = x.shape
    assert indices.is_contiguous() and distances.is_contiguous()
    block_d = power_of_two(d, 16, 256)
    block_p = 2048 // block_d
    return Launch(
        _pair_distances_kernel,
        triton.cdiv(indices.numel(), block_p),
        dict(x_ptr=x, indices_ptr=indices, distances_ptr=distances)
        | dict(pairs=indices.numel(), N=n, D=d, K=indices.shape[-1], **strides("x", x, "bnd")),
        dict(BLOCK_P=block_p, BLOCK_D=block_d),
        dict(num_warps=4),
    )


def neighbors_triton(x: torch.Tensor, mean: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, N, k) int64 of each token's k nearest others, nearest first, of x (B, N, D)."""
    indices = torch.empty((*x.shape[:2], k), dtype=torch.int64, device=x.device)
    neighbors_launch(x, mean, indices).run()
    return indices


def pair_distances_triton(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """||x_i - x_j||^2 float32 for j in indices (B, N, K); +inf where a token is not finite."""
    distances = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    pair_distances_launch(x, indices.contiguous(), distances).run()
    return distances

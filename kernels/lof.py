"""The simplified Local Outlier Factor from the distances and indices of a neighbour search.

    LOF_i = mean over j in N_k(i) of kappa_i / kappa_j        `reference.simplified_lof`

kappa (B, N) float32, the squared k-distances, N_k (B, N, k) int64 -> (B, N) float32. A kappa of 0
counts as the smallest kappa above 0 of its image, so that equal tokens score 1, not 0 / 0. A score
that overflows becomes the largest finite float32, and a kappa that is NaN makes the score NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, cdiv, power_of_two
from .knn_details.table import LARGEST_FLOAT

TINY: tl.constexpr = tl.constexpr(2.0**-126)  # the smallest normal float32


@triton.jit
def _clamped(kappa, least):
    """Returns kappa within the normal float32 numbers, with `least` for 0; NaN stays NaN."""
    kappa = tl.where(kappa == 0.0, least, kappa)
    kappa = tl.where(kappa < TINY, TINY, kappa)
    return tl.where(kappa > LARGEST_FLOAT, LARGEST_FLOAT, kappa)


@triton.jit
def _least_above_zero(kappa_ptr, N, BLOCK_N: tl.constexpr):
    """Returns the smallest kappa above 0 of an image."""
    least = tl.full([BLOCK_N], float("inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        kappa = tl.load(kappa_ptr + column, mask=column < N, other=float("inf"))
        least = tl.minimum(least, tl.where(kappa > 0.0, kappa, float("inf")))
    return tl.min(least, axis=0)


@triton.jit(do_not_specialize=["N"])
def _lof_kernel(
    kappa_ptr,
    neighbors_ptr,
    scores_ptr,
    N,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_R)
    image = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    places = tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < N)[:, None] & (places < K)
    token = image * N + rows
    token_kappa = tl.load(kappa_ptr + token, mask=rows < N, other=1.0)
    neighbor = tl.load(neighbors_ptr + token[:, None] * K + places, mask=inside, other=0)
    neighbor_kappa = tl.load(kappa_ptr + image * N + neighbor, mask=inside, other=1.0)
    least = 1.0
    # Few images have equal tokens, and only a program with some of them reads all kappas.
    if tl.min(tl.where((token_kappa[:, None] == 0.0) | (neighbor_kappa == 0.0), 0, 1)) == 0:
        least = _least_above_zero(kappa_ptr + image * N, N, 1024)
    ratio = _clamped(token_kappa, least)[:, None] / _clamped(neighbor_kappa, least)
    # The sum of k ratios may overflow where their mean does not.
    mean = tl.sum(tl.where(inside, ratio * 2.0**-7, 0.0), axis=1) / K * 2.0**7
    tl.store(scores_ptr + token, tl.where(mean > LARGEST_FLOAT, LARGEST_FLOAT, mean), mask=rows < N)


def lof_launch(kappa: torch.Tensor, neighbors: torch.Tensor, scores: torch.Tensor) -> Launch:
    """Scores (B, N) of kappa and neighbors; all three are contiguous."""
    batch, n, k = neighbors.shape
    assert all(t.is_contiguous() for t in (kappa, neighbors, scores))
    return Launch(
        _lof_kernel,
        batch * cdiv(n, 16),
        kappa_ptr=kappa,
        neighbors_ptr=neighbors,
        scores_ptr=scores,
        N=n,
        K=k,
        BLOCK_R=16,
        BLOCK_K=power_of_two(k, 1, 128),
        num_warps=4,
    )


def simplified_lof_triton(kappa: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """Scores (B, N) of the squared k-distances kappa (B, N) and neighbors (B, N, k)."""
    scores = torch.empty_like(kappa, memory_format=torch.contiguous_format)
    lof_launch(kappa.contiguous(), neighbors, scores).run()
    return scores

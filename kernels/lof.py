"""The simplified Local Outlier Factor from distances and indices that a search has found.

    LOF_i = mean over j in N_k(i) of kappa_i / kappa_j        `reference.simplified_lof`

kappa (B, N) float32, N_k (B, N, k) int64, least (B,) float32 -> (B, N) float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .rounding import FARTHEST


@triton.jit
def _lof_kernel(
    kappa_ptr,
    neighbors_ptr,
    least_ptr,
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
    least = tl.load(least_ptr + image)
    own = tl.load(kappa_ptr + token, mask=rows < N, other=0.0)
    neighbor = tl.load(neighbors_ptr + token[:, None] * K + places, mask=inside, other=0)
    others = tl.load(kappa_ptr + image * N + neighbor, mask=inside, other=1.0)
    ratio = tl.maximum(own, least)[:, None] / tl.maximum(others, least)
    mean = tl.sum(tl.where(inside, ratio, 0.0), axis=1) / K
    tl.store(scores_ptr + token, tl.where(own <= FARTHEST, mean, float("nan")), mask=rows < N)


def lof_launch(
    kappa: torch.Tensor, neighbors: torch.Tensor, least: torch.Tensor, scores: torch.Tensor
) -> Launch:
    """The module's shapes, all contiguous; kappa is held above `least`."""
    batch, n, k = neighbors.shape
    assert all(t.is_contiguous() for t in (kappa, neighbors, least, scores))
    return Launch(
        _lof_kernel,
        batch * triton.cdiv(n, 16),
        dict(kappa_ptr=kappa, neighbors_ptr=neighbors, least_ptr=least, scores_ptr=scores)
        | dict(N=n, K=k),
        dict(BLOCK_R=16, BLOCK_K=triton.next_power_of_2(k)),
        dict(num_warps=4),
    )


def simplified_lof_triton(kappa: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """Scores (B, N) of squared k-distances (B, N)."""
    scores = torch.empty_like(kappa, memory_format=torch.contiguous_format)
    largest = kappa.nan_to_num(nan=0, posinf=0).amax(dim=-1)
    limits = torch.finfo(kappa.dtype)
    least = (largest * limits.eps**2).clamp(min=limits.tiny)
    lof_launch(kappa.contiguous(), neighbors, least, scores).run()
    return scores

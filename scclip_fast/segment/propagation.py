"""LPOSS: label propagation over the patches of all windows (arXiv 2503.19777).

Stojnic et al., CVPR 2025, solve (I - alpha W) Z = (1 - alpha) Y for the scores Z of patches and
names, given the cosines Y. W is a graph of the patches,

    A_ij = max(cos_ij, 0)^gamma exp(-sigma ||p_i - p_j||)  for j among the k nearest of i by cosine,
    W = D^-1/2 (A + A^T) D^-1/2,

with the cosines of a proxy's tokens, the pixels p at the middle of the patches, and D the row sums
of A + A^T. alpha = 0.95, gamma = 3, sigma = 0.01 a pixel, k = 400 (which counts the patch itself)
and at most 10 steps of conjugate gradients, as published. The factor 1 - alpha, which the published
code leaves out, keeps the scores in the range of the cosines; no label depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import knn

ALPHA = 0.95
GAMMA = 3.0
SIGMA = 0.01
NEIGHBORS = 400
STEPS = 10
TOLERANCE = 1e-6  # of the residual, relative to the right side


def propagate(scores: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """Returns the scores (n, C) after the propagation of all names at once.

    The graph takes 16 kB a patch, no matrix of patches times patches.

    Args:
        scores: (n, C), float32, of n patches.
        tokens: (n, D), floating, a proxy's.
        places: (n, 2), the middle of each patch in pixels.
    """
    count = len(scores)
    if count == 1:
        return scores
    distances, neighbors = knn(tokens, min(NEIGHBORS, count) - 1, metric="cosine")
    far = (places[:, None] - places[neighbors]).norm(dim=-1)
    weights = (1 - distances).clamp(min=0).pow(GAMMA) * torch.exp(-SIGMA * far)
    rows = torch.arange(count, device=scores.device)[:, None].expand_as(neighbors)
    pairs = torch.stack([rows.flatten(), neighbors.flatten()])
    pairs, weights = torch.cat([pairs, pairs.flip(0)], dim=1), weights.flatten().repeat(2)
    degree = weights.new_zeros(count).index_add_(0, pairs[0], weights)
    scale = degree.where(degree > 0, 1).rsqrt()
    weights = weights * scale[pairs[0]] * scale[pairs[1]]
    size = (count, count)
    graph = torch.sparse_coo_tensor(pairs, weights, size, check_invariants=False).coalesce()
    return conjugate_gradients(lambda x: x - ALPHA * (graph @ x), (1 - ALPHA) * scores)


def propagate_windows(
    maps: list[Tensor], tokens: list[Tensor], windows: list[tuple[slice, slice]]
) -> list[Tensor]:
    """Returns the maps (names, h, w) of the windows of an image after the propagation.

    Args:
        maps: the cosines (names, h, w) of each window.
        tokens: the proxy's (D, h, w).
        windows: the rows and columns of each window in pixels.
    """
    places = []
    for scores, (rows, columns) in zip(maps, windows, strict=True):
        sides = zip((rows, columns), scores.shape[1:], strict=True)
        middles = [_middles(pixels, patches, scores.device) for pixels, patches in sides]
        places.append(torch.cartesian_prod(*middles))
    sizes = [scores[0].numel() for scores in maps]
    scores, features = (
        torch.cat([each.flatten(1).mT for each in group]) for group in (maps, tokens)
    )
    propagated = propagate(scores, features.float(), torch.cat(places)).split(sizes)
    return [
        each.mT.unflatten(1, scores.shape[1:]).contiguous()
        for each, scores in zip(propagated, maps, strict=True)
    ]


def _middles(pixels: slice, patches: int, device: torch.device) -> Tensor:
    """Returns the pixel in the middle of each of some patches that divide a row of pixels."""
    side = (pixels.stop - pixels.start) / patches
    return pixels.start + side * (torch.arange(patches, device=device) + 0.5)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Solves A X = B for all columns of B (n, C) at once, from X = 0.

    A column stops where its residual is below `TOLERANCE`, and all stop after `STEPS` steps.

    Args:
        product: maps (n, C) to A times it; A is symmetric and positive definite.
        b: (n, C).
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squares = residual.square().sum(dim=0)
    least = TOLERANCE**2 * squares
    for _ in range(STEPS):
        active = squares > least
        along = product(direction)
        curvature = (direction * along).sum(dim=0)
        step = torch.where(active, squares / curvature.where(active, 1), 0)
        x = x + step * direction
        residual = residual - step * along
        before, squares = squares, residual.square().sum(dim=0)
        direction = residual + torch.where(active, squares / before.where(active, 1), 0) * direction
    return x

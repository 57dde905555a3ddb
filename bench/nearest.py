"""Searches of neighbours that `targets.py` compares, and what it checks and counts of them."""

from __future__ import annotations

import math

import harness
import torch
from bench_knn import K
from torch import Tensor

from scclip_fast.kernels import knn

SHAPE = (5184, 82_944, 768)  # queries, tokens of the bank, channels: one image in sixteen
CHUNK = 1024  # queries whose distances to the whole bank are held at once: 340 MB in float32
CHECKED = 2048  # rows whose neighbours are compared with float64's
PASS = 2048  # rows of a pass of `undecided_rows`


def two_sets(device: str, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    """Makes queries (1, M, D), which are tokens of the bank with noise, and the bank (1, N, D)."""
    m, n, d = shape
    bank = harness.tokens(device, (1, n, d), "float32")
    noise = torch.randn(1, m, d, generator=torch.Generator().manual_seed(1)).to(device)
    return bank[:, :: n // m][:, :m] + 0.5 * noise, bank


def products(queries: Tensor, bank: Tensor) -> None:
    """Computes the half-precision products alone, without which no search goes."""
    for some in queries[0].split(CHUNK):
        some @ bank[0].mT


def matmul_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ranks ||x||^2 - 2 q x in chunks of queries, and adds ||q||^2 to what it keeps."""
    norms = bank[0].square().sum(dim=1)
    found = []
    for some in queries[0].split(CHUNK):
        distances, indices = torch.addmm(norms, some, bank[0].mT, alpha=-2).topk(k, largest=False)
        found.append((distances + some.square().sum(dim=1, keepdim=True), indices))
    distances, indices = (torch.cat(parts)[None] for parts in zip(*found, strict=True))
    return distances, indices


def flashlib(x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs FlashLib's search for one neighbour more, because it also finds each token itself."""
    from flashlib.primitives.knn import flash_knn_dispatch

    distances, indices = flash_knn_dispatch(x, x, K + 1)
    own = indices == torch.arange(x.shape[1], device=x.device)[:, None]
    order = own.int().argsort(dim=-1, stable=True)[..., :K]
    return distances.gather(-1, order), indices.gather(-1, order).long()


def same_sets(
    rows: Tensor, columns: Tensor, exclude_self: bool, k: int, found: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Returns the share of evenly spaced rows of one image with float64's neighbours."""
    indices, exact, wrong = found[1][0], columns[0].double(), 0
    checked = torch.arange(0, len(indices), max(1, len(indices) // CHECKED), device=indices.device)
    for part in checked.split(64):
        some = rows[0, part].double()
        d2 = torch.cdist(some, exact, compute_mode="donot_use_mm_for_euclid_dist")
        if exclude_self:
            d2[torch.arange(len(part)), part] = math.inf
        true = d2.topk(k, largest=False).indices.sort(dim=1).values
        wrong += (indices[part].sort(dim=1).values != true).any(dim=1).sum().item()
    return dict(exact_rows=1 - wrong / len(checked), checked_rows=len(checked))


def undecided_rows(rows: Tensor, columns: Tensor, exclude_self: bool, k: int) -> dict[str, float]:
    """Returns the shares of rows that `collect` looks at and that the measured search takes.

    Passes over bins are of PASS rows, not of the search's own number, which changes no decision.
    Panels leave undecided rows to the search alone.
    """
    m = rows.shape[1]
    collected = searched = 0
    if columns.shape[1] <= knn.MOST_COLUMNS_OF_PANEL:
        for *_, left in knn.by_panel(rows, columns, exclude_self, k):
            searched += left.n_tokens.sum().item()
        return dict(collected_rows=0.0, searched_rows=searched / m)
    shares, halves = knn.rounded_for_bins(rows, columns, exclude_self)
    for first in range(0, m, PASS):
        count = min(PASS, m - first)
        table, undecided = knn.decide(*halves, exclude_self, shares, first, count, k)
        collected += undecided.n_positions.sum().item()
        knn.collect(*halves, exclude_self, undecided, table, first)
        searched += undecided.n_tokens.sum().item()
    return dict(collected_rows=collected / m, searched_rows=searched / m)

"""Queries and banks of several kinds, and a check of their nearest neighbours against float64."""

from __future__ import annotations

import torch
from cases import clusters
from tolerance import TIE


def squared_distances(queries, x):
    """(B, M, N) in float64; NaN where a token of a pair is not finite."""
    q, x = queries.double(), x.double()
    d2 = torch.cdist(q, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    finite = q.isfinite().all(dim=-1)[..., None] & x.isfinite().all(dim=-1)[:, None]
    return torch.where(finite, d2, torch.nan)


def assert_nearest(found, queries, x, k):
    """Asserts that the result is float64's, up to ties, in the order of distance and index."""
    distances, indices = found
    assert distances.shape == indices.shape == (*queries.shape[:2], k)
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < x.shape[1])).all()
    assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all()
    d2 = squared_distances(queries, x)
    true = d2.sort(dim=-1).values[..., :k]  # NaN last
    chosen = d2.gather(-1, indices)
    assert torch.equal(chosen.isnan(), true.isnan())
    number = ~true.isnan()
    assert (chosen <= true[..., -1:] * (1 + TIE))[number & number[..., -1:]].all()
    assert torch.allclose(distances, chosen.float(), rtol=2e-6, equal_nan=True)
    assert torch.allclose(distances, true.float(), rtol=2e-6, equal_nan=True)
    steps, order = distances.nan_to_num(torch.inf).diff(dim=-1), indices.diff(dim=-1)
    assert (steps >= 0)[~steps.isnan()].all() and (order > 0)[steps == 0].all()


def flat(b, n, d):
    """Tokens of which half are closer to each other than fp16 resolves."""
    x = torch.randn(b, n, d)
    x[:, ::2] = 3 + 1e-5 * torch.randn(b, (n + 1) // 2, d)
    return x


def far_clusters(b, n, d):
    """Tokens in two clusters, a million times as far apart as they are wide."""
    x = torch.randn(b, n, d)
    x[:, ::2] += 1e6
    return x


def offset(b, n, d):
    """Tokens far from the origin, so that a wrong centre of one set shows."""
    return 40 + torch.randn(b, n, d)


KINDS = (torch.randn, clusters, flat, far_clusters, offset)


def two_sets(kind, b, m, n, d):
    """Queries (B, M, D) and a bank (B, N, D) of one kind, some queries equal to a bank row."""
    tokens = kind(b, m + n, d)[:, torch.randperm(m + n)]
    queries, x = tokens[:, :m].clone(), tokens[:, m:]
    queries[:, ::7] = x[:, torch.randint(n, (len(range(0, m, 7)),))]
    return queries, x

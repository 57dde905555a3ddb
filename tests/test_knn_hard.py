"""Inputs on which products of float32 lose the distances, or squares overflow."""

import pytest
import torch
from cases import GPU
from tolerance import assert_neighbors

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.kernels import nearest
from scclip_fast.kernels.lof import simplified_lof_triton

DEVICE = "cuda" if GPU else "cpu"


def far_clusters(b, n, d):
    """Two clusters whose distance is a million times their width."""
    x = torch.randn(b, n, d)
    x[:, ::2] += 1e6
    return x


def sentinels(b, n, d):
    """A column with a hundredth of missing values, as data without a mask have them."""
    x = torch.randn(b, n, d)
    x[:, :: max(2, n // 3), 0] = -999_999
    return x


def fill_values(b, n, d):
    """A tenth of the tokens are all netCDF's fill value, and so duplicates of each other."""
    x = torch.randn(b, n, d)
    x[:, ::10] = 9.96921e36
    return x


def two_scales(b, n, d):
    """1e15 beside 1."""
    x = torch.randn(b, n, d)
    x[:, : n // 3] *= 1e15
    return x


def offset(b, n, d):
    return 1e6 + torch.randn(b, n, d)


def narrow(b, n, d):
    return 1 + 1e-6 * torch.randn(b, n, d)


HARD = {f.__name__: f for f in (far_clusters, sentinels, fill_values, two_scales, offset, narrow)}


@pytest.mark.parametrize("n", [140, 70], ids=["half", "measured"])
@pytest.mark.parametrize("kind", HARD)
def test_inputs_whose_products_lose_the_distances(kind, n, k=9):
    """Neighbours, distances and scores are float64's; products in float32 lose most of them."""
    x = HARD[kind](1, n, 12)
    distances, indices = sf.knn(x.to(DEVICE), k, backend="triton")
    same, d2 = assert_neighbors(indices[0], x=x[0], k=k, tie=1e-5)
    expected = d2.gather(1, indices[0].cpu()).float()  # inf where float32 overflows
    assert torch.allclose(distances[0].cpu(), expected, rtol=2e-6)
    scores = sf.lof_scores(x.to(DEVICE), k, backend="triton")[0].cpu()
    limits = torch.finfo(torch.float32)
    kappa = d2.scatter(1, torch.arange(n)[:, None], torch.inf).kthvalue(k, dim=1).values
    kappa = kappa.clamp(limits.tiny, limits.max)
    expected = (kappa[:, None] / kappa[indices[0].cpu()]).mean(dim=1).clamp(max=limits.max)
    assert scores.isfinite().all()
    decided = same & same[indices[0].cpu()].all(dim=1)
    assert decided.double().mean() > 0.5
    assert torch.allclose(scores[decided].double(), expected[decided], rtol=1e-5)


@pytest.mark.parametrize("n, k", [(140, 9), (21, 19)], ids=["half", "measured"])
def test_finite_then_overflowing_then_not_finite(n, k):
    """Three tokens are so far that the squares overflow, and three are not finite."""
    x = torch.randn(n, 5)
    x[5:8] = torch.tensor([[1e25], [2e25], [-3e25]])
    x[12, 0], x[13, 2], x[14] = torch.nan, torch.inf, -torch.inf
    expected = (x[:, None].double() - x.double()).square().sum(dim=-1).float()
    expected[12:15] = expected[:, 12:15] = torch.nan
    distances, indices = (t[0].cpu() for t in nearest.nearest_triton(x[None].to(DEVICE), k, True))
    chosen = expected.gather(1, indices)
    assert torch.allclose(distances, chosen, rtol=1e-5, equal_nan=True)
    others = expected[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    in_order = others.sort(dim=1).values[:, :k]  # NaN last
    assert torch.allclose(distances, in_order, rtol=1e-5, equal_nan=True)


def test_scores_that_overflow_are_held():
    """A kappa of 0 counts as the least above it, one of inf as the largest float; NaN stays NaN."""
    kappa = torch.tensor([[0.0, 0.0, 1e-10, 1e20, torch.inf, torch.nan]])
    neighbors = torch.tensor([[1, 0, 0, 2, 3, 4]])[..., None]
    found = simplified_lof_triton(kappa.to(DEVICE), neighbors.to(DEVICE))[0].cpu()
    largest = torch.finfo(torch.float32).max
    expected = torch.tensor([1.0, 1.0, 1.0, 1e30, largest / 1e20, torch.nan])
    assert torch.allclose(found, expected, rtol=1e-6, equal_nan=True)
    expected = reference.simplified_lof(kappa, neighbors)[0]
    assert torch.allclose(found, expected, rtol=1e-6, equal_nan=True)
    kappa[0, 3] = torch.inf
    held = simplified_lof_triton(kappa.to(DEVICE), torch.zeros_like(neighbors).to(DEVICE))
    assert held[0, 3:5].tolist() == [largest, largest]

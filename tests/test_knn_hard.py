"""Tests inputs on which float32 products lose the distances, or squares overflow."""

import pytest
import torch
from cases import GPU
from tolerance import assert_neighbors

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.kernels import knn
from scclip_fast.kernels.lof import simplified_lof_triton

DEVICE = "cuda" if GPU else "cpu"


def far_clusters(b, n, d):
    """Features in two clusters, a million times as far apart as they are wide."""
    x = torch.randn(b, n, d)
    x[:, ::2] += 1e6
    return x


def sentinels(b, n, d):
    """Features with a marker for missing values in one column, as in data without a mask."""
    x = torch.randn(b, n, d)
    x[:, :: max(2, n // 3), 0] = -999_999
    return x


def fill_values(b, n, d):
    """Features of which a tenth are duplicates, filled with netCDF's fill value."""
    x = torch.randn(b, n, d)
    x[:, ::10] = 9.96921e36
    return x


def two_scales(b, n, d):
    """Features of size 1e15 beside features of size 1."""
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
    """Neighbours, distances and scores are float64's, where float32 products lose most of them."""
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
    """The squares of three far tokens overflow, and three tokens are not finite."""
    x = torch.randn(n, 5)
    x[5:8] = torch.tensor([[1e25], [2e25], [-3e25]])
    x[12, 0], x[13, 2], x[14] = torch.nan, torch.inf, -torch.inf
    expected = (x[:, None].double() - x.double()).square().sum(dim=-1).float()
    expected[12:15] = expected[:, 12:15] = torch.nan
    distances, indices = (t[0].cpu() for t in knn.nearest_triton(x[None].to(DEVICE), k, True))
    chosen = expected.gather(1, indices)
    assert torch.allclose(distances, chosen, rtol=1e-5, equal_nan=True)
    others = expected[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    in_order = others.sort(dim=1).values[:, :k]  # NaN last
    assert torch.allclose(distances, in_order, rtol=1e-5, equal_nan=True)


def test_scores_that_overflow_are_held():
    """A kappa of 0 counts as the least kappa above 0, inf as the largest float; NaN stays NaN."""
    kappa = torch.tensor([[0.0, 0.0, 1e-10, 1e20, torch.inf, torch.nan]])
    neighbors = torch.tensor([[1, 0, 0, 2, 3, 4]])[..., None]
    scores = simplified_lof_triton(kappa.to(DEVICE), neighbors.to(DEVICE))[0].cpu()
    largest = torch.finfo(torch.float32).max
    expected = torch.tensor([1.0, 1.0, 1.0, 1e30, largest / 1e20, torch.nan])
    assert torch.allclose(scores, expected, rtol=1e-6, equal_nan=True)
    expected = reference.simplified_lof(kappa, neighbors)[0]
    assert torch.allclose(scores, expected, rtol=1e-6, equal_nan=True)
    kappa[0, 3] = torch.inf
    scores = simplified_lof_triton(kappa.to(DEVICE), torch.zeros_like(neighbors).to(DEVICE))
    assert scores[0, 3:5].tolist() == [largest, largest]

"""The exactness of `knn` by cosine and by inner product.

Each clause that makes a result exact was broken by hand, and these tests failed:

- `product_margin` 0: test_products_that_float32_cannot_rank; halved, or without sqrt(D t):
  test_margin
- tokens whose norm overflows taken for tokens that are not finite: test_magnitudes; and the other
  way round: test_many_tokens_that_are_not_finite
- rows not scaled before their norm: test_products_that_float32_cannot_rank of long and short rows
- tokens that are not finite measured as infinite products:
  test_while_a_graph_is_captured_infinite_tokens_come_last
- the largest norm for the norm of each token: test_one_huge_token_leaves_the_others_decided
- a few candidates more than k left out on Triton: test_near_directions
- no float64 pass, no measured pass: test_products_that_float32_cannot_rank, test_ties
- the slack of m_k: test_slack_of_the_last_product
- unit vectors rounded before the centre is subtracted: test_near_directions
- `in_order` left out: test_values_that_round_to_ties
"""

import pytest
import torch
from cases import RUNS
from tolerance import assert_nearest

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked import search
from scclip_fast.chunked.certificate import product_margin, undecided_products

METRICS = ("euclidean", "cosine", "inner_product")


@pytest.mark.parametrize("metric", METRICS[1:])
@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e25), (torch.float64, 1e150)])
def test_magnitudes(metric, dtype, size):
    """Norms whose squares over- and underflow beside ordinary ones."""
    sizes = torch.tensor([1, size, 1 / size], dtype=dtype)
    x, queries = torch.randn(90, 8).to(dtype), torch.randn(9, 8).to(dtype)
    x, queries = x * sizes[torch.arange(90) % 3, None], queries * sizes[torch.arange(9) % 3, None]
    for some in (slice(None), slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)):
        assert_values(sf.knn(x[some], 20, queries, metric), x[some], queries, metric)


@pytest.mark.parametrize("size", [1, 1e25, 1e-25])
def test_products_that_float32_cannot_rank(size):
    """Tokens far from the origin, whose products differ by less than float32 rounds."""
    x, queries = 1000 + 0.01 * torch.randn(400, 32), size * (1 + torch.rand(40, 32))
    search.counts.clear()
    assert_nearest(sf.knn(x, 9, queries, "inner_product"), x, 9, queries, "inner_product")
    assert search.counts["float64"] == 40 and search.counts["differences"] == 0


def test_squares_that_underflow():
    x, queries = 1e-24 * (1000 + 0.01 * torch.randn(400, 32)), 1 + torch.rand(40, 32)
    assert_values(sf.knn(x, 9, queries, "inner_product"), x, queries, "inner_product")


def test_one_huge_token_leaves_the_others_decided():
    x, queries = torch.randn(500, 32), torch.randn(40, 32)
    x[7] = 1e4 * torch.randn(32)
    search.counts.clear()
    assert_nearest(sf.knn(x, 9, queries, "inner_product"), x, 9, queries, "inner_product")
    assert search.counts["float64"] <= 2


@pytest.mark.parametrize("metric", METRICS)
def test_ties(metric):
    """Every value occurs 25 times, so that no products decide which tokens are the k nearest."""
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).repeat(25, 1)
    queries = x[:5]
    search.counts.clear()
    values, indices = sf.knn(x, 40, queries, metric)
    expected = reference.knn(x.double()[None], 40, queries.double()[None], metric)
    assert torch.equal(indices, expected[1][0])
    assert torch.equal(values, expected[0][0].float())
    assert search.counts["differences"] == 5


def test_a_query_of_zeros_ties_with_every_token():
    values, indices = sf.knn(torch.randn(300, 7), 9, torch.zeros(2, 7), "inner_product")
    assert (values == 0).all() and torch.equal(indices, torch.arange(9).expand(2, 9))


@pytest.mark.parametrize("metric", METRICS)
def test_all_tokens_need_no_certificate(metric):
    x = torch.randn(64, 3).round()
    search.counts.clear()
    sf.knn(x, 64, x[:9], metric)
    assert search.counts["float64"] == 0


def assert_values(found, x, queries, metric):
    """Asserts a small relative error of the values, and that they are those at the indices."""
    exact = x.double()[None], queries.double()[None]
    right = reference.knn(exact[0], found[1].shape[-1], exact[1], metric)[0]
    at_indices = reference.DISTANCES[metric](*exact).gather(-1, found[1][None])
    at_indices = -at_indices if metric == "inner_product" else at_indices
    for expected in (right, at_indices):
        assert torch.allclose(found[0], expected[0].to(found[0].dtype), rtol=3e-7, atol=1e-38)
    assert (found[1].sort(dim=-1).values.diff(dim=-1) > 0).all(), "a neighbour twice"


def near_directions():
    return torch.randn(1, 48) * (1 + 3e-7 * torch.randn(400, 48)) * (1 + torch.rand(400, 1))


@pytest.mark.parametrize("device, backend", RUNS)
def test_near_directions(device, backend):
    """Directions that differ by a few units of float32's last place."""
    x = near_directions()
    if backend == "triton":  # which finds its candidates among unit vectors in float32
        x = torch.cat([x[:12], 20 * torch.randn(60, 48)])
    found = sf.knn(x.to(device), 9, metric="cosine", backend=backend)
    assert_cosines(found, x, 9)
    if backend != "triton":
        found = sf.knn(x.to(device), 9, x[:40].to(device), "cosine", backend=backend)
        assert_cosines(found, x, 9, x[:40])


def assert_cosines(found, x, k, queries=None):
    """Asserts a small relative error, however small the distances are."""
    exact = None if queries is None else queries.double()[None]
    right, _ = reference.knn(x.double()[None], k, exact, "cosine")
    assert torch.allclose(found[0].cpu().double(), right[0], rtol=1e-6, atol=1e-31)


@pytest.mark.parametrize("metric", METRICS[1:])
def test_values_that_round_to_ties(metric):
    """Values that differ in float64 and not in float32 come by lower index."""
    x = torch.ones(200, 2)
    x[:, 1] = torch.randperm(200) * 2.0**-31
    query = torch.tensor([[1.0, 1.0]])
    values, indices = sf.knn(x, 150, query, metric)
    ties = values.diff(dim=-1) == 0
    assert ties.sum() > 50 and (indices.diff(dim=-1)[ties] > 0).all()


def test_margin():
    """Twice the bound of one product, and no less than that for norms that underflow to 0."""
    gamma = (24 + 16) * 2.0**-24
    norms = torch.tensor([0.0, 1.0, 100.0])
    underflow = (24 * torch.finfo(torch.float32).tiny) ** 0.5
    right = 2 * gamma * (norms.double() + underflow)
    assert torch.allclose(product_margin(norms, 24).double(), right, rtol=1e-6, atol=0)


def test_many_tokens_that_are_not_finite():
    x, queries = torch.randn(200, 8), torch.randn(40, 8)
    x[:100:2], x[1:100:2] = torch.nan, torch.inf
    search.counts.clear()
    values, indices = sf.knn(x, 9, queries, "inner_product")
    assert values.isfinite().all() and (indices >= 100).all()
    assert search.counts["float64"] <= 2


def test_long_queries_are_decided():
    x, queries = torch.randn(500, 32), 1e25 * torch.randn(40, 32)
    search.counts.clear()
    assert_nearest(sf.knn(x, 9, queries, "inner_product"), x, 9, queries, "inner_product")
    assert search.counts["float64"] <= 2


def test_slack_of_the_last_product():
    """A row is open if the last score is above the last product by less than its rounding."""

    def is_open(score, k_value, norm):
        score, k_value, norm = torch.tensor([score, k_value, norm], dtype=torch.float64)
        rows = norm.view(1, 1), k_value.view(1, 1)
        return undecided_products(score.view(1, 1, 1), *rows, width=8, complete=False).item()

    assert is_open(1 + 2**-52, 1.0, 1.0) and not is_open(1 + 2**-48, 1.0, 1.0)
    assert is_open(-1 + 2**-52, -1.0, 1.0) and not is_open(-1 + 2**-48, -1.0, 1.0)
    # Products of rows this short underflow by up to 1e-307, which is 1e-7 of the norm.
    assert is_open(1e-8, 0.0, 1e-300) and not is_open(1e-6, 0.0, 1e-300)


@pytest.mark.parametrize("metric", METRICS[1:])
def test_while_a_graph_is_captured_no_row_is_listed(monkeypatch, metric):
    x, queries = torch.randn(150, 8), torch.randn(9, 8)
    expected = sf.knn(x, 20, queries, metric)
    monkeypatch.setattr(search, "_is_captured", lambda x: True)
    monkeypatch.setattr(search, "undecided_products", None)
    found = sf.knn(x, 20, queries, metric)
    assert torch.equal(found[1], expected[1]) and torch.allclose(found[0], expected[0])


@pytest.mark.parametrize("metric", METRICS)
def test_while_a_graph_is_captured_infinite_tokens_come_last(monkeypatch, metric):
    x, queries = torch.rand(60, 8), torch.rand(9, 8)
    x[:30] = torch.inf
    monkeypatch.setattr(search, "_is_captured", lambda x: True)
    values, indices = sf.knn(x, 20, queries, metric)
    assert values.isfinite().all() and (indices >= 30).all()

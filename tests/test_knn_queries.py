"""`knn` of queries in a bank of tokens, and its metrics.

Each clause that makes a result exact was broken by hand, and these tests failed:

- `product_margin` 0: test_products_that_float32_cannot_rank; halved, or without sqrt(D t):
  test_margin
- tokens whose norm overflows taken for tokens that are not finite: test_magnitudes; and the other
  way round: test_many_tokens_that_are_not_finite
- rows not scaled before their norm: test_products_that_float32_cannot_rank of long and short rows
- tokens that are not finite measured as infinite products:
  test_while_a_graph_is_captured_infinite_tokens_come_last
- the largest norm for the norm of each token: test_one_huge_token_leaves_the_others_decided
- no float64 pass, no measured pass: test_products_that_float32_cannot_rank, test_ties
- the slack of m_k: test_slack_of_the_last_product
- unit vectors rounded before the centre is subtracted: test_near_directions
- the channel of tokens of zeros left out, or their own neighbours left to the search:
  test_tokens_of_zeros
- `in_order` left out: test_values_that_round_to_ties
"""

import pytest
import torch
from cases import DEVICES, DTYPES, RUNS
from tolerance import TIE

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked import search
from scclip_fast.chunked.certificate import product_margin, undecided_products

METRICS = ("euclidean", "cosine", "inner_product")
ON_TORCH = [run for run in RUNS if run.values[1] == "torch"]


def assert_nearest(found, x, k, queries=None, metric="euclidean"):
    """Asserts that the values are float64's, in order, and those of the tokens at the indices."""
    values, indices = (t.cpu() for t in found)
    x, queries = (None if t is None else t.detach().double().cpu() for t in (x, queries))
    rows = x if queries is None else queries
    assert indices.dtype == torch.int64 and indices.shape == (*rows.shape[:-1], k)
    batch = [t if t.dim() == 3 else t[None] for t in (x, rows)]
    distances = reference.DISTANCES[metric](*batch).view(*rows.shape[:-1], x.shape[-2])
    expected, _ = reference.knn(batch[0], k, None if queries is None else batch[1], metric)
    sign = -1 if metric == "inner_product" else 1
    at_indices = sign * distances.gather(-1, indices)
    scale = 1.0
    if metric == "inner_product":  # sums in float64, whose rounding is that of their terms
        norms = (torch.linalg.vector_norm(t, dim=-1) for t in (rows, x))
        scale = next(norms)[..., None] * next(norms).amax(dim=-1)[..., None, None]
    relative = TIE if metric == "euclidean" else 2.0**-23
    for right in (at_indices, expected.view_as(values)):
        error = (values.double() - right).abs()
        allowed = relative * right.abs() + (0 if metric == "euclidean" else 1e-14 * scale)
        assert (error <= allowed).all(), f"off by {(error - allowed).max():.1e}"
    assert (sign * values.diff(dim=-1) >= 0).all()
    assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a neighbour twice"
    if queries is None:
        assert (indices != torch.arange(x.shape[-2])[:, None]).all()


BANKS = [
    (1, 30, 1, 5, 1),
    (1, 30, 1000, 64, 30),
    (2, 196, 31, 257, 9),
    (2, 577, 1, 3, 400),
    (1, 1500, 31, 33, 400),
    (1, 1500, 1000, 48, 30),
    (3, 33, 0, 5, 33),
    (1, 1, 4, 3, 1),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device, backend", ON_TORCH)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("b, n, m, d, k", BANKS)
def test_queries(device, backend, metric, b, n, m, d, k):
    x, queries = torch.randn(b, n, d, device=device), torch.randn(b, m, d, device=device)
    found = sf.knn(x, k, queries, metric, backend=backend)
    assert found[0].dtype == torch.float32
    assert_nearest(found, x, k, queries, metric)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("b, n, d, k", [(4, 196, 24, 9), (1, 441, 64, 30), (2, 2, 1, 1)])
def test_among_themselves(device, backend, metric, b, n, d, k):
    if backend == "triton" and metric == "inner_product":
        pytest.skip("the kernels do not rank by products")
    x = torch.randn(b, n, d, device=device)
    assert_nearest(sf.knn(x, k, metric=metric, backend=backend), x, k, metric=metric)


@pytest.mark.parametrize("metric", METRICS[1:])
def test_a_batch_of_many_images(metric):
    x = torch.randn(64, 196, 16)
    assert_nearest(sf.knn(x, 9, metric=metric), x, 9, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dtypes(metric, dtype):
    x, queries = torch.randn(70, 24).to(dtype), torch.randn(31, 24).to(dtype)
    for asked in (None, queries):
        found = sf.knn(x, 20, asked, metric)
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_nearest(found, x, 20, asked, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_another_short_dtype(metric):
    x, queries = torch.randn(70, 24), torch.randn(31, 24)
    assert_nearest(sf.knn(x, 9, queries.half(), metric), x, 9, queries.half(), metric)
    assert_nearest(sf.knn(x.bfloat16(), 9, queries, metric), x.bfloat16(), 9, queries, metric)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_queries_equal_to_tokens_are_not_left_out(backend):
    x = 100 + torch.randn(200, 16)
    distances, indices = sf.knn(x, 2, x[50:90], backend=backend)
    assert (distances[:, 0] == 0).all() and torch.equal(indices[:, 0], torch.arange(50, 90))
    distances, indices = sf.knn(x, 2, 4 * x[50:90], "cosine", backend=backend)
    assert (distances[:, 0] == 0).all() and torch.equal(indices[:, 0], torch.arange(50, 90))


@pytest.mark.parametrize("metric", METRICS)
def test_images_and_rows_are_independent(metric):
    x, queries = torch.randn(3, 70, 12), torch.randn(3, 31, 12)
    together = sf.knn(x, 9, queries, metric)
    for image in range(3):
        alone = sf.knn(x[image], 9, queries[image], metric)
        one = sf.knn(x[image], 9, queries[image, 5:6].expand(1, 12), metric)
        for i in range(2):
            assert torch.equal(together[i][image], alone[i])
            assert torch.equal(alone[i][5:6], one[i])


@pytest.mark.parametrize("device, backend", ON_TORCH)
@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_are_not_finite_come_last(device, backend, metric):
    x, queries = torch.randn(2, 70, 12), torch.randn(2, 9, 12)
    clean = sf.knn(x[:, 3:], 9, queries, metric)
    x[:, 0, 0], x[:, 1, 3], x[:, 2] = torch.nan, torch.inf, -torch.inf
    worst = -torch.inf if metric == "inner_product" else torch.inf
    values, indices = sf.knn(x.to(device), 9, queries.to(device), metric, backend=backend)
    assert torch.equal(indices.cpu() - 3, clean[1])
    assert torch.allclose(values.cpu(), clean[0], rtol=1e-5)
    queries[:, 4, 1] = torch.nan
    values, indices = sf.knn(x.to(device), 70, queries.to(device), metric, backend=backend)
    assert (values[:, 4] == worst).all() and (values[..., 67:] == worst).all()
    assert values[:, :4, :67].isfinite().all()
    assert torch.equal(indices[:, :4, 67:].cpu(), torch.arange(3).expand(2, 4, 3))


@pytest.mark.parametrize("device, backend", RUNS)
def test_tokens_of_zeros(device, backend):
    x, queries = torch.randn(1, 60, 4), torch.randn(1, 7, 4)
    x[0, [3, 8, 9]], queries[0, 2] = 0, 0
    assert_nearest(
        sf.knn(x.to(device), 59, metric="cosine", backend=backend), x, 59, None, "cosine"
    )
    _, indices = sf.knn(x.to(device), 5, metric="cosine", backend=backend)
    assert indices[0, 3].tolist() == [0, 1, 2, 4, 5] and indices[0, 8].tolist() == [0, 1, 2, 3, 4]
    if backend == "triton":
        return
    found = sf.knn(x.to(device), 60, queries.to(device), "cosine", backend=backend)
    assert_nearest(found, x, 60, queries, "cosine")
    x[0, 0] = torch.nan
    search.counts.clear()
    distances, indices = sf.knn(x, 60, queries, "cosine", backend=backend)
    assert indices[0, 2].tolist() == [*range(1, 60), 0]
    assert (distances[0, 2, :59] == 1).all() and distances[0, 2, 59] == torch.inf


def test_queries_of_zeros_are_not_searched_again():
    search.counts.clear()
    sf.knn(torch.randn(200, 4), 5, torch.zeros(100, 4), "cosine")
    assert search.counts["float64"] == 0


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


@pytest.mark.parametrize("device", DEVICES)
def test_defaults_take_what_triton_does_not(device):
    x = torch.randn(300, 6, device=device)
    with sf.backend("triton"):
        for k, queries, metric in [(9, x[:5], "euclidean"), (200, None, "cosine")]:
            assert_nearest(sf.knn(x, k, queries, metric), x, k, queries, metric)
        assert_nearest(sf.knn(x, 9, metric="inner_product"), x, 9, metric="inner_product")


X = torch.randn(2, 30, 6)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"queries": X[..., :5]}, ValueError, r"must be \(2, M, 6\).* got shape \(2, 30, 5\)"),
        ({"queries": X[0]}, ValueError, r"must be \(2, M, 6\).* got shape \(30, 6\)"),
        ({"queries": X[:1]}, ValueError, r"must be \(2, M, 6\).* got shape \(1, 30, 6\)"),
        ({"queries": X[..., 0, 0]}, ValueError, r"must be \(2, M, 6\).* got shape \(2,\)"),
        ({"queries": X.double()}, TypeError, "queries must be float64 if and only if x is"),
        ({"queries": X.long()}, TypeError, "queries must have a floating dtype"),
        ({"queries": [[1.0]]}, TypeError, "queries must be a torch.Tensor, got list"),
        ({"queries": X.to("meta")}, ValueError, "on one device, got x on cpu, queries on meta"),
        ({"metric": "l1"}, ValueError, "metric must be 'euclidean', .*'inner_product', got 'l1'"),
        ({"metric": None}, ValueError, "metric must be 'euclidean'.* got None"),
        ({"k": 30}, ValueError, "k must be smaller than the number of tokens, got k=30"),
        ({"k": 31, "queries": X}, ValueError, r"k must be in \[1, 30\] with queries.* got 31"),
        ({"k": 0, "queries": X}, ValueError, r"k must be in \[1, 30\].* got 0"),
        ({"queries": X / 0, "check_finite": True}, ValueError, "queries must be finite: 60 token"),
        ({"queries": X, "backend": "triton"}, ValueError, "queries must be None .* use backend"),
        (
            {"metric": "inner_product", "backend": "triton"},
            ValueError,
            'metric must be "euclidean" or "cosine" on backend "triton"',
        ),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        sf.knn(**{"x": X, "k": 3} | arguments)

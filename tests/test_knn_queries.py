"""`knn` of queries in a bank of tokens, by each metric.

Each of these clauses was broken by hand, and these tests failed:

- the channel of tokens of zeros left out, or their own neighbours left to the search:
  test_tokens_of_zeros
- queries of zeros searched: test_queries_of_zeros_are_not_searched_again
- the first query taken for the first token: test_queries
- inf in place of -inf for products: test_tokens_that_are_not_finite_come_last
"""

import pytest
import torch
from cases import DEVICES, DTYPES, RUNS
from tolerance import assert_nearest

import scclip_fast as sf
from scclip_fast.chunked import search

METRICS = ("euclidean", "cosine", "inner_product")


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
@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("b, n, m, d, k", BANKS)
def test_queries(device, backend, metric, b, n, m, d, k):
    if backend == "triton" and (
        metric == "inner_product" or k > 128 or (device, m) == ("cpu", 1000)
    ):
        pytest.skip("the kernels do not take it, or the interpreter takes long")
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_another_short_dtype(backend, metric):
    x, queries = torch.randn(70, 24), torch.randn(31, 24)
    with sf.backend(backend):  # unlike the argument, a scope gives way
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


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("metric", METRICS)
def test_tokens_that_are_not_finite_come_last(device, backend, metric):
    if backend == "triton" and metric == "inner_product":
        pytest.skip("the kernels do not rank by products")
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
    found = sf.knn(x.to(device), 60, queries.to(device), "cosine", backend=backend)
    assert_nearest(found, x, 60, queries, "cosine")
    x[0, 0] = torch.nan
    search.counts.clear()
    found = sf.knn(x.to(device), 60, queries.to(device), "cosine", backend=backend)
    distances, indices = (t.cpu() for t in found)
    assert indices[0, 2].tolist() == [*range(1, 60), 0]
    assert (distances[0, 2, :59] == 1).all() and distances[0, 2, 59] == torch.inf


def test_queries_of_zeros_are_not_searched_again():
    search.counts.clear()
    sf.knn(torch.randn(200, 4), 5, torch.zeros(100, 4), "cosine")
    assert search.counts["float64"] == 0


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

"""Tests the kernels of the neighbour search on queries and a bank, which are two sets of tokens.

The table lists the parts that were broken by hand, with a test that failed then.

| broken | fails |
|---|---|
| queries are rounded about their own centre | queries of a bank [bins, panel] |
| `bins` leaves out the token itself | queries of a bank [bins] |
| `collect` leaves out the token itself | full bins keep the token itself |
| `search` leaves out the token itself | a bank as its own queries [measured] |
| `bins`: images of rows and of columns, or a of the columns for rows | queries of a bank [bins] |
| `certify`: the number of columns for rows | queries of a bank [bins]; M < N corrupts memory |
| `collect`: the number of rows for columns, or the columns' y for rows | queries of a bank [bins] |
| `collect`: the columns' stride of an image for y or a of the rows | kinds of tokens [bins-flat] |
| `search`: the number of columns for rows | queries of a bank [measured] |
| `search`, `settle`: the columns' channel stride for rows | strided sets [measured], [panel] |
| `settle`: the columns' stride of an image for rows | kinds of tokens [panel-randn] |
| `settle`, `merge`: the wrong number of rows an image | memory is corrupt |
"""

from __future__ import annotations

import pytest
import torch
from cases import GPU, clusters
from two_sets import KINDS, assert_nearest, flat, two_sets

from scclip_fast.kernels import knn
from scclip_fast.kernels.knn_details.table import positions

DEVICE = "cuda" if GPU else "cpu"
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=["panel", "bins", "measured"])
def path(request, monkeypatch):
    """Runs a half-precision chain, or the search over measured distances, on all sizes."""
    least = 10**9 if request.param == "measured" else 1
    monkeypatch.setattr(knn, "LEAST_TOKENS_FOR_HALF", least)
    if request.param == "bins":
        monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", 0)
    return request.param


@pytest.fixture
def searched(monkeypatch):
    """Returns a list of the number of rows that each pass of a chain leaves to the search."""
    monkeypatch.setattr(knn, "LEAST_TOKENS_FOR_HALF", 1)
    counts: list[int] = []
    search = knn._search

    def counting_search(*args):
        counts.append(args[-1].n_tokens.sum().item())
        return search(*args)

    monkeypatch.setattr(knn, "_search", counting_search)
    return counts


@pytest.fixture
def collected(monkeypatch):
    """Runs the chain over bins; returns a list of the rows that each pass leaves to `collect`."""
    monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", 0)
    counts: list[int] = []
    collect = knn.collect

    def counting_collect(rows, columns, exclude_self, undecided, table, first):
        counts.append(undecided.n_positions.sum().item())
        return collect(rows, columns, exclude_self, undecided, table, first)

    monkeypatch.setattr(knn, "collect", counting_collect)
    return counts


def nearest(x, queries, k, measure_all=True):
    """The distances and indices of `nearest_triton`, on the CPU."""
    found = knn.nearest_triton(x.to(DEVICE), k, measure_all, queries.to(DEVICE))
    return tuple(t.cpu() for t in found)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "b, m, n, d, k, dtype",
    [
        (1, 1, 30, 5, 1, FLOAT),
        (3, 1, 1500, 20, 30, HALF),
        (1, 31, 48, 3, 48, BRAIN),
        (3, 31, 200, 40, 30, BRAIN),
        (1, 40, 1500, 24, 48, FLOAT),
        (3, 200, 70, 17, 30, FLOAT),
        pytest.param(1, 1000, 130, 24, 30, HALF, marks=pytest.mark.slow),
        pytest.param(2, 129, 1100, 9, 48, FLOAT, marks=pytest.mark.slow),
    ],
)
def test_queries_of_a_bank(path, b, m, n, d, k, dtype):
    queries, x = (t.to(dtype) for t in two_sets(clusters, b, m, n, d))
    assert_nearest(nearest(x, queries, k), queries, x, k)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "b, m, n, d",
    [pytest.param(1, 1, 1500, 40, marks=pytest.mark.slow), (1, 40, 130, 9), (3, 9, 128, 17)],
)
def test_128_neighbours(b, m, n, d, k=128):
    queries, x = two_sets(torch.randn, b, m, n, d)
    assert_nearest(nearest(x, queries, k), queries, x, k)


@pytest.mark.usefixtures("poisoned", "path")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tokens(kind, k=20):
    queries, x = two_sets(kind, 2, 60, 300, 12)
    assert_nearest(nearest(x, queries, k), queries, x, k)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("far", [50.0, 1e6, 1e15])
def test_queries_far_from_the_bank(far, k=9):
    """The bank's centre and scale serve queries that are nowhere near it."""
    x, queries = torch.randn(2, 150, 12), torch.randn(2, 40, 12)
    queries[:, ::2] += far
    assert_nearest(nearest(x, queries, k), queries, x, k)


@pytest.mark.usefixtures("path")
def test_a_query_finds_the_bank_rows_equal_to_it():
    """Each bank row stands there twice, at distance exactly 0; the lower index comes first."""
    half = torch.randn(2, 90, 16)
    x = torch.cat([half, half], dim=1)
    distances, indices = nearest(x, half, 3)
    own = torch.arange(90)
    assert (distances[..., :2] == 0).all() and (distances[..., 2] > 0).all()
    assert (indices[..., 0] == own).all() and (indices[..., 1] == own + 90).all()


def test_full_bins_keep_the_token_itself(collected, searched, k=9):
    """46 near columns share two bins of each share; `collect` finds all for 9 queries."""
    x = 10 * torch.randn(1, 1500, 8)
    places = 64 * torch.arange(23)[:, None] + torch.tensor([5, 6])
    x[:, positions(1500).argsort()[places.flatten()]] = 3 + 1e-5 * torch.randn(46, 8)
    queries = x[:, :300].clone()
    found = nearest(x, queries, k)
    assert_nearest(found, queries, x, k)
    assert (found[1][0, :, 0] == torch.arange(300)).all()
    assert collected[0] >= 9 and not searched[0]


@pytest.mark.parametrize("most_columns", [0, knn.MOST_COLUMNS_OF_PANEL], ids=["bins", "panel"])
def test_rows_that_nothing_decides_keep_the_token_itself(most_columns, searched, monkeypatch, k=9):
    """The search takes queries with over 64 candidates, and those that are not finite."""
    monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", most_columns)
    x = torch.randn(1, 200, 8) * 1e-7
    x[:, ::2] += 1
    queries = x[:, 40:110].clone()
    queries[0, 3, 2] = torch.nan
    found = nearest(x, queries, k)
    assert_nearest(found, queries, x, k)
    finite = torch.arange(70) != 3
    assert (found[1][0, finite, 0] == torch.arange(40, 110)[finite]).all()
    assert searched == [70]


@pytest.mark.usefixtures("poisoned", "path")
def test_queries_and_bank_rows_that_are_not_finite(k=12):
    """A query that is not finite has the first tokens at distance NaN; such tokens come last."""
    queries, x = two_sets(torch.randn, 2, 40, 20, 6)
    queries[0, 5, 1], queries[1, 8, 0], queries[1, 9] = torch.nan, torch.inf, -torch.inf
    x[0, 3:12, 2], x[1, 0, 0] = torch.nan, torch.inf
    found = nearest(x, queries, k)
    assert_nearest(found, queries, x, k)
    assert found[0][0, 5].isnan().all() and found[1][0, 5].tolist() == [*range(k)]
    assert found[0][0, 0].isfinite().sum() == 11


@pytest.mark.usefixtures("poisoned", "path")
def test_strided_sets(k=9):
    """Queries and bank have strides of their own, along each dimension."""
    x = torch.randn(140, 2, 40)[..., ::2].transpose(0, 1)
    queries = torch.randn(3, 20, 2, 35)[1].transpose(0, 1).transpose(1, 2)
    assert len({*x.stride(), *queries.stride()}) == 6
    assert_nearest(nearest(x, queries, k), queries, x, k)


@pytest.mark.usefixtures("path")
def test_the_distance_of_the_kth_neighbour_alone(k=9):
    queries, x = two_sets(clusters, 2, 50, 300, 24)
    every, kth = (nearest(x, queries, k, measure_all) for measure_all in (True, False))
    assert kth[0].shape == (2, 50, 1) and torch.equal(kth[0], every[0][..., -1:])
    assert torch.equal(kth[1].sort(dim=-1).values, every[1].sort(dim=-1).values)


@pytest.mark.usefixtures("path")
def test_a_bank_as_its_own_queries(k=9):
    """Queries leave out nothing: each token comes first, and then the others that a self search
    finds, bit for bit."""
    x = clusters(2, 150, 20)
    distances, indices = nearest(x, x, k + 1)
    others = tuple(t.cpu() for t in knn.nearest_triton(x.to(DEVICE), k, True))
    assert (distances[..., 0] == 0).all() and (indices[..., 0] == torch.arange(150)).all()
    assert torch.equal(distances[..., 1:], others[0]) and torch.equal(indices[..., 1:], others[1])


@pytest.mark.parametrize("measure_all", [True, False])
def test_no_queries(measure_all):
    distances, indices = nearest(torch.randn(2, 150, 8), torch.empty(2, 0, 8), 5, measure_all)
    assert distances.shape == (2, 0, 5 if measure_all else 1) and distances.dtype == FLOAT
    assert indices.shape == (2, 0, 5) and indices.dtype == torch.int64


@pytest.mark.parametrize("most_columns", [0, knn.MOST_COLUMNS_OF_PANEL], ids=["bins", "panel"])
def test_passes_and_images_agree(most_columns, searched, monkeypatch, k=9):
    """Several passes of queries, and images one by one, give the same bits."""
    monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", most_columns)
    queries, x = two_sets(flat, 2, 300, 140, 20)
    whole = nearest(x, queries, k)
    monkeypatch.setattr(knn, "BINS_BYTES", 1)
    monkeypatch.setattr(knn, "PANEL_BYTES", 1)
    searched.clear()
    parts = nearest(x, queries, k)
    assert len(searched) == 6  # two images of three blocks of queries
    assert all(map(torch.equal, whole, parts))


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, d", [(5184, 82_944, 768), (1000, 1500, 72), (1, 5184, 1024)])
def test_sizes_that_people_have(m, n, d, k=30):
    """float64 decides 64 of the queries of a bank."""
    queries, x = two_sets(clusters, 1, m, n, d)
    distances, indices = nearest(x, queries, k)
    some = slice(0, m, max(1, m // 64))
    assert_nearest((distances[:, some], indices[:, some]), queries[:, some], x, k)

"""Neighbours on inputs where a search by products errs, and the certificate that finds these rows.

Each guarantee of `chunked/certificate.py` and `chunked/search.py` has an input that only it saves.
Each clause was broken by hand, and these tests failed:

- gamma = 0 in the first condition: test_a_dropped_neighbour_leaves_its_row_undecided
- `2 a` for `2 a + r` in the bound: test_the_bound_grows_with_the_token_that_was_dropped
- rho = 0: test_the_rounding_of_the_measured_distance_counts
- gamma = 0 in the second condition, or the condition left out:
  test_candidates_that_were_not_measured_are_neighbours
- `r == 0` left out: test_k_distances_of_duplicates_are_searched_once
- no second pass: test_every_neighbour, test_clusters_as_scikit_learn_finds_them
- no third pass: test_every_neighbour of quanta, test_ties_beyond_the_candidates
- the mean for the remedian: test_one_far_token_leaves_the_others_decided
- gamma before the square, which then is finite: test_rows_whose_squares_overflow_are_undecided

Of `chunked/symmetric.py`:

- no row of `_k_distances` left undecided: test_every_neighbour
- the k-th candidate as the last of the list, and not the next one: test_every_neighbour
- the error of products in float64 left out: test_knn's duplicates at distance zero
- candidates of float32 taken for complete: test_candidates_that_float32_misses
- equal distances left in any order: test_ties_beyond_the_candidates
- distances of 0 left in any order: test_float64
- no flipped tiles: test_ties_beyond_the_candidates
"""

import pytest
import torch
from cases import RUNS
from sklearn.neighbors import LocalOutlierFactor as Theirs
from tolerance import assert_neighbors, decided

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked import numpy_topk, search, symmetric, tiles, topk
from scclip_fast.chunked.certificate import undecided_lists
from scclip_fast.chunked.distances import distances_by_products


def far_clusters(gap, n=200):
    x = torch.randn(n, 2) * 5
    x[n // 2 :, 0] += gap
    return x


def sentinels():
    x = torch.randn(250, 6)
    x[::50, 3] = -999_999
    return x


def fill_values():
    x = torch.randn(160, 12)
    x[::3] = -9999 + 1e-2 * torch.randn(54, 12)
    return x


def one_far(value):
    x = torch.randn(160, 5)
    x[7] = value
    return x


def magnitudes():
    x = torch.randn(160, 8)
    x[::2] += 1e15
    return x


def quanta():
    """Half of the tokens differ by a few units of float32's last place, most at equal distances."""
    x = torch.randint(6, (160, 8)) / 8.0
    x[::2] += 2.0**20
    return x


EXTREMES = {
    "quanta": quanta,
    "clusters far apart": lambda: far_clusters(50_000),
    "clusters very far apart": lambda: far_clusters(1e9),
    "clusters at a gap of 600": lambda: far_clusters(3000),
    "sentinels": sentinels,
    "fill values": fill_values,
    "one at 1e8": lambda: one_far(1e8),
    "one at 1e18": lambda: one_far(1e18),
    "one at 1e20": lambda: one_far(1e20),
    "one at 1e37": lambda: one_far(1e37),
    "fifteen orders of magnitude": magnitudes,
    "offset": lambda: torch.randn(160, 16) + 1e6,
    "small spread": lambda: 1 + 1e-6 * torch.randn(160, 16),
    "small numbers": lambda: 1e-12 * torch.randn(160, 16),
    "lines": lambda: torch.arange(160.0)[:, None] * torch.tensor([1e-3, 1e4]),
}


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("kind", EXTREMES)
def test_every_neighbour(device, backend, kind):
    """Neighbours are float64's, and so are the scores that no tie can change."""
    x, k = EXTREMES[kind](), 9
    _, indices = sf.knn(x.to(device), k, backend=backend)
    assert_neighbors(indices[None], x=x[None], k=k)
    scores = sf.lof_scores(x.to(device), k, backend=backend).cpu()
    sure = decided(indices[None], x=x[None])[0]
    expected = sf.lof_scores(x.double(), k, backend="reference")
    expected = expected.clamp(max=torch.finfo(torch.float32).max)
    overflow = x.double().square().sum(dim=-1) > 3e38
    assert torch.allclose(scores.double()[sure & ~overflow], expected[sure & ~overflow], rtol=1e-4)
    assert scores[overflow].isfinite().all()
    assert (scores[overflow] > scores[~overflow].max()).all()


@pytest.mark.parametrize("kind", EXTREMES)
def test_every_neighbour_among_candidates_of_float32(monkeypatch, kind):
    """Large images have their candidates' products alone in float64, small ones all."""
    monkeypatch.setattr(symmetric, "FLOAT64_TOKENS", 0)
    x = EXTREMES[kind]()
    assert_neighbors(sf.knn(x, 9, backend="torch")[1][None], x=x[None], k=9)


def test_candidates_that_float32_misses():
    """A cluster far from the centre, as far as distances by products in float64 are exact."""
    x = torch.randn(symmetric.FLOAT64_TOKENS + 80, 64)
    x[::2, 0] += 6000
    _, indices = sf.knn(x, 9, backend="torch")
    assert torch.equal(indices, reference.knn(x[None].double(), 9)[1][0])


@pytest.mark.parametrize("kind", EXTREMES)
def test_float64(kind):
    x = EXTREMES[kind]().double()
    x[3] = 1e40  # a square of 1e80
    _, indices = sf.knn(x, 9)
    assert torch.equal(
        indices.sort(dim=-1).values, reference.knn(x[None], 9)[1][0].sort(dim=-1).values
    )


@pytest.mark.parametrize("device, backend", RUNS)
def test_clusters_as_scikit_learn_finds_them(device, backend):
    """Two clusters far apart, of which every neighbour was wrong and 34 of 50 outliers agreed."""
    x = far_clusters(50_000, 400)
    theirs = Theirs(20).fit(x.numpy())
    _, indices = sf.knn(x.to(device), 20, backend=backend)
    found, expected = indices.cpu().sort(dim=-1).values, theirs.kneighbors()[1]
    assert torch.equal(found, torch.from_numpy(expected).sort(dim=-1).values)
    scores = sf.lof_scores(x.to(device), 20, variant="breunig", backend=backend)
    right = torch.from_numpy(-theirs.negative_outlier_factor_)
    assert torch.allclose(scores.cpu().double(), right.double(), rtol=1e-5)


def test_new_rows_of_the_estimator():
    """New rows beside these clusters, whose scores were off by a quarter."""
    from scclip_fast.sklearn import LocalOutlierFactor

    x = far_clusters(50_000).numpy()
    new = x[::7] + 0.5
    for kind in (float, "float32"):
        ours = LocalOutlierFactor(20, novelty=True).fit(x.astype(kind))
        theirs = Theirs(20, novelty=True).fit(x.astype(kind))
        found = torch.from_numpy(ours.score_samples(new.astype(kind))).double()
        right = torch.from_numpy(theirs.score_samples(new.astype(kind))).double()
        assert torch.allclose(found, right, rtol=1e-5)


def image_like(b, n, d):
    """Smooth regions, noise, and some long tokens."""
    side = int(n**0.5)
    coarse = torch.randn(b, d, side // 4, side // 4)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    x = smooth.flatten(2).mT + 0.5 * torch.randn(b, n, d)
    x[:, ::37] *= 3
    return x


def test_image_like_features_are_decided():
    """The second and third pass, which are slow, search almost no rows of ordinary data."""
    x = image_like(2, 576, 256)
    search.counts.clear()
    sf.lof_scores(x, 30, backend="torch")
    assert search.counts["product"] == 2 * 576
    assert search.counts["float64"] <= 3 and search.counts["differences"] == 0


@pytest.mark.parametrize("value", [1e4, 1e8, 1e18])
def test_one_far_token_leaves_the_others_decided(value):
    x = image_like(1, 576, 64)
    x[0, 100] = value
    search.counts.clear()
    sf.lof_scores(x, 30, backend="torch")
    assert search.counts["float64"] <= 4


def test_ties_beyond_the_candidates():
    """Points of a cubic grid: 6 neighbours at one distance, 12 at the next, 8 at the third."""
    x = torch.cartesian_prod(*[torch.arange(16.0)] * 3)[:4000] + 1000
    search.counts.clear()
    distances, indices = sf.knn(x, 20, backend="torch")
    expected = reference.knn(x[None].double(), 20)
    assert torch.equal(indices, expected[1][0])
    assert torch.allclose(distances.double(), expected[0][0])
    assert search.counts["differences"] > 1000


def assert_same_neighbors(found, expected):
    """The same sets, and distances but for the rounding of another sum."""
    assert torch.equal(*(indices.sort(dim=-1).values for indices in (found[1], expected[1])))
    assert torch.allclose(found[0], expected[0], rtol=1e-6)


def test_rows_whose_squares_overflow_are_undecided():
    """Two clusters on either side of the centre, so far away that products rank none of them."""
    n, far = 41, 1e20
    sample = [i * (n - 1) // 8 for i in range(9)]
    sides = torch.ones(n, 1)
    sides[1::2] = -1
    sides[sample] = torch.tensor([0.0] * 3 + [1] * 3 + [-1] * 3)[:, None]
    x = far * (sides + 1e-5 * torch.randn(n, 3))
    x[sample[:3]] /= far
    search.counts.clear()
    _, indices = search.nearest(x[None], 1, measure_all=False)
    assert torch.equal(indices, reference.knn(x[None].double(), 1)[1])
    assert search.counts["float64"] == n - 3


@pytest.mark.parametrize("every", [True, False])
def test_the_set_does_not_depend_on_the_products(monkeypatch, every):
    """The neighbours are the same if every pass leaves all rows to the next one."""
    x = image_like(1, 196, 48)
    expected = search.nearest(x, 9, measure_all=every)
    again = []

    def lists(squares, *_, **__):
        again.append(squares.dtype)
        return torch.ones(squares.shape[:-1], dtype=torch.bool)

    for module in (search, symmetric):
        monkeypatch.setattr(module, "undecided_lists", lists)
    monkeypatch.setattr(symmetric, "undecided", lambda norms, *_, **__: norms == norms)
    monkeypatch.setattr(symmetric, "FLOAT64_TOKENS", 0)
    assert_same_neighbors(search.nearest(x, 9, measure_all=every), expected)
    assert again == [torch.float32, torch.float64]


@pytest.mark.parametrize("every", [True, False])
def test_while_a_graph_is_captured_no_row_is_listed(monkeypatch, every):
    """All rows are searched by differences, because listing some would wait for the GPU."""
    x = torch.cat([image_like(1, 196, 48), far_clusters(50_000)[None, :196].repeat(1, 1, 24)])
    expected = search.nearest(x, 9, measure_all=every)
    monkeypatch.setattr(search, "_is_captured", lambda x: True)
    monkeypatch.setattr(search, "undecided_lists", None)
    assert_same_neighbors(search.nearest(x, 9, measure_all=every), expected)


def test_queries_among_tokens_of_any_size():
    x, queries = magnitudes()[None], magnitudes()[None, :31]
    distances, indices = search.nearest(x, 5, queries)
    d2 = torch.cdist(queries.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    right, _ = d2.topk(5, largest=False, sorted=True)
    assert torch.allclose(distances.double(), right, rtol=1e-5)
    assert torch.allclose(d2.gather(-1, indices), right, rtol=1e-5)


def test_k_distances_of_duplicates_are_searched_once():
    x = torch.randn(200, 16)
    x[:100], x[150:] = 3, 7  # at the centre and beside it
    search.counts.clear()
    distances, indices = sf.knn(x, 9, backend="torch")
    assert search.counts["differences"] == 0
    assert torch.equal(indices, reference.knn(x[None].double(), 9)[1][0])
    assert (distances[:100] == 0).all()
    search.counts.clear()
    distances, indices = search.nearest(x[None, :150], 9, measure_all=False)
    assert (distances[0, :100] == 0).all() and (indices[0, :100] < 100).all()
    assert search.counts["float64"] == 0


def test_two_tokens_one_of_them_not_finite():
    scores = sf.lof_scores(
        torch.tensor([[0.0], [torch.nan]]), 1, variant="breunig", backend="torch"
    )
    assert scores.isnan().all()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest(dtype, threads, monkeypatch):
    """Rows of one step and of several, with ties, infinite and negative numbers; 0: no numpy."""
    monkeypatch.setattr(topk, "HAS_NUMPY", threads > 0)
    monkeypatch.setattr(numpy_topk, "STEP", 2000)
    monkeypatch.setattr(numpy_topk, "SHARE", 4000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows, columns in ((0, 5), (5, 1), (5, 7), (60, 203), (31, 1000), (7, 2304)):
        values = torch.randint(50, (rows, columns)).to(dtype)
        values[1::4, ::3] = torch.inf
        values[2::4] = 4
        values[3::4] -= 25
        values[3::4, 5::7] = -torch.inf
        for k in {1, min(30, columns), columns}:
            found = topk.smallest(values, k)
            expected = values.sort(dim=-1, stable=True)
            assert all(torch.equal(a, b[:, :k]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("workspace", [tiles.WORKSPACE_BYTES, 2**16])
def test_distances_by_products_of_some_rows(monkeypatch, workspace):
    """With a small workspace, all channels take several steps."""
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", workspace)
    x = torch.randn(2, 50, 300) + 10
    neighbors, rows = torch.randint(100, (31, 7)), slice(40, 71)
    found = distances_by_products(x, x[:, :1], neighbors, rows)
    flat = x.double().flatten(0, 1)
    # Both images have a centre of their own, so that only neighbours of one image are compared.
    same = neighbors // 50 == torch.arange(40, 71)[:, None] // 50
    expected = (flat[rows, None] - flat[neighbors]).square().sum(dim=-1)
    assert torch.allclose(found[same], expected[same], rtol=1e-12)


class TestCertificate:
    """`undecided_lists` on estimates whose error is the largest that rounding may cause."""

    WIDTH = 4096
    GAMMA = WIDTH * torch.finfo(torch.float32).eps / 2

    def is_undecided(self, scores, a, r2, measured):
        """True if a row of norm a, k-distance r2 and these ascending scores is undecided."""
        scores, a = (torch.tensor(v, dtype=torch.float32)[None, None] for v in (scores, a))
        lists = scores, a, r2[None, None], measured
        return undecided_lists(*lists, self.WIDTH, complete=False).item()

    def score(self, a, d, error):
        """The estimate of d^2 for a token at the distance d from a row of norm a.

        error is the share of the largest possible rounding that the estimate has.
        """
        return d**2 + error * self.GAMMA * (2 * a + d) ** 2

    def drops(self, a, r, error, r2=None):
        """True if a row is undecided when a token at r has a score too high by `error`."""
        near = [self.score(a, share * r, 0) for share in (0.1, 0.2, 0.3, 0.9)]
        r2 = torch.tensor(r**2, dtype=torch.float64) if r2 is None else r2
        return self.is_undecided([*near, self.score(a, r, error)], a, r2, measured=5)

    def test_a_dropped_neighbour_leaves_its_row_undecided(self):
        assert self.drops(a=1.0, r=0.05, error=1)
        assert not self.drops(a=1.0, r=0.05, error=1.2)

    def test_the_bound_grows_with_the_token_that_was_dropped(self):
        assert self.drops(a=1.0, r=10.0, error=1)
        assert not self.drops(a=1.0, r=10.0, error=1.2)

    def test_the_rounding_of_the_measured_distance_counts(self):
        """A float32 sum of squares may be too low by its own bound."""
        r2 = torch.tensor(1.0)
        assert self.drops(a=0.0, r=1 + self.GAMMA / 2, error=1, r2=r2)
        assert self.drops(a=0.0, r=1 + self.GAMMA, error=1, r2=r2)
        assert not self.drops(a=0.0, r=1 + 3 * self.GAMMA, error=1, r2=r2)

    def test_candidates_that_were_not_measured_are_neighbours(self):
        """Two of five candidates are not measured. The score of the second is low by the bound."""
        a, r2 = 1.0, torch.tensor(0.05**2, dtype=torch.float64)
        for d, open_ in ((0.055, True), (0.03, False)):
            unmeasured = self.score(a, d, error=-1)
            scores = [unmeasured, unmeasured, *[self.score(a, 0.1, 0)] * 3]
            assert self.is_undecided(scores, a, r2, measured=3) is open_

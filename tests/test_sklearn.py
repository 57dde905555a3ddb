"""The estimator, compared with scikit-learn's class, and run through scikit-learn's own tests."""

import importlib
import sys

import numpy as np
import pytest
import sklearn.neighbors
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from scclip_fast.sklearn import METRICS, LocalOutlierFactor

Theirs = sklearn.neighbors.LocalOutlierFactor

# scikit-learn's tests create estimators as parameters when they are imported.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sklearn.neighbors, "LocalOutlierFactor", LocalOutlierFactor)
    sys.modules.pop("sklearn.neighbors.tests.test_lof", None)
    their_tests = importlib.import_module("sklearn.neighbors.tests.test_lof")
globals().update({n: test for n, test in vars(their_tests).items() if n.startswith("test_")})

#: Parts of the names of tests of scikit-learn that must fail here, and the reasons.
EXCLUDED = {
    "test_sparse": "tokens are dense: sparse matrices are refused",
    "test_lof_precomputed": "a matrix of all distances is what this class exists to avoid",
}


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def ours_for_theirs(request, monkeypatch):
    if request.function.__module__ != their_tests.__name__:
        return
    monkeypatch.setattr(sklearn.neighbors, "LocalOutlierFactor", LocalOutlierFactor)
    for part, reason in EXCLUDED.items():
        if part in request.node.name:
            refused = pytest.mark.xfail(reason=reason, raises=(TypeError, ValueError), strict=True)
            request.applymarker(refused)


@parametrize_with_checks(
    [LocalOutlierFactor(), *(LocalOutlierFactor(metric=m, novelty=True) for m in METRICS[1:])]
)
def test_estimator(estimator, check):
    """scikit-learn's tests check the estimator with novelty and the first metric."""
    check(estimator)


def rows(n=300, d=12, seed=0):
    generator = np.random.default_rng(seed)
    x = (
        generator.normal(size=(n, d))
        + 3 * generator.normal(size=(4, d))[generator.integers(4, size=n)]
    )
    x[:: max(2, n // 12)] *= 4
    return x


@pytest.mark.parametrize("as_tensor", [False, True], ids=["array", "tensor"])
@pytest.mark.parametrize("dtype, rtol", [(np.float32, 2e-4), (np.float64, 1e-8)])
@pytest.mark.parametrize("contamination", ["auto", 0.1])
@pytest.mark.parametrize("metric", METRICS)
def test_equals_scikit_learn(metric, contamination, dtype, rtol, as_tensor):
    x, new = rows().astype(dtype), rows(100, seed=1).astype(dtype)
    kind = torch.from_numpy if as_tensor else np.asarray
    settings = {"metric": metric, "contamination": contamination, "n_neighbors": 15}
    for novelty in (False, True):
        # scikit-learn's float32 is not exact either, so it gets float64 copies.
        theirs = Theirs(**settings, algorithm="brute", novelty=novelty).fit(x.astype(np.float64))
        ours = LocalOutlierFactor(**settings, novelty=novelty).fit(kind(x))
        compare = {
            "negative_outlier_factor_": (
                ours.negative_outlier_factor_,
                theirs.negative_outlier_factor_,
            )
        }
        pairs = zip(ours.kneighbors(), theirs.kneighbors(), strict=True)
        compare |= {f"kneighbors {i}": pair for i, pair in enumerate(pairs)}
        if novelty:
            far = new.astype(np.float64)
            for name in ("score_samples", "decision_function", "predict"):
                compare[name] = getattr(ours, name)(kind(new)), getattr(theirs, name)(far)
            pairs = zip(ours.kneighbors(kind(new), 7), theirs.kneighbors(far, 7), strict=True)
            compare |= {f"of new {i}": pair for i, pair in enumerate(pairs)}
        else:
            compare["fit_predict"] = (
                ours.fit_predict(kind(x)),
                theirs.fit_predict(x.astype(np.float64)),
            )
            assert (np.asarray(compare["fit_predict"][0]) == -1).sum() >= 5
        for name, (found, expected) in compare.items():
            assert isinstance(found, torch.Tensor if as_tensor else np.ndarray), name
            expected_dtype = np.int64 if expected.dtype.kind == "i" else dtype
            assert np.asarray(found).dtype == expected_dtype, name
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol / 10, err_msg=name)
        assert isinstance(ours.offset_, float)
        assert ours.offset_ == pytest.approx(theirs.offset_, rel=rtol)
        assert ours.n_neighbors_ == theirs.n_neighbors_
        assert ours.effective_metric_ == theirs.effective_metric_


def test_the_import_is_all_that_changes():
    """Parameters and their defaults are scikit-learn's."""
    assert LocalOutlierFactor().get_params() == Theirs().get_params()


@pytest.mark.parametrize("algorithm", ["auto", "ball_tree", "kd_tree", "brute"])
@pytest.mark.parametrize("novelty", [False, True])
def test_parameters_that_change_nothing(algorithm, novelty):
    x = rows()
    settings = {"leaf_size": 3, "metric": "minkowski", "p": 2, "metric_params": None, "n_jobs": -1}
    settings |= {"algorithm": algorithm, "novelty": novelty, "n_neighbors": 15}
    ours, theirs = (kind(**settings).fit(x) for kind in (LocalOutlierFactor, Theirs))
    plain = LocalOutlierFactor(15, metric="euclidean", p=1, novelty=novelty).fit(x)
    scores = ours.negative_outlier_factor_
    assert np.array_equal(scores, plain.negative_outlier_factor_)
    np.testing.assert_allclose(scores, theirs.negative_outlier_factor_, rtol=1e-8)
    for name in ("effective_metric_", "effective_metric_params_", "n_neighbors_", "offset_"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_more_queries_than_one_tile_holds(monkeypatch):
    monkeypatch.setattr("scclip_fast.chunked.tiles.WORKSPACE_BYTES", 2**15)
    monkeypatch.setattr("scclip_fast.chunked.tiles.MAX_COLUMNS", 96)
    x, new = rows(), rows(500, seed=1)
    found = LocalOutlierFactor().fit(x).kneighbors(new, 20)
    expected = Theirs(algorithm="brute").fit(x).kneighbors(new, 20)
    assert np.array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_neighbors_than_the_kernels_take(metric, dtype):
    """New rows and fitted ones at k = 150, against both of scikit-learn's classes."""
    x, new = rows(400).astype(dtype), rows(60, seed=1).astype(dtype)
    ours, theirs = (
        kind(150, metric=metric, algorithm="brute", novelty=True).fit(data)
        for kind, data in ((LocalOutlierFactor, x), (Theirs, x.astype(np.float64)))
    )
    neighbors = sklearn.neighbors.NearestNeighbors(
        n_neighbors=150, metric=metric, algorithm="brute"
    ).fit(x.astype(np.float64))
    asked = new.astype(np.float64)
    for found, expected in (
        (ours.kneighbors(new), neighbors.kneighbors(asked)),
        (ours.kneighbors(), neighbors.kneighbors()),
    ):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        if dtype == np.float64:
            assert np.array_equal(found[1], expected[1])
    expected = theirs.score_samples(asked)
    np.testing.assert_allclose(ours.score_samples(new), expected, rtol=1e-5)


def test_rows_of_zeros_by_cosine():
    x = rows(30, 3)
    x[4] = 0
    x[9] = 0
    new = np.concatenate([np.zeros((1, 3)), rows(7, 3, seed=1)])
    ours, theirs = (
        kind(5, metric="cosine", novelty=True).fit(x) for kind in (LocalOutlierFactor, Theirs)
    )
    np.testing.assert_allclose(ours.kneighbors()[0], theirs.kneighbors()[0], atol=1e-9)
    found, expected = ours.kneighbors(new), theirs.kneighbors(new)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-9)
    assert np.array_equal(found[1][1:], expected[1][1:])
    np.testing.assert_allclose(ours.score_samples(new), theirs.score_samples(new), rtol=1e-7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "dtype, computed",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int32, torch.float64),
    ],
)
def test_tensors(device, dtype, computed):
    x = torch.from_numpy(rows() * 50).to(device, dtype)
    model = LocalOutlierFactor(novelty=True).fit(x)
    expected = Theirs(novelty=True).fit(x.double().cpu().numpy())
    for found, other in (
        (model.negative_outlier_factor_, expected.negative_outlier_factor_),
        (model.score_samples(x[:9]), expected.score_samples(x[:9].double().cpu().numpy())),
    ):
        assert found.device == x.device and found.dtype == computed
        np.testing.assert_allclose(found.cpu(), other, rtol=1e-4)
    assert model.predict(x).dtype == torch.int64 and model.predict(x).device == x.device
    assert clone(model).fit(x.cpu().numpy() if dtype != torch.bfloat16 else x.float().cpu().numpy())


def test_equal_distances_are_by_lower_index():
    x = np.random.default_rng(0).integers(3, size=(200, 3)) / 10
    model = LocalOutlierFactor().fit(x)
    for found, itself in ((model.kneighbors(), True), (model.kneighbors(x + 0.05), False)):
        steps, order = np.diff(found[0]), np.diff(found[1])
        assert (steps == 0).any() and (order[steps == 0] > 0).all(), itself


def test_duplicates_warn_of_outliers_alone(recwarn):
    x = np.concatenate([np.zeros(30), np.linspace(1e-3, 1, 30)])[:, None]
    LocalOutlierFactor(5, novelty=True).fit(x)
    assert not recwarn
    with pytest.warns(UserWarning, match="Duplicate values"):
        LocalOutlierFactor(5).fit(x)


@pytest.mark.gpu
def test_queries_on_another_device():
    model = LocalOutlierFactor(novelty=True).fit(torch.from_numpy(rows()).cuda())
    with pytest.raises(ValueError, match="a tensor on cuda:0, got a tensor on cpu"):
        model.predict(torch.from_numpy(rows()))


def test_rows_to_predict_take_the_fitted_type():
    model = LocalOutlierFactor(novelty=True).fit(rows().astype(np.float32))
    assert model.score_samples(rows(9, seed=1)).dtype == np.float32


def test_queries_must_be_like_the_fitted_rows():
    x = rows()
    model = LocalOutlierFactor(novelty=True).fit(x)
    with pytest.raises(ValueError, match=r"fitted rows, an array, got a tensor on cpu"):
        model.predict(torch.from_numpy(x))
    with pytest.raises(ValueError, match=r"fitted rows, a tensor on cpu, got an array"):
        model.fit(torch.from_numpy(x)).predict(x)
    with pytest.raises(ValueError, match="11 features, but LocalOutlierFactor is expecting 12"):
        model.predict(torch.from_numpy(x[:, :11]))


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"n_neighbors": 0}, ValueError, "n_neighbors must be at least 1, got 0"),
        ({"n_neighbors": 2.0}, TypeError, "n_neighbors must be an int, got float"),
        ({"algorithm": "tree"}, ValueError, "algorithm must be one of auto, .*, brute, got 'tree'"),
        ({"leaf_size": 0}, ValueError, "leaf_size must be at least 1, got 0"),
        ({"metric": "l1"}, ValueError, "metric must be one of minkowski, euclidean, .*, got 'l1'"),
        ({"p": 1}, ValueError, 'p must be 2 with metric="minkowski", got 1'),
        ({"p": None}, ValueError, 'p must be 2 with metric="minkowski", got None'),
        ({"metric_params": {"p": 2}}, ValueError, r"metric_params must be None, got {'p': 2}"),
        ({"n_jobs": 1.5}, TypeError, "n_jobs must be None or an int, got float"),
        ({"contamination": "some"}, ValueError, "contamination must be \"auto\" or in .*'some'"),
        ({"contamination": 0.6}, ValueError, r"contamination must be in \(0, 0.5\], got 0.6"),
        ({"novelty": 1}, TypeError, "novelty must be a bool, got int"),
    ],
)
def test_parameters(settings, error, match):
    with pytest.raises(error, match=match):
        LocalOutlierFactor(**settings).fit(rows())


@pytest.mark.parametrize(
    "x, error, match",
    [
        (torch.zeros(3), ValueError, r"n_features\).*shape \(3,\)"),
        (torch.zeros(2, 5, 4), ValueError, r"shape \(2, 5, 4\)"),
        (torch.zeros(5, 0), ValueError, r"shape \(5, 0\)"),
        (torch.zeros(5, 4).to_sparse(), TypeError, "dense real tensor, got torch.sparse_coo"),
        (torch.zeros(5, 4, dtype=torch.complex64), TypeError, "complex64"),
        (torch.tensor([[0.0], [torch.nan], [1.0]]), ValueError, "X must be finite: 1 token"),
    ],
)
def test_tensors_refused(x, error, match):
    with pytest.raises(error, match=match):
        LocalOutlierFactor().fit(x)


def test_default_device_of_others():
    x = torch.randn(20, 3)
    ours = LocalOutlierFactor(n_neighbors=5, novelty=True).fit(x)
    expected = ours.score_samples(x)
    with torch.device("meta"):
        assert (ours.score_samples(x) == expected).all()

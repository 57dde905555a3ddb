from types import SimpleNamespace

import pytest
import torch
from cases import GPU

import scclip_fast as sf
from scclip_fast.backend import resolve

X = torch.randn(1, 4, 2)


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    monkeypatch.delenv("SCCLIP_FAST_BACKEND", raising=False)


def test_automatic():
    assert resolve(None, X) == "torch"
    assert resolve(None, X.to("meta")) == "torch"


@pytest.mark.gpu
def test_automatic_on_the_gpu():
    assert resolve(None, X.cuda()) == "triton"
    assert resolve(None, X.cuda().double()) == "torch"


def test_first_match_wins(monkeypatch):
    monkeypatch.setenv("SCCLIP_FAST_BACKEND", "reference")
    assert resolve(None, X) == "reference"
    with sf.backend("torch"):
        assert resolve(None, X) == "torch"
        assert resolve("reference", X) == "reference"
        with sf.backend(None):
            assert resolve(None, X) == "reference"
    assert resolve(None, X) == "reference"
    monkeypatch.setenv("SCCLIP_FAST_BACKEND", "")
    assert resolve(None, X) == "torch"


def test_scope_ends_with_an_error():
    with pytest.raises(RuntimeError), sf.backend("reference"):
        assert resolve(None, X) == "reference"
        raise RuntimeError
    assert resolve(None, X) == "torch"


def test_unknown_names(monkeypatch):
    with pytest.raises(
        ValueError, match="backend must be one of triton, torch, reference or None, got 'cuda'"
    ):
        sf.knn(X, 1, backend="cuda")
    with pytest.raises(ValueError, match="got 'numpy'"), sf.backend("numpy"):
        pass
    monkeypatch.setenv("SCCLIP_FAST_BACKEND", "Triton")
    with pytest.raises(ValueError, match=r"SCCLIP_FAST_BACKEND must be one of .* got 'Triton'"):
        sf.knn(X, 1)


def test_triton_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="not float64"):
        sf.knn(X.double(), 1, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the tensors are on cpu, and Triton's interpreter is off"):
        sf.aggregate(X, X, backend="triton")


@pytest.mark.skipif(GPU, reason="the interpreter is off")
def test_every_op_takes_every_backend():
    mask, q = torch.zeros(1, 4, dtype=torch.bool), torch.randn(1, 2, 4, 3)
    for name in ("triton", "torch", "reference"):
        sf.knn(X, 2, backend=name)
        sf.lof(X, 2, backend=name)
        sf.lof_scores(X, 2, backend=name)
        sf.outlier_mask(X[..., 0], backend=name)
        sf.repair(X, mask, (2, 2), backend=name)
        sf.similarity(X, backend=name)
        sf.aggregate(X, X, backend=name)
        sf.adaptive_aggregate(X, sf.similarity(X), backend=name)
        sf.blended_attention(q, q, q, X, backend=name)
        sf.content_attention(X, X, backend=name)


def test_a_backend_without_effect_is_deprecated(recwarn):
    x = torch.rand(3, 50, 8)
    expected = sf.norm_scores(x)
    assert not recwarn
    for name in ("torch", "reference"):
        with pytest.warns(DeprecationWarning, match="backend has no effect on norm_scores"):
            assert torch.equal(sf.norm_scores(x, backend=name), expected)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="got 'cuda'"):
        sf.norm_scores(x, backend="cuda")


@pytest.mark.parametrize("capability, expected", [((7, 5), "torch"), ((8, 0), "triton")])
def test_gpus_before_ampere(capability, expected, monkeypatch):
    """Triton multiplies without tensor cores on these GPUs, and needs more registers than exist."""
    major, minor = capability
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major, minor=minor)
    )
    monkeypatch.setattr(torch.version, "hip", None)
    tensor = SimpleNamespace(dtype=torch.float16, is_cuda=True, device=torch.device("cuda:0"))
    assert resolve(None, tensor) == expected
    if expected == "torch":
        with pytest.raises(ValueError, match=r"capability 8\.0 or newer.* has 7\.5"):
            resolve("triton", tensor)


def test_the_kernels_are_what_runs(monkeypatch):
    """backend="triton" calls the launchers, and the other backends do not."""
    from scclip_fast.kernels import aggregate, attention, knn, outlier_mask, repair

    launched = []
    for module, name in (
        (knn, "search_launch"),
        (knn, "merge_launch"),
        (aggregate, "weights_launch"),
        (aggregate, "product_launch"),
        (attention, "attention_launch"),
        (outlier_mask, "outlier_mask_launch"),
        (repair, "repair_launch"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, _f=original, _n=name, **k: launched.append(_n) or _f(*a, **k),
        )
    x = X.cuda() if GPU else X
    q = torch.randn(1, 2, 4, 3, device=x.device)
    mask = x[..., 0] > 0
    for name in ("torch", "reference"):
        sf.knn(x, 2, backend=name)
        sf.blended_attention(q, q, q, x, backend=name)
        sf.outlier_mask(x[..., 0], backend=name)
        sf.repair(x, mask, (2, 2), backend=name)
    assert launched == []
    sf.knn(x, 2, backend="triton")
    sf.blended_attention(q, q, q, x, backend="triton")
    sf.outlier_mask(x[..., 0], backend="triton")
    sf.repair(x, mask, (2, 2), backend="triton")
    assert launched == [
        "search_launch",
        "merge_launch",
        "weights_launch",
        "product_launch",
        "attention_launch",
        "outlier_mask_launch",
        "repair_launch",
    ]

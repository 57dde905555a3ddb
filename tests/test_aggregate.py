import math

import pytest
import torch
from cases import FEATURES, RUNS, runs_and_shapes
from tolerance import assert_close
from torch.autograd import gradcheck

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked import tiles


def published_aggregate(values, features, beta=0.4):
    """SC-CLIP's equation on (B, N, D), step by step."""
    unit = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    s = unit @ unit.transpose(1, 2)
    s = torch.where(s < beta, torch.zeros_like(s), s)
    s = s / (s.sum(dim=-1, keepdim=True) + 1e-6)
    return s @ values


#: Larger than the error of similarities near the threshold in `test_shapes`, 0.4 at most.
ROOM = 1e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device, backend, b, n, d, dtype", runs_and_shapes())
def test_shapes(device, backend, b, n, d, dtype):
    """Every width of features, with values of another width."""
    features = torch.randn(b, n, d, dtype=torch.float64).to(dtype)
    values = torch.randn(b, n, max(1, d // 2), dtype=torch.float64).to(dtype)
    beta = 0.4 if d < 64 else 0.05  # random directions in many dimensions are nearly orthogonal
    out = sf.aggregate(values.to(device), features.to(device), beta, backend=backend)
    assert out.dtype == dtype
    low, high = (
        published_aggregate(values.double(), features.double(), beta + off) for off in (-ROOM, ROOM)
    )
    sure = (low == high).all(dim=-1)  # no similarity within rounding of the threshold
    assert sure.double().mean() > 0.8
    assert_close(out.cpu()[sure], ref=low[sure])


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.4, 0.9])
def test_features(device, backend, kind, beta):
    x = FEATURES[kind](2, 196, 32)
    if beta <= 0:  # the row sum must not vanish
        x = x.abs()
    out = sf.aggregate(x.to(device), x.to(device), beta, backend=backend)
    assert_close(out, ref=published_aggregate(x.double(), x.double(), beta))


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("gamma", [None, 3.0, 20.0])
def test_sums_of_weights(device, backend, gamma):
    """Both weight functions. All slices of the values have the same sum of weights."""
    from scclip_fast.ops.aggregate import weighted_mean

    values, features = torch.randn(2, 70, 300), torch.randn(2, 70, 5)
    floor = torch.tensor([0.1, -0.2])
    expected = reference.aggregate(values.double(), features.double(), floor.double(), gamma)
    found = weighted_mean(*(t.to(device) for t in (values, features, floor)), gamma, backend)
    for out, ref in zip(found, expected, strict=True):
        assert_close(out, ref=ref)


@pytest.mark.parametrize("device, backend", RUNS)
def test_mixed_dtypes_and_strides(device, backend):
    values = torch.randn(70, 2, 9).transpose(0, 1).to(torch.bfloat16)
    features = torch.randn(2, 12, 70).transpose(1, 2)
    out = sf.aggregate(values.to(device), features.to(device), backend=backend)
    assert_close(out, ref=published_aggregate(values.double(), features.double()))


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e20, 1e37])
def test_values_of_any_size(device, backend, size):
    """One channel of a given size, one of zeros and one of ordinary size."""
    values, features = torch.randn(40, 3) * size, torch.randn(40, 8)
    values[:, 1], values[:, 2] = 0, torch.randn(40)
    out = sf.aggregate(values.to(device), features.to(device), backend=backend)
    expected = published_aggregate(values.double()[None], features.double()[None])[0]
    room = torch.tensor([max(size * 1e-5, 1e-36), 1e-44, 1e-5])  # 1e-36 is 0 beside float32's tiny
    assert ((out.cpu().double() - expected).abs() <= room).all()


@pytest.mark.parametrize("device, backend", RUNS)
def test_zero_features_see_nothing(device, backend):
    values, features = torch.randn(40, 8, device=device), torch.randn(40, 8, device=device)
    features[3] = 0
    out = sf.aggregate(values, features, backend=backend)
    assert torch.equal(out[3], torch.zeros_like(out[3])) and out.isfinite().all()


@pytest.mark.parametrize("device, backend", RUNS)
def test_unbatched_and_empty(device, backend):
    x = torch.randn(3, 40, 8, device=device)
    batch = sf.aggregate(x, x, backend=backend)
    # On a GPU the matrix library may sum in another order.
    assert torch.allclose(sf.aggregate(x[1], x[1], backend=backend), batch[1], rtol=1e-5)
    assert sf.aggregate(x[:0], x[:0], backend=backend).shape == (0, 40, 8)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(device, backend, dtype):
    values = torch.randn(2, 50, 7).to(dtype)
    features, upstream = torch.randn(2, 50, 6).to(dtype), torch.randn(2, 50, 7).to(dtype)
    ref = [t.double().requires_grad_() for t in (values, features)]
    expected = torch.autograd.grad(published_aggregate(*ref), ref, upstream.double())
    inputs = [t.to(device).requires_grad_() for t in (values, features)]
    found = torch.autograd.grad(sf.aggregate(*inputs, backend=backend), inputs, upstream.to(device))
    for grad, exact in zip(found, expected, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, ref=exact, factor=3)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("tile", [2**26, 2**11])
def test_gradcheck(backend, tile, monkeypatch):
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", tile)
    values = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, f: sf.aggregate(v, f, backend=backend), (values, features))
    assert gradcheck(lambda x: sf.aggregate(x, x, backend=backend), (features,))


def test_tiles_agree(monkeypatch):
    values, features = (
        torch.randn(5, 90, 7, dtype=torch.float64),
        torch.randn(5, 90, 6, dtype=torch.float64),
    )
    expected = sf.aggregate(values, features)
    for bytes_ in (2**18, 2**14, 2**11):
        monkeypatch.setattr(tiles, "WORKSPACE_BYTES", bytes_)
        assert_close(sf.aggregate(values, features), ref=expected)


class TestExplicit:
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_similarity_then_aggregate_is_aggregate(self, backend):
        x = torch.randn(2, 60, 12, dtype=torch.float64)
        s = sf.similarity(x, beta=0.2, backend=backend)
        assert_close(
            sf.adaptive_aggregate(x, s, backend=backend), ref=published_aggregate(x, x, 0.2)
        )
        assert_close(
            sf.adaptive_aggregate(x[0], s[0], backend=backend),
            ref=published_aggregate(x, x, 0.2)[0],
        )

    def test_similarity(self):
        x = torch.randn(3, 20, 8)
        cosine = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
        assert_close(sf.similarity(x), ref=torch.where(cosine.double() >= 0.4, cosine.double(), 0))
        assert_close(sf.similarity(x, beta=-1e9, normalize=False), ref=x.double() @ x.double().mT)
        assert sf.similarity(x[0]).shape == (20, 20)

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_similarity_without_a_threshold(self, normalize, backend):
        """Opposite tokens have products far below -1, and cosines that rounding moves below -1."""
        x = torch.randn(40, 8)
        x = torch.cat([x, -9 * x])
        expected = x.double() @ x.double().T
        if normalize:
            expected /= x.double().norm(dim=1) * x.double().norm(dim=1)[:, None]
        found = sf.similarity(x, -math.inf, normalize, backend=backend)
        assert (found != 0).all()
        assert_close(found, ref=expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes(self, dtype):
        x, s = torch.randn(2, 40, 8).to(dtype), torch.rand(2, 40, 40).to(dtype)
        out = sf.adaptive_aggregate(x, s)
        assert out.dtype == dtype
        assert_close(out, ref=reference.adaptive_aggregate(x.double(), s.double()))

    def test_gradcheck(self):
        x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: sf.adaptive_aggregate(x, sf.similarity(x, 0.3)), (x,))

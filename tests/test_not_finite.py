"""Aggregation, content attention and repair of tokens that are not finite."""

import pytest
import torch
from cases import GPU
from tolerance import assert_close

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked import compute_dtype, tiles
from scclip_fast.ops.aggregate import weighted_mean

INTERPRETED = pytest.mark.skipif(GPU, reason="the kernels run on the GPU")
BACKENDS = ["torch", "reference", pytest.param("triton", marks=INTERPRETED)]
#: Features of token 3. The norm of the last kind overflows float32.
BROKEN = {
    "nan": [torch.nan] * 6,
    "one nan": [1.0, torch.nan, 2.0, 0.0, -1.0, 3.0],
    "one inf": [1.0, 2.0, torch.inf, 0.0, -1.0, 3.0],
    "infs": [torch.inf, -torch.inf, torch.inf, torch.inf, 1.0, 2.0],
    "norm": [3e38, -3e38, 3e38, 3e38, 3e38, 0.0],
}
#: gamma of the two weight functions. The floor is below 0, so that a similarity of 0 would have a
#: weight, and near 0, because negative weights could make the sums vanish that divide the rows.
WEIGHTS = [None, 3.0]
FLOOR = -0.05


def others(x):
    """x (..., N, D) without token 3."""
    return torch.cat([x[..., :3, :], x[..., 4:, :]], dim=-2)


@pytest.fixture(params=BROKEN)
def features(request):
    features = torch.randn(2, 40, 6)
    features[0, 3] = torch.tensor(BROKEN[request.param])
    return features


@pytest.fixture(params=[*BACKENDS, "tiles"])
def backend(request, features, monkeypatch):
    """A backend. "tiles" is the torch path with less than all rows in a tile."""
    if request.param == "tiles":
        monkeypatch.setattr(tiles, "WORKSPACE_BYTES", 2**11)
        return "torch"
    if request.param == "reference" and features[0, 3].isfinite().all():
        pytest.skip("the norm is finite in float64")
    return request.param


def mean(values, features, gamma, backend):
    floor = torch.full((len(values),), FLOOR, dtype=compute_dtype(values, features))
    return weighted_mean(values, features, floor, gamma, backend)


@pytest.mark.parametrize("gamma", WEIGHTS)
@pytest.mark.parametrize("own", [torch.nan, torch.inf, 1.0])
class TestAggregate:
    def values(self, own):
        values = torch.randn(2, 40, 5)
        values[0, 3] = own
        return values

    def test_others_are_as_without_the_token(self, features, backend, gamma, own):
        values = self.values(own)
        out, total = mean(values, features, gamma, backend)
        exact = others(values).double(), others(features).double()
        for found, expected in zip(
            (out, total.unsqueeze(-1)), mean(*exact, gamma, "reference"), strict=True
        ):
            ref = expected.view(2, 39, -1)
            assert_close(others(found)[0], ref=ref[0])
            assert found[0, 3].isnan().all() and found[1].isfinite().all()

    def test_gradients(self, features, backend, gamma, own):
        values, upstream = self.values(own), torch.randn(2, 40, 5)
        inputs = [t.requires_grad_() for t in (values, features)]
        out, _ = mean(*inputs, gamma, backend)
        found = torch.autograd.grad(out, inputs, upstream)
        exact = [others(t).detach().double().requires_grad_() for t in inputs]
        out, _ = mean(*exact, gamma, "reference")
        expected = torch.autograd.grad(out, exact, others(upstream).double())
        for grad, ref in zip(found, expected, strict=True):
            assert_close(others(grad)[0], ref=ref[0], factor=3)
            assert not grad[0, 3].any() and grad[1].isfinite().all()


def test_aggregate_of_features_by_themselves(features, backend):
    """Infinite values of the token do not become NaN in other rows."""
    out = sf.aggregate(features, features, backend=backend)
    assert out[0, 3].isnan().all() and others(out).isfinite().all()


def test_content_attention(features, backend):
    q, k, v = torch.randn(3, 2, 3, 40, 4)
    # alpha = 1 is the content half alone, because the self half attends to the token.
    out = sf.blended_attention(q, k, v, features, alpha=1.0, backend=backend)
    exact = [others(t).double() for t in (q, k, v, features)]
    expected = sf.blended_attention(*exact, alpha=1.0, backend="reference")
    assert_close(others(out)[0], ref=expected[0])
    assert out[0, :, 3].isnan().all() and out[1].isfinite().all()


def test_mean_similarity(features):
    exact = reference.mean_similarity(others(features)[:1].double())
    assert_close(reference.mean_similarity(features)[:1], ref=exact)
    nothing = torch.full((1, 4, 3), torch.nan)
    assert reference.mean_similarity(nothing).item() == 0


def test_similarity(features, backend):
    s = sf.similarity(features, backend=backend)
    assert s[0, 3].isnan().all() and s[0, :, 3].isnan().all()
    assert others(others(s[0]).mT).isfinite().all() and s[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_finite_tokens_spread(backend):
    values, features = torch.randn(40, 5), torch.rand(40, 6)
    values[7, 2] = torch.inf
    out = sf.aggregate(values, features, beta=-1.0, backend=backend)
    if backend == "triton":  # an infinity is split into infinity and NaN
        assert not out[:, 2].isfinite().any()
    else:
        assert (out[:, 2] == torch.inf).all()
    assert torch.cat([out[:, :2], out[:, 3:]], dim=1).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_distributed_rule_is_in_the_tiles(backend):
    """If no token is finite, every row is NaN."""
    x = torch.full((5, 3), torch.inf)
    assert sf.aggregate(torch.ones(5, 2), x, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
class TestRepair:
    def test_a_masked_token_is_replaced(self, backend):
        x, mask = torch.randn(20, 4), torch.zeros(20, dtype=torch.bool)
        x[7], mask[7] = torch.inf, True
        out = sf.repair(x, mask, (4, 5), backend=backend)
        around = x[[1, 2, 3, 6, 8, 11, 12, 13]]
        assert_close(out[7], ref=around.double().mean(dim=0))
        assert torch.equal(out[8:], x[8:])

    def test_an_unmasked_token_spreads_to_masked_neighbours(self, backend):
        x, mask = torch.randn(20, 4), torch.zeros(20, dtype=torch.bool)
        x[6], mask[7] = torch.nan, True
        out = sf.repair(x, mask, (4, 5), backend=backend)
        assert out[[6, 7]].isnan().all()
        assert torch.equal(out[8:], x[8:])

"""Content attention: softmax over the tokens whose cosine similarity reaches a threshold.

Mutations, with the test that each made fail: the multiple of the mean ignored, a number times the
mean (`test_thresholds`); no limit of the threshold (`test_a_token_attends_to_itself`).
"""

import pytest
import torch
from cases import FEATURES, RUNS
from tolerance import RELATIVE_ERROR, assert_close, relative_error
from torch.autograd import gradcheck

import scclip_fast as sf
from scclip_fast import reference

THRESHOLDS = [None, 0.0, 0.4, -1.0, ("mean", 1.2), ("mean", 0.0)]


def literal(values, features, gamma=3.0, threshold=None):
    """ProxyCLIP's equations on (B, N, D): shift, scale, mask, softmax, product."""
    unit = features / features.norm(dim=-1, keepdim=True)
    s = unit @ unit.mT
    if threshold is None:
        threshold = ("mean", 1.0)
    if isinstance(threshold, tuple):
        threshold = threshold[1] * s.mean(dim=(1, 2), keepdim=True)
    shifted = gamma * (s - threshold)
    return shifted.masked_fill(s < threshold, -torch.inf).softmax(dim=-1) @ values


def inputs(b=2, n=50, width=6, dv=9, dtype=torch.float64):
    """Features whose mean similarity is 0.4 to 0.6, and values of one sign."""
    features = torch.randn(b, n, width, dtype=torch.float64) + 1
    return torch.rand(b, n, dv, dtype=torch.float64).to(dtype), features.to(dtype)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=str)
def test_thresholds(device, backend, dtype, threshold):
    values, features = inputs(dtype=dtype)
    gamma = 10.0 if threshold == 0.0 else 3.0
    out = sf.content_attention(
        values.to(device), features.to(device), gamma, threshold, backend=backend
    )
    assert out.dtype == dtype
    assert_close(out, ref=literal(values.double(), features.double(), gamma, threshold), factor=2)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 196, 3, 5), (3, 33, 257, 4)], ids=str)
def test_shapes(shape):
    values, features = inputs(*shape)
    out = sf.content_attention(values, features, threshold=0.3)
    assert_close(out, ref=literal(values, features, threshold=0.3))
    alone = sf.content_attention(values[0], features[0], threshold=0.3)
    assert_close(alone, ref=out[0])
    assert sf.content_attention(values[:0], features[:0]).shape == (0, *values.shape[1:])


@pytest.mark.parametrize("kind", FEATURES)
def test_features(kind):
    values, features = torch.rand(2, 100, 8), FEATURES[kind](2, 100, 32)
    exact = literal(values.double(), features.double())
    plain = relative_error(literal(values, features), exact)  # see test_attention.py
    out = sf.content_attention(values, features)
    assert relative_error(out, exact) <= max(2 * plain, RELATIVE_ERROR[torch.float32])


def test_it_is_the_content_half_of_blended_attention():
    v, features = torch.randn(2, 3, 40, 4), torch.randn(2, 40, 7)
    blended = sf.blended_attention(v, v, v, features, gamma=5.0, alpha=1.0)
    merged = sf.content_attention(v.transpose(1, 2).flatten(2), features, 5.0)
    torch.testing.assert_close(blended, merged.unflatten(2, (3, 4)).transpose(1, 2))


def test_the_reference_is_the_literal_form():
    values, features = inputs()
    found = reference.content_attention(values, features, 3.0, torch.tensor([0.1, 0.5]))
    for image, threshold in enumerate((0.1, 0.5)):
        expected = literal(values[[image]], features[[image]], threshold=threshold)
        assert_close(found[[image]], ref=expected)


@pytest.mark.parametrize("device, backend", RUNS)
def test_a_token_attends_to_itself(device, backend):
    """Beyond every similarity but that of a token with itself, the result is the values."""
    values, features = (t.to(device) for t in inputs(dtype=torch.float32))
    for threshold in (1.0, 7.5, ("mean", 100.0)):
        out = sf.content_attention(values, features, threshold=threshold, backend=backend)
        assert_close(out, ref=values.double())


@pytest.mark.parametrize("device, backend", RUNS)
def test_tokens_that_are_not_finite_or_zero(device, backend):
    values, features = (t.to(device) for t in inputs(1, 40, dtype=torch.float32))
    features[0, 3, 0], features[0, 7] = torch.nan, 0
    out = sf.content_attention(values, features, threshold=0.3, backend=backend)
    kept = torch.tensor([i for i in range(40) if i not in (3, 7)], device=device)
    expected = literal(values[:, kept].double(), features[:, kept].double(), threshold=0.3)
    assert out[0, 3].isnan().all() and not out[0, 7].any()
    assert_close(out[:, kept], ref=expected)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("threshold", [None, 0.2, ("mean", 1.2)], ids=str)
def test_gradients(device, backend, threshold):
    values, features = inputs(dtype=torch.float32)
    upstream = torch.randn_like(values)
    exact = [t.double().requires_grad_() for t in (values, features)]
    expected = torch.autograd.grad(literal(*exact, threshold=threshold), exact, upstream.double())
    leaves = [t.to(device).requires_grad_() for t in (values, features)]
    out = sf.content_attention(*leaves, threshold=threshold, backend=backend)
    found = torch.autograd.grad(out, leaves, upstream.to(device))
    for grad, ref in zip(found, expected, strict=True):
        assert_close(grad, ref=ref, factor=4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    tensors = [t.requires_grad_() for t in inputs(2, 7, 3, 4)]
    options = dict(threshold=("mean", 1.2), backend=backend)
    assert gradcheck(lambda *t: sf.content_attention(*t, **options), tensors)

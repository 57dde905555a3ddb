import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, FEATURES, RUNS
from tolerance import RELATIVE_ERROR, assert_close, relative_error
from torch.autograd import gradcheck

import scclip_fast as sf
from scclip_fast.chunked import tiles
from scclip_fast.kernels.attention import attention_triton


def published_attention(q, k, v, features, gamma=3.0, alpha=0.5, scale=None, room=0.0):
    """The equation step by step: two softmaxes on explicit matrices, blended.

    The threshold of the content half is the mean similarity plus `room`.
    """
    unit = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    s = unit @ unit.transpose(1, 2)
    centred = s - s.mean(dim=(1, 2), keepdim=True)
    content = torch.softmax((gamma * centred).masked_fill(centred < room, -torch.inf), dim=-1)
    own = torch.softmax(
        q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale), dim=-1
    )
    return ((1 - alpha) * own + alpha * content[:, None]) @ v


def inputs(b, h, n, d, dv, width, dtype):
    q, k = torch.randn(2, b, h, n, d, dtype=torch.float64).to(dtype)
    v = torch.randn(b, h, n, dv, dtype=torch.float64).to(dtype)
    return q, k, v, torch.randn(b, n, width, dtype=torch.float64).to(dtype)


def compare(device, backend, tensors, factor=1.0, **options):
    out = sf.blended_attention(*(t.to(device) for t in tensors), **options, backend=backend)
    assert out.dtype == tensors[2].dtype
    exact = [t.double() for t in tensors]
    low, high = (published_attention(*exact, **options, room=off) for off in (-ROOM, ROOM))
    # No similarity of these rows is within rounding of the mean. A single token's is the mean.
    sure = (low == high).all(dim=-1) | (tensors[0].shape[2] == 1)
    assert sure.double().mean() > 0.8
    assert_close(out.cpu()[sure], ref=low[sure], factor=factor)


#: Larger than the error of similarities near their mean, which is 0.5 at most.
ROOM = 1e-6

#: B, H, N, d, dv, D, dtype: every N with every head width of the grid, and both with every dtype.
#: test_aggregate varies D, the width of the features. A batch of single tokens is refused.
TOKENS, HEADS = (1, 2, 30, 31, 32, 33), (1, 3, 64, 257)
SHAPES = [
    (3 if n % 2 and n > 1 else 1, 2, n, d, d, 7, DTYPES[(i + j) % 3])
    for i, n in enumerate(TOKENS)
    for j, d in enumerate(HEADS)
]
OTHERS = [
    (1, 1, 196, 64, 64, 64),
    (1, 2, 201, 3, 3, 3),
    (3, 1, 196, 1, 1, 1),
    (1, 1, 577, 64, 64, 257),
]
OTHERS += [(2, 3, 33, 16, 40, 5), (1, 1, 33, 768, 768, 768)]
SHAPES += [(*shape, dtype) for shape in OTHERS for dtype in DTYPES]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-N{}-d{}-dv{}-D{}-{}".format(*s))
def test_shapes(device, backend, shape):
    compare(device, backend, inputs(*shape), factor=2)


@pytest.mark.parametrize("shape", SHAPES[::3])
def test_float64(shape):
    compare("cpu", "torch", inputs(*shape[:-1], torch.float64))


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize(
    "options",
    [
        dict(alpha=0.0),
        dict(alpha=1.0),
        dict(alpha=0.3, gamma=0.0),
        dict(gamma=25.0),
        dict(scale=1.0),
    ],
    ids=str,
)
def test_options(device, backend, options):
    compare(device, backend, inputs(2, 3, 50, 8, 8, 16, torch.float32), **options)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("kind", FEATURES)
def test_features(device, backend, kind):
    q, k, v, _ = inputs(2, 2, 100, 8, 8, 1, torch.float32)
    tensors = q, k, v, FEATURES[kind](2, 100, 32)
    exact = published_attention(*(t.double() for t in tensors))
    # Cosines of tokens that share massive channels all lie near their mean, which decides which
    # tokens have a weight. The published form in float32 shows how much float32 resolves of that.
    plain = relative_error(published_attention(*tensors), exact)
    out = sf.blended_attention(*(t.to(device) for t in tensors), backend=backend)
    assert relative_error(out, exact) <= max(2 * plain, RELATIVE_ERROR[torch.float32])


@pytest.mark.parametrize("device, backend", RUNS)
def test_large_logits(device, backend):
    q, k, v, features = inputs(1, 2, 70, 16, 16, 8, torch.float32)
    compare(
        device, backend, (100 * q, k, v, features), factor=20
    )  # the softmax magnifies the rounding of logits


@pytest.mark.parametrize("device, backend", RUNS)
def test_uniform_features_attend_to_all(device, backend):
    q, k, v, _ = inputs(1, 2, 70, 16, 16, 8, torch.float32)
    features = torch.randn(1, 1, 768).expand(1, 70, 768)
    out = sf.blended_attention(
        *(t.to(device) for t in (q, k, v, features)), alpha=1.0, backend=backend
    )
    assert_close(out, ref=v.double().mean(dim=2, keepdim=True).expand_as(v))


@pytest.mark.parametrize("device, backend", RUNS)
def test_zero_features_see_nothing(device, backend):
    q, k, v, features = (t.to(device) for t in inputs(1, 2, 40, 16, 16, 8, torch.float32))
    features[:, 3] = 0
    features[:, :, 0] += 3  # the mean similarity is above 0
    features[:, 3] = 0
    out = sf.blended_attention(q, k, v, features, alpha=1.0, backend=backend)
    assert torch.equal(out[:, :, 3], torch.zeros_like(out[:, :, 3])) and out.isfinite().all()


@pytest.mark.parametrize("device, backend", RUNS)
def test_alpha_zero_is_torch_attention(device, backend):
    q, k, v, features = inputs(2, 3, 50, 8, 8, 4, torch.float32)
    out = sf.blended_attention(
        *(t.to(device) for t in (q, k, v, features)), alpha=0.0, backend=backend
    )
    assert_close(out, ref=F.scaled_dot_product_attention(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("device, backend", RUNS)
def test_strided_unbatched_and_empty(device, backend):
    """q, k and v are views of one projection (B, N, 3, H, d)."""
    qkv = torch.randn(2, 50, 3, 4, 8, device=device).permute(2, 0, 3, 1, 4)
    features = torch.randn(2, 16, 50, device=device).transpose(1, 2)
    out = sf.blended_attention(*qkv, features, backend=backend)
    dense = sf.blended_attention(*qkv.contiguous(), features.contiguous(), backend=backend)
    assert torch.allclose(out, dense, rtol=1e-5, atol=1e-6)
    alone = sf.blended_attention(*qkv[:, 1], features[1], backend=backend)
    assert torch.allclose(alone, out[1], rtol=1e-5, atol=1e-6)
    assert sf.blended_attention(*qkv[:, :0], features[:0], backend=backend).shape == (0, 4, 50, 8)


@pytest.mark.parametrize("device, backend", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(device, backend, dtype):
    tensors = inputs(2, 2, 40, 8, 6, 5, dtype)
    upstream = torch.randn(2, 2, 40, 6).to(dtype)
    ref = [t.double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(published_attention(*ref), ref, upstream.double())
    leaves = [t.to(device).requires_grad_() for t in tensors]
    found = torch.autograd.grad(
        sf.blended_attention(*leaves, backend=backend), leaves, upstream.to(device)
    )
    for grad, exact in zip(found, expected, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, ref=exact, factor=4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("tile", [2**26, 2**11])
def test_gradcheck(backend, tile, monkeypatch):
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", tile)
    tensors = [t.requires_grad_() for t in inputs(2, 2, 7, 3, 4, 5, torch.float64)]
    assert gradcheck(lambda *t: sf.blended_attention(*t, backend=backend), tensors)
    x = torch.randn(
        2, 2, 7, 3, dtype=torch.float64, requires_grad=True
    )  # keys are queries in SC-CLIP
    features = torch.randn(2, 7, 5, dtype=torch.float64)
    assert gradcheck(lambda x: sf.blended_attention(x, x, x, features, backend=backend), (x,))


def test_tiles_agree(monkeypatch):
    tensors = inputs(3, 2, 90, 8, 6, 5, torch.float64)
    expected = sf.blended_attention(*tensors)
    for bytes_ in (2**18, 2**14, 2**11):
        monkeypatch.setattr(tiles, "WORKSPACE_BYTES", bytes_)
        assert_close(sf.blended_attention(*tensors), ref=expected)


def grouped(b, n, width):
    """Features with similarities of 0.9 or 0, none of which is near the mean."""
    groups = torch.eye(5, width)[torch.randint(5, (b, n))]
    return 3 * groups + torch.randn(b, n, width) / width**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("b, h, n", [(1, 16, 5184), (64, 12, 196)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_towers(b, h, n, dtype):
    """The kernels against the torch path in float64, in full."""
    q, k, v = torch.randn(3, b, h, n, 64).to("cuda", dtype)
    features = grouped(b, n, 64 * h).to("cuda", dtype)
    out = sf.blended_attention(q, k, v + 1, features, backend="triton")
    exact = (t.double() for t in (q, k, v + 1, features))
    assert_close(out, ref=sf.blended_attention(*exact, backend="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [5184, 20_000, 82_944])
def test_float32_on_many_tokens(n):
    """Values of one sign, whose sums are large. 64 rows are compared with float64."""
    q, k, v = torch.randn(3, 1, 1, n, 64, device="cuda")
    v = v + 3
    content = torch.zeros_like(v)
    out = attention_triton(q, k, v, content, 0.0, 0.125)
    rows = torch.randint(n, (64,), device="cuda")
    scores = 0.125 * q[0, 0, rows].double() @ k[0, 0].double().T
    assert_close(out[0, 0, rows], ref=scores.softmax(dim=-1) @ v[0, 0].double())

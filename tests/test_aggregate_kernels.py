"""Tests the kernels of the aggregation: precision on many tokens, tokens without a direction.

Mutations, with the test that each made fail: `split_dot` sums into `acc` throughout
(`test_compile_only.py::test_float32_sums_leave_the_tensor_cores`); steps of 512 tokens
(`test_float32_sums_on_tensor_cores_that_truncate`); no mask of `has_direction` in `weights`, in its
transposed tiles or in `stream`, no NaN in their sums, no second pass in `product` or `stream`,
float32 values unmasked (`test_tokens_without_a_direction`); all channels in one accumulator
(`test_similarity_with_itself_on_tensor_cores_that_truncate`).
"""

import numpy as np
import pytest
import torch
from cases import RUNS
from tolerance import RELATIVE_ERROR, assert_close, relative_error

import scclip_fast as sf
from scclip_fast import chunked, reference
from scclip_fast.kernels import aggregate
from scclip_fast.kernels._launch import Architecture
from scclip_fast.kernels.aggregate_details.norms import FEATURE_SCALE
from scclip_fast.kernels.aggregate_details.panel import product_launch, weights_launch
from scclip_fast.kernels.aggregate_details.products import CHANNELS, Operand
from scclip_fast.kernels.aggregate_details.stream import stream_launch
from scclip_fast.kernels.aggregate_details.values import VALUE_SCALE

DEVICES = [
    pytest.param(run.values[0], id=run.id, marks=run.marks)
    for run in RUNS
    if run.values[1] == "triton"
]
EPS = 1e-6
#: WORKSPACE_BYTES and LEAST_ROWS with which a few hundred tokens take each path.
PATHS = {"triangle": (2**26, 1024), "panels": (2**18, 128), "stream": (2**12, 1024)}
A100, H100, L4 = (Architecture(c, s * 1024) for c, s in ((80, 163), (90, 227), (89, 99)))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    workspace, rows = PATHS[request.param]
    monkeypatch.setattr(aggregate, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(aggregate, "LEAST_ROWS", rows)
    launched = []
    for name in ("weights_launch", "stream_launch"):
        original = getattr(aggregate, name)
        monkeypatch.setattr(
            aggregate,
            name,
            lambda *a, _f=original, **k: launched.append(_f(*a, **k)) or launched[-1],
        )
    yield request.param
    symmetric = [launch.arguments.get("SYMMETRIC") for launch in launched]
    assert set(symmetric) == {dict(triangle=True, panels=False, stream=None)[request.param]}


def split(x):
    first = x.half()
    return Operand(first, (x - first).half())


def by_kernels(values, features, floor, gamma):
    return aggregate.aggregate_triton(values, features, floor, gamma, EPS)


def by_equation(values, features, floor, gamma):
    """(out, total) of `kernels/aggregate.py` in float64; a row without a direction is NaN."""
    f, v, scale = features.double(), values.double(), chunked.inverse_norms(features).squeeze(-1)
    has = scale.isfinite() & (scale > 0)
    f = torch.where(has[..., None], f, 0)
    unit = f / f.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    s = unit @ unit.mT
    weight = s if gamma is None else torch.exp(gamma * (s - 1))
    weight = torch.where((s >= floor.double()[:, None, None]) & has[:, None, :], weight, 0)
    total = torch.where(has, weight.sum(dim=-1), torch.nan)
    return weight @ torch.where(has[..., None], v, 0) / (total + EPS)[..., None], total


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [None, 3.0])
def test_tokens_without_a_direction(device, dtype, gamma, path):
    """Tokens without a direction weigh 0 in all other rows, and their own rows are NaN."""
    values = torch.randn(1, 300, 70)
    # No similarity is near the floor: tokens are alike by 0.9 or not at all.
    features = 0.1 * torch.randn(1, 300, 40) + 3 * torch.eye(5, 40)[torch.randint(5, (300,))]
    features[0, 3, 0], features[0, 200], features[0, 299, 1] = torch.nan, torch.inf, -torch.inf
    features[0, 7] = 1e19  # the squares overflow, products with other tokens do not
    values[0, 3], values[0, 200], values[0, 299] = torch.nan, torch.inf, -torch.inf
    floor = torch.tensor([0.6])
    values, features = values.to(dtype), features.to(dtype)
    expected = by_equation(values, features, floor, gamma)
    results = by_kernels(*(t.to(device) for t in (values, features, floor)), gamma)
    for out, ref in zip(results, expected, strict=True):
        assert torch.equal(out.isnan().cpu(), ref.isnan())
        assert relative_error(out.cpu()[~ref.isnan()], ref[~ref.isnan()]) <= RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_steps_and_a_tail(device, dtype, path):
    values, features = torch.randn(1, 333, 17).to(dtype), torch.randn(1, 333, 9).to(dtype)
    floor = torch.tensor([-1.0])
    out, _ = by_kernels(*(t.to(device) for t in (values, features, floor)), 3.0)
    assert_close(out.cpu(), ref=by_equation(values, features, floor, 3.0)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_more_channels_than_one_accumulator_takes(device, path):
    values = torch.randn(1, 150 if path == "triangle" else 300, 5).half()
    features = torch.randn(1, values.shape[1], CHANNELS + 77).half()
    floor = torch.tensor([-1.0])
    out, _ = by_kernels(*(t.to(device) for t in (values, features, floor)), 3.0)
    assert_close(out.cpu(), ref=by_equation(values, features, floor, 3.0)[0])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_large_image(device):
    """Computes 128 rows of 5184 x 1024 float32 by the launches, as the interpreter is slow."""
    n, d, first = 5184, 1024, 2560
    x = torch.nn.functional.normalize(torch.randn(1, n, d, dtype=torch.float64), dim=-1)
    x[:, ::40] = x[:, first : first + 1] + 0.8 * x[:, ::40]  # alike by 0.7 or more, others by 0.2
    unit = torch.nn.functional.normalize(x, dim=-1)
    f = split((FEATURE_SCALE * unit).float().to(device))
    v = split((16 * x[..., :128]).float().to(device))
    scale = torch.full((1, n), 1 / FEATURE_SCALE, device=device)
    floor = torch.full((1,), 0.4, device=device)
    panel = Operand(*(t.new_empty(1, 128, 5248) for t in f))
    sums, total = scale.new_empty(1, 41, 128), torch.full_like(scale, torch.nan)
    out = scale.new_empty(1, n, 128)
    weights_launch(f, scale, floor, None, panel, sums, first).run()
    ones = torch.ones(1, 1, 128, device=device)
    product_launch(panel, v, scale, sums, total, ones, EPS, out, first).run()
    s = unit[:, first : first + 128] @ unit.mT
    weight = torch.where(s < 0.4, 0, s)
    assert (weight > 0).sum() > 500
    ref = weight @ (16 * x[..., :128]) / (weight.sum(dim=-1, keepdim=True) + EPS)
    assert_close(out[:, first : first + 128].cpu(), ref=ref)


def truncated(x, unit):
    return np.trunc(x / unit) * unit


def step_of_a_tensor_core(total, products, extra_bits):
    """Returns total (M,) plus products (M, 16), all truncated where the largest of them ends.

    Tensor cores align the terms of a sum to the largest and drop what is below `extra_bits` more
    than float32's: none on V100, one on A100, two on H100 (Fasi et al., "Numerical behavior of
    NVIDIA tensor cores", 2021, and the tests on newer ones that followed it).
    """
    terms = np.concatenate([total[:, None], products], axis=1)
    exponent = np.frexp(np.abs(terms).max(axis=1))[1] - 24
    total = truncated(terms, np.ldexp(1.0, exponent - extra_bits)[:, None]).sum(axis=1)
    return truncated(total, np.ldexp(1.0, np.frexp(total)[1] - 24))


def emulated_error(pairs, exact, step, extra_bits):
    """Relative error of sums over tokens that leave the tensor core after each `step` tokens."""
    tokens = pairs[0][0].shape[1]
    out = np.zeros(len(exact), np.float32)
    for start in range(0, tokens, step):
        total = np.zeros(len(exact))
        for left, right in pairs:
            for t in range(start, min(tokens, start + step), 16):
                products = left[:, t : t + 16] * right[:, t : t + 16]
                total = step_of_a_tensor_core(total, products, extra_bits)
        out += total.astype(np.float32)
    return np.linalg.norm(out - exact) / np.linalg.norm(exact)


def weights_and_values(tokens):
    """Weights like those of an image, and values scaled as for the kernels, each (32, tokens)."""
    rng = np.random.default_rng(0)
    weight = np.clip(0.55 + 0.2 * rng.standard_normal((32, tokens)), 0, 1)
    weight[weight < 0.4] = 0
    value = rng.standard_normal((32, 1)) + 0.9 * rng.standard_normal((32, tokens))
    largest = np.abs(value).max(axis=1, keepdims=True)
    return weight, np.ldexp(value, VALUE_SCALE - np.frexp(largest)[1])


def halves(x):
    first = x.astype(np.float16).astype(np.float64)
    return first, (x - first).astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("channels", [768, 4096, 16_384])
@pytest.mark.parametrize("extra_bits", [1, 2])
def test_similarity_with_itself_on_tensor_cores_that_truncate(channels, extra_bits):
    """The similarity of a token with itself stays above content attention's largest threshold.

    In one accumulator, 4096 channels lose 3.7e-5 on an A100. On an H200, 768 lost 3e-6, as here.
    """
    f = np.random.default_rng(0).standard_normal((32, channels))
    f = halves(f / np.linalg.norm(f, axis=1, keepdims=True))[0]
    square = (f * f).sum(axis=1)
    error = emulated_error([(f, f)], square, CHANNELS, extra_bits)
    assert error < 1 - reference.content_floor(torch.ones(1, dtype=torch.float64)).item()


def steps(gpu):
    """The numbers of tokens that `product` and `stream` sum on tensor cores in float32."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, sums, one = meta(1, 5184, 256, dtype=torch.float16), meta(1, 5184), meta(1)
    split, panel = Operand(x, x), meta(1, 128, 5248, dtype=torch.float16)
    product = product_launch(Operand(panel, panel), split, *[sums] * 3, None, EPS, x, 0, gpu)
    stream = stream_launch(split, split, sums, one, None, None, EPS, x, sums, gpu)
    return {launch.arguments["BLOCK_N"] for launch in (product, stream)}


@pytest.mark.parametrize("tokens", [5184, 20_000, 82_944])
@pytest.mark.parametrize("gpu, extra_bits", [(A100, 1), (L4, 1), (H100, 2)])
def test_float32_sums_on_tensor_cores_that_truncate(tokens, gpu, extra_bits):
    """One accumulator would be off by 3e-5 (H100) at 5184 tokens, and linearly in their number."""
    weight, value = weights_and_values(tokens)
    (w, w2), (v, v2) = halves(weight), halves(value)
    exact = (weight * value).sum(axis=1)
    for step in steps(gpu):
        error = emulated_error([(w2, v), (w, v2), (w, v)], exact, step, extra_bits)
        assert error <= RELATIVE_ERROR[torch.float32] / 5


@pytest.mark.parametrize("extra_bits, expected", [(1, 7e-4), (2, 4e-4)])
def test_half_precision_sums_stay_on_the_tensor_cores(extra_bits, expected):
    """The error of one accumulator at 82,944 tokens is within the tolerance of float16."""
    weight, value = (halves(x)[0] for x in weights_and_values(82_944))
    error = emulated_error([(weight, value)], (weight * value).sum(axis=1), 82_944, extra_bits)
    assert error <= RELATIVE_ERROR[torch.float16]
    assert error == pytest.approx(expected, rel=0.3)  # the number that `split_dot` states


def far_from_zero(n, d):
    """Values and features whose sums have one sign, so that truncation is a bias."""
    values, features = torch.randn(1, n, d) + 3 * torch.randn(d), torch.randn(1, n, d)
    return values, features + torch.randn(d)


@pytest.mark.gpu
@pytest.mark.parametrize("n, d", [(5184, 1024), (20_000, 256), (82_944, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_accuracy_on_many_tokens(n, d, dtype):
    """The error of 64 rows against float64 is 5e-6 at most in float32."""
    values, features = (t.to("cuda", dtype) for t in far_from_zero(n, d))
    out = sf.aggregate(values, features, -1.0, backend="triton")
    rows = torch.randint(n, (64,), device="cuda")
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    weight = unit[rows] @ unit.mT
    ref = weight @ values[0].double() / (weight.sum(dim=-1, keepdim=True) + EPS)
    assert_close(out[0, rows], ref=ref)


@pytest.mark.gpu
@pytest.mark.parametrize("b, n, d", [(1, 5184, 1024), (64, 196, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_of_towers(b, n, d, dtype):
    """All rows of the kernels agree with the torch path in float64."""
    values, features = torch.randn(b, n, d), torch.randn(b, n, d) + torch.randn(d)
    values, features = values.to("cuda", dtype), features.to("cuda", dtype)
    out = sf.aggregate(values, features, -1.0, backend="triton")
    ref = sf.aggregate(values.double(), features.double(), -1.0, backend="torch")
    assert_close(out, ref=ref)

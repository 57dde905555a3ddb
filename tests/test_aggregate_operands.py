"""Tests the kernels that prepare the operands of the aggregation: norms, their mean, and splits.

Mutations, with the test that each made fail: no NaN for norms that are not finite, no least norm
(`test_norms`); no mask of `has_direction` in `_load_values` or in `sums` (`test_values`,
`test_mean_similarity`); no exponent of its own for a channel of zeros or one that is not finite
(`test_values`).
"""

import pytest
import torch
from cases import RUNS
from tolerance import relative_error

from scclip_fast import chunked, reference
from scclip_fast.kernels.aggregate_details.norms import (
    FEATURE_SCALE,
    inverse_norms,
    split_features,
)
from scclip_fast.kernels.aggregate_details.values import VALUE_SCALE, split_values
from scclip_fast.kernels.mean_similarity import mean_similarity_triton

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.parametrize(
        "device",
        [
            pytest.param(run.values[0], id=run.id, marks=run.marks)
            for run in RUNS
            if run.values[1] == "triton"
        ],
    ),
]
SHAPES = [(2, 7, 5), (1, 300, 40), (1, 33, 1100)]  # the last has two steps of channels


def tokens(shape, dtype, device, transposed):
    """Tokens, three of them without a direction, one of zeros, and one shorter than 1e-12."""
    x = torch.randn(shape).to(dtype)
    x[0, 0, 0], x[0, 1, -1], x[-1, 2, 1] = torch.nan, torch.inf, -torch.inf
    x[0, 4], x[-1, 5] = 0, 1e-20
    if dtype == torch.float32:
        x[0, 6] = 3e19  # the square overflows
    x = x.to(device)
    return x.mT.contiguous().mT if transposed else x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype, transposed", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
class TestOperands:
    def test_norms(self, device, shape, dtype, transposed):
        x = tokens(shape, dtype, device, transposed)
        found, expected = inverse_norms(x), chunked.inverse_norms(x.cpu()).squeeze(-1)
        assert torch.equal(found.isnan().cpu(), expected.isnan())
        assert torch.allclose(found.cpu(), expected, rtol=1e-6, equal_nan=True)

    def test_features(self, device, shape, dtype, transposed):
        """The halves are those of torch's operations, bit for bit."""
        x = tokens(shape, dtype, device, transposed)
        halves, norms = split_features(x)
        scaled = x.float() * (inverse_norms(x) * FEATURE_SCALE).unsqueeze(-1)
        first = scaled.half()
        for half, expected in zip(halves, (first, (scaled - first).half()), strict=True):
            assert torch.equal(half.nan_to_num(7), expected.nan_to_num(7))
        has_direction = inverse_norms(x).isfinite()
        assert torch.equal(norms.nan_to_num(0), has_direction / FEATURE_SCALE)

    def test_values(self, device, shape, dtype, transposed):
        """Halves and units are those of torch's operations, bit for bit."""
        norms = inverse_norms(tokens(shape, dtype, device, False))
        x = tokens(shape, dtype, device, False).nan_to_num()
        x[..., 1] = 0
        x[..., 2] *= 1e-30
        x[..., 3] = torch.finfo(dtype).max / 2
        x[0, 3, 4] = torch.nan
        x[~norms.isfinite()] = torch.inf  # counts as zeros
        x = x.mT.contiguous().mT if transposed else x
        (first, second), unit = split_values(x, norms)

        values = x.float().where(norms.isfinite().unsqueeze(-1), 0)
        largest = values.abs().amax(dim=1, keepdim=True)
        largest = torch.where(largest.isfinite(), largest, 1)
        exponent = torch.frexp(largest).exponent.clamp(min=-100) - VALUE_SCALE
        scaled = torch.ldexp(values, -exponent)
        assert torch.equal(unit, torch.ldexp(torch.ones_like(largest), exponent))
        assert torch.equal(first.nan_to_num(7), scaled.half().nan_to_num(7))
        assert torch.equal(second.nan_to_num(7), (scaled - scaled.half()).half().nan_to_num(7))

    def test_mean_similarity(self, device, shape, dtype, transposed):
        x = tokens(shape, dtype, device, transposed)
        exact = x.double().masked_fill(inverse_norms(x).isnan().unsqueeze(-1), torch.nan)
        expected = reference.mean_similarity(exact.cpu())
        assert relative_error(mean_similarity_triton(x), expected) < 2e-6


def test_no_token_with_a_direction(device):
    assert mean_similarity_triton(torch.full((2, 3, 4), torch.nan, device=device)).tolist() == [
        0,
        0,
    ]

"""Repair: 5 % of the tokens, at random, become the mean of their good neighbours in the image."""

from __future__ import annotations

import math
from functools import cache, partial

import harness
import pytest
import torch
from torch import Tensor

import scclip_fast as sf


def published(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A loop over the outliers."""
    height, width = grid
    repaired = tokens.clone()
    outliers = mask.tolist()
    for image, token in mask.nonzero().tolist():
        y, x = divmod(token, width)
        rows, columns = range(max(0, y - 1), y + 2), range(max(0, x - 1), x + 2)
        around = [r * width + c for r in rows for c in columns if r < height and c < width]
        good = [other for other in around if not outliers[image][other]]
        if good:
            repaired[image, token] = tokens[image, good].mean(dim=0)
    return repaired


COMMON = {"scclip_fast torch": partial(sf.repair, backend="torch"), "published": published}
PROVIDERS = {
    "cpu": COMMON,
    "cuda": {"scclip_fast triton": partial(sf.repair, backend="triton")} | COMMON,
}


@cache
def outliers(device: str, shape: harness.Shape) -> Tensor:
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)).lt(0.05).to(device)


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(PROVIDERS, "float32", "float16"))
def test_repair(device, shape, dtype, provider, race):
    side = math.isqrt(shape[1])
    inputs = harness.tokens(device, shape, dtype), outliers(device, shape), (side, side)
    race(
        partial(PROVIDERS[device][provider], *inputs),
        check=lambda out: harness.assert_close(out, sf.repair(*inputs)),
    )

"""Repair of 5 % of the tokens, at random, by the mean of their neighbours that are none of them."""

from __future__ import annotations

import math
from functools import cache, partial

import harness
import published_clip
import pytest
import torch
from torch import Tensor

import scclip_fast as sf


def published(tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repairs one image after the other, in a loop over the outliers."""
    return torch.stack(
        [published_clip.repaired(x, m, *grid) for x, m in zip(tokens, mask, strict=True)]
    )


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

"""Adaptive aggregation: averages of values by the cosine similarities that are at least 0.4."""

from __future__ import annotations

from functools import cache, partial

import harness
import published_clip
import pytest
import torch
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

BETA = 0.4


def published(values: Tensor, features: Tensor) -> Tensor:
    """Aggregates by the explicit matrix S (B, N, N)."""
    return published_clip.aggregated(values, published_clip.cosines(features), BETA)


@partial(torch.compile, dynamic=False, fullgraph=True)
def compiled(values: Tensor, features: Tensor) -> Tensor:
    floor = values.new_full(values.shape[:1], BETA)
    return reference.aggregate(values, features, floor, None)[0]


COMMON = {
    "scclip_fast torch": partial(sf.aggregate, beta=BETA, backend="torch"),
    "published": published,
    "torch.compile": compiled,
}
PROVIDERS = {
    "cpu": COMMON,
    "cuda": {"scclip_fast triton": partial(sf.aggregate, beta=BETA, backend="triton")} | COMMON,
}

MATRICES = {"published": 3, "torch.compile": 3}  # S, where it exceeds beta, and divided by the sums


@cache
def inputs(device: str, shape: harness.Shape, dtype: str) -> tuple[Tensor, Tensor]:
    values = harness.heads(device, shape, dtype)[2].transpose(1, 2).flatten(2)
    return values, harness.tokens(device, shape, dtype)


@cache
def expected(device: str, shape: harness.Shape, dtype: str) -> Tensor:
    return sf.aggregate(*inputs(device, shape, dtype), BETA, backend="torch")


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(PROVIDERS, "float32", "float16"))
def test_aggregate(device, shape, dtype, provider, race):
    race(
        partial(PROVIDERS[device][provider], *inputs(device, shape, dtype)),
        check=lambda out: harness.assert_close(out, expected(device, shape, dtype)),
        extra_bytes=harness.matrices(MATRICES.get(provider, 0), shape, dtype),
    )

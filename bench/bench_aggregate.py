"""Adaptive aggregation: values averaged by the cosine similarities of features above beta = 0.4."""

from __future__ import annotations

from functools import cache, partial

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

BETA = 0.4


def published(values: Tensor, features: Tensor) -> Tensor:
    """On the explicit matrix S (B, N, N)."""
    unit = F.normalize(features, dim=-1)
    similarity = torch.matmul(unit, unit.mT)
    similarity = torch.where(similarity < BETA, 0, similarity)
    similarity = similarity / (similarity.sum(dim=-1, keepdim=True) + 1e-6)
    return torch.matmul(similarity, values)


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

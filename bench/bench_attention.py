"""Blended attention: half of self attention, half of attention to similar features, heads of 64."""

from __future__ import annotations

from functools import cache, partial

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

ALPHA = 0.5
GAMMA = 3.0


def content(features: Tensor) -> Tensor:
    """C (B, N, N), the softmax of gamma (S - mean S) where that is positive."""
    unit = F.normalize(features, dim=-1)
    similarity = torch.matmul(unit, unit.mT)
    logits = GAMMA * (similarity - similarity.mean(dim=(-2, -1), keepdim=True))
    return torch.softmax(logits.masked_fill(logits < 0, -torch.inf), dim=-1)


def published(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    """On the explicit matrices of both attentions, (B, H, N, N) and (B, N, N)."""
    weights = torch.softmax(torch.matmul(q, k.mT) * q.shape[-1] ** -0.5, dim=-1)
    weights = (1 - ALPHA) * weights + ALPHA * content(features).unsqueeze(1)
    return torch.matmul(weights, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    """Fused self attention; the content matrix, explicit, meets all heads in one product."""
    own = F.scaled_dot_product_attention(q, k, v)
    alike = torch.matmul(content(features), v.transpose(1, 2).flatten(2))
    return torch.lerp(own, alike.unflatten(2, v.shape[1::2]).transpose(1, 2), ALPHA)


@partial(torch.compile, dynamic=False, fullgraph=True)
def compiled(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    floor = reference.content_floor(reference.mean_similarity(features))
    values = v.transpose(1, 2).flatten(2)
    alike = reference.aggregate(values, features, floor, GAMMA)[0]
    alike = alike.unflatten(2, v.shape[1::2]).transpose(1, 2)
    return reference.attention(q, k, v, alike, ALPHA, q.shape[-1] ** -0.5)


def ours(backend: str):
    return partial(sf.blended_attention, gamma=GAMMA, alpha=ALPHA, backend=backend)


COMMON = {
    "scclip_fast torch": ours("torch"),
    "published": published,
    "SDPA + content": sdpa,
    "torch.compile": compiled,
}
PROVIDERS = {"cpu": COMMON, "cuda": {"scclip_fast triton": ours("triton")} | COMMON}


def extra_bytes(provider: str, shape: harness.Shape, dtype: str) -> int:
    """N x N matrices: four for the content, with masks; scores, weights and blend of each head."""
    heads = shape[2] // 64
    # torch.compile recognises the self half as SDPA, and fuses what makes the content.
    count = {"SDPA + content": 4.5, "published": 3 * heads + 2, "torch.compile": 3}
    return harness.matrices(count.get(provider, 0), shape, dtype)


@cache
def expected(device: str, shape: harness.Shape, dtype: str) -> Tensor:
    q, k, v = harness.heads(device, shape, dtype)
    return ours("torch")(q, k, v, harness.tokens(device, shape, dtype))


@pytest.mark.parametrize(harness.ARGUMENTS, harness.cases(PROVIDERS, "float32", "float16"))
def test_blended_attention(device, shape, dtype, provider, race):
    q, k, v = harness.heads(device, shape, dtype)
    features = harness.tokens(device, shape, dtype)
    race(
        partial(PROVIDERS[device][provider], q, k, v, features),
        check=lambda out: harness.assert_close(out, expected(device, shape, dtype)),
        extra_bytes=extra_bytes(provider, shape, dtype),
    )

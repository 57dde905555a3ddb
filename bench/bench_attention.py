"""Blended attention: one half self attention, one half content attention; heads of 64 channels."""

from __future__ import annotations

from functools import cache, partial

import harness
import published_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

ALPHA = 0.5
GAMMA = 3.0


def content(features: Tensor) -> Tensor:
    """Computes the content weights C (B, N, N)."""
    return published_clip.content_weights(published_clip.cosines(features), GAMMA)


def published(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    """Blends the explicit matrices of both attentions, (B, H, N, N) and (B, N, N)."""
    return published_clip.blended(q, k, v, content(features).unsqueeze(1), ALPHA)


def sdpa(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    """Adds fused self attention and one product of the explicit content matrix with all heads."""
    self_half = F.scaled_dot_product_attention(q, k, v)
    content_half = torch.matmul(content(features), v.transpose(1, 2).flatten(2))
    content_half = content_half.unflatten(2, v.shape[1::2]).transpose(1, 2)
    return torch.lerp(self_half, content_half, ALPHA)


@partial(torch.compile, dynamic=False, fullgraph=True)
def compiled(q: Tensor, k: Tensor, v: Tensor, features: Tensor) -> Tensor:
    values = v.transpose(1, 2).flatten(2)
    mean = reference.mean_similarity(features)
    content_half = reference.content_attention(values, features, GAMMA, mean)
    content_half = content_half.unflatten(2, v.shape[1::2]).transpose(1, 2)
    return reference.attention(q, k, v, content_half, ALPHA, q.shape[-1] ** -0.5)


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
    """Counts N x N matrices: four for the content, with masks; three for each head."""
    heads = shape[2] // 64
    # torch.compile replaces the self half by SDPA, and fuses the steps of the content weights.
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

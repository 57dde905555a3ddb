"""Blended attention and its gradients, a chunk of queries at a time.

Without gradients, images whose weights fit one tile are blended before the product with the values,
which then is one product in place of two (`blended_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiles
from .aggregate import content_weights
from .tiles import compute_dtype, spans

#: With more tokens, torch's fused attention and a product for the content half are faster: 353
#: instead of 400 ms at 2304 tokens of 1024 channels, but 12.2 instead of 11.2 ms at 441 of 768 (one
#: core).
BLENDED_TOKENS = 768


def attention(
    q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float, scale: float
) -> Tensor:
    """`reference.attention`, where torch's own attention computes the self half.

    Chunks are small enough for the plain form of attention, which holds all scores of a chunk. The
    fused form on a CPU holds few scores, and takes a seventh less time on all queries at once.
    """
    # On a GPU, torch's fused attention of float32 multiplies on tensor cores, whose sums truncate.
    plain = q.dtype == torch.float32 and q.device.type != "cpu"
    attend = plain_attention if plain else F.scaled_dot_product_attention
    fused_on_cpu = q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
    chunks = [(slice(None), slice(None))] if fused_on_cpu else _chunks(q, k)
    out = torch.empty_like(content, memory_format=torch.contiguous_format)
    for images, rows in chunks:
        self_attention = attend(q[images, :, rows], k[images], v[images], scale=scale)
        torch.lerp(self_attention, content[images, :, rows], alpha, out=out[images, :, rows])
    return out


def can_blend_weights(v: Tensor, features: Tensor) -> bool:
    """True if `blended_attention` takes values v (B, H, N, dv) and features (B, N, D)."""
    is_small = v.shape[2] <= BLENDED_TOKENS
    return v.device.type == "cpu" and compute_dtype(v, features) == v.dtype and is_small


def blended_attention(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, gamma: float, alpha: float, scale: float
) -> Tensor:
    """[(1 - alpha) softmax(scale q k^T) + alpha C] v, (B, H, N, dv), on a CPU.

    The weights C (N, N) of one image are held at a time. 12 heads of 196 tokens take 2.9 ms on one
    core, and 3.3 ms where C has a product of its own.
    """
    batch, heads, n, _ = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    # Chunks of half that many bytes are a tenth slower, and scores of all heads a half.
    chunk = max(1, tiles.WORKSPACE_BYTES // 32 // v.itemsize)
    n_rows = max(1, min(n, chunk // n))
    n_heads = max(1, chunk // (n * n_rows)) if n_rows == n else 1
    for image in range(batch):
        content = content_weights(features[image, None].to(v.dtype), gamma)[0].mul_(alpha)
        for some in spans(heads, n_heads):
            for rows in spans(n, n_rows):
                at = image, some, rows
                weights = torch.softmax((q[at] * scale) @ k[image, some].mT, dim=-1)
                torch.add(content[rows], weights, alpha=1 - alpha, out=weights)
                torch.matmul(weights, v[image, some], out=out[at])
    return out


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, with the scores in memory."""
    return torch.softmax((q @ k.mT).mul_(scale), dim=-1) @ v


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(scale q k^T) v by q, k and v, the attention recomputed in chunks."""
    dtype = compute_dtype(q)
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=dtype) for t in (q, k, v))
    for images, rows in _chunks(q, k):
        g, queries, keys, values = (
            t[images].to(dtype) for t in (grad[:, :, rows], q[:, :, rows], k, v)
        )
        grad_q[images, :, rows], by_keys, by_values = _chunk_backward(
            g, queries, keys, values, scale
        )
        grad_k[images] += by_keys
        grad_v[images] += by_values
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _chunk_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Gradients by the queries of one chunk, and its shares of the gradients by k and v.

    With p = softmax(scale q k^T) and dp = g v^T, the scores have ds = scale p (dp - sum_j p dp).
    """
    p = torch.softmax((q @ k.mT).mul_(scale), dim=-1)
    ds = g @ v.mT
    ds -= (p * ds).sum(dim=-1, keepdim=True)
    ds.mul_(p).mul_(scale)
    return ds @ k, ds.mT @ q, p.mT @ g


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields images and chunks of their queries, whose scores fit the workspace."""
    batch, heads, queries, _ = q.shape
    row_bytes = max(1, heads * k.shape[-2] * tiles.TILE_COPIES * compute_dtype(q).itemsize)
    rows_per_step = max(1, tiles.WORKSPACE_BYTES // row_bytes)
    for images in spans(batch, max(1, rows_per_step // max(1, queries))):
        for rows in spans(queries, rows_per_step):
            yield images, rows

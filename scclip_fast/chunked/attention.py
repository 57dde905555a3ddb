"""Blended attention and its gradients, a chunk of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tiles
from .tiles import compute_dtype, spans


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

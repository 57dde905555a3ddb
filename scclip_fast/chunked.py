"""The torch path, on CPU and GPU: the reference's equations tile by tile, never an N x N tensor.

Beyond the tensors it returns, a call holds at most about `WORKSPACE_BYTES`, whatever N, D and the
batch are, plus O(B N) floats (norms, sums) and, where N does not fit one tile, the running O(B N k)
neighbour lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import NORM_EPS, normaliser_eps, weights
from .selection import GROUP, smallest, smallest_grouped

WORKSPACE_BYTES = 64 * 2**20

_TILE_COPIES = 4  # a tile of similarities, their weights, and what the backward pass makes of them
_MAX_COLUMNS = 8192  # wider tiles leave too few rows for an efficient matrix product


class Tile(NamedTuple):
    """How much one step covers: images x rows x columns of the batch of N x N matrices."""

    images: int
    rows: int
    columns: int


def plan(
    batch: int, tokens: int, width: int, dtype: torch.dtype, copies: float = _TILE_COPIES
) -> Tile:
    """The largest tile of which `copies` and operands of `width` a token fit `WORKSPACE_BYTES`."""
    half = WORKSPACE_BYTES // 2 // dtype.itemsize
    columns = min(tokens, _MAX_COLUMNS, max(1, half // width))
    rows = max(1, int(half / (columns * copies + width)))
    rows = min(tokens, rows // 64 * 64 or rows)  # whole blocks of a matrix product
    images = max(1, int(half / (rows * columns * copies + (rows + columns) * width)))
    return Tile(max(1, min(batch, images)), rows, columns)


def spans(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 for the short types, else the longest among the tensors."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def finite_mean(x: Tensor) -> Tensor:
    """(B, 1, D) mean of the finite tokens; what is centred on it loses no digits to an offset."""
    batch, tokens, width = x.shape
    dtype = compute_dtype(x)
    total = x.new_zeros(batch, 1, width, dtype=dtype)
    count = x.new_zeros(batch, 1, 1, dtype=dtype)
    for part in spans(
        tokens, max(1, WORKSPACE_BYTES // max(1, 4 * batch * width * dtype.itemsize))
    ):
        finite = x[:, part].isfinite().all(dim=-1, keepdim=True)
        total += torch.where(finite, x[:, part], 0).sum(dim=1, keepdim=True, dtype=dtype)
        count += finite.sum(dim=1, keepdim=True)
    return total / count.clamp(min=1)


def neighbors(x: Tensor, k: int, queries: Tensor | None = None) -> Tensor:
    """Indices (B, M, k) of the tokens of x (B, N, D) nearest to queries (B, M, D), nearest first.

    Without queries, of the nearest others to every token of x.

    d2(i, j) - ||x_i||^2 = ||x_j||^2 - 2 x_i x_j ranks like d2 along a row. x is centred first:
    distances do not change, and the products lose no digits to a few huge channels.
    """
    batch, tokens, width = x.shape
    dtype = compute_dtype(x)
    tile = plan(batch, tokens, width, dtype, copies=1 + 6 * min(1, k * GROUP / tokens))
    from_rows = x if queries is None else queries
    asked = from_rows.shape[1]
    scores = x.new_full((batch, asked, k), torch.inf, dtype=dtype)
    indices = x.new_zeros((batch, asked, k), dtype=torch.int64)
    for images in spans(batch, tile.images):
        block, mean = x[images], finite_mean(x[images])
        for columns in spans(tokens, tile.columns):
            candidates, norms = _centred(block[:, columns], mean, multiple=GROUP)
            # One tile for all: an allocator hands out and takes back so large ones at a cost.
            score = norms.new_empty(block.shape[0], tile.rows, norms.shape[-1])
            for rows in spans(asked, tile.rows):
                centred, _ = _centred(from_rows[images, rows], mean)
                part = score[:, : centred.shape[1]]
                torch.baddbmm(norms.unsqueeze(1), centred, candidates.mT, alpha=-2, out=part)
                if queries is None:
                    itself = part.diagonal(offset=rows.start - columns.start, dim1=-2, dim2=-1)
                    itself.fill_(torch.inf)
                _keep_smallest(scores[images, rows], indices[images, rows], part, columns.start)
            del candidates, score  # before the next are made
    return indices


def pair_distances(x: Tensor, neighbors: Tensor, queries: Tensor | None = None) -> Tensor:
    """||q_i - x_j||^2 (B, M, m) for j in neighbors (B, M, m), exactly 0 for duplicates.

    Without queries q (B, M, D), these are the tokens of x (B, N, D). It sums squared differences:
    the Gram form only ranks, as its error is that of the norms.
    """
    batch, asked, m = neighbors.shape
    from_rows = x if queries is None else queries
    dtype = compute_dtype(x)
    distances = torch.empty(batch, asked, m, dtype=dtype, device=x.device)
    rows_per_step = max(1, WORKSPACE_BYTES // 32 // max(1, m * x.shape[-1] * dtype.itemsize))
    for image in range(batch):
        for rows in spans(asked, rows_per_step):
            others = x[image].index_select(0, neighbors[image, rows].flatten()).to(dtype)
            difference = others.unflatten(0, (-1, m)).sub_(from_rows[image, rows, None])
            distances[image, rows] = difference.square_().sum(dim=-1)
    return torch.where(distances.isfinite(), distances, torch.inf)


def aggregate(
    values: Tensor, features: Tensor, floor: Tensor, gamma: float | None
) -> tuple[Tensor, Tensor]:
    """`reference.aggregate` over tiles; floor is (B,), the sums of the weights (B, N)."""
    batch, tokens, _ = values.shape
    dtype = compute_dtype(values, features)
    scale = inverse_norms(features)
    tile = plan(batch, tokens, values.shape[-1] + features.shape[-1], dtype)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    total = torch.empty(batch, tokens, dtype=dtype, device=values.device)
    for images in spans(batch, tile.images):
        for rows in spans(tokens, tile.rows):
            queries = features[images, rows].to(dtype) * scale[images, rows]
            average = weight_sum = torch.zeros((), dtype=dtype, device=values.device)
            for columns in spans(tokens, tile.columns):
                keys = features[images, columns].to(dtype)
                s = (queries @ keys.mT).mul_(scale[images, columns].mT)
                w = weights(s, floor[images, None, None], gamma)
                average = average + w @ values[images, columns].to(dtype)
                weight_sum = weight_sum + w.sum(dim=-1)
            out[images, rows] = (average / (weight_sum + normaliser_eps(gamma)).unsqueeze(-1)).to(
                out.dtype
            )
            total[images, rows] = weight_sum
    return out, total


def aggregate_backward(
    grad: Tensor,
    values: Tensor,
    features: Tensor,
    floor: Tensor,
    gamma: float | None,
    out: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `aggregate` by values and features, the tiles recomputed.

    With a_ij = w_ij / z_i: dv_j = sum_i a_ij g_i and dw_ij = (g_i v_j - g_i out_i) / z_i. The floor
    only gates, so its derivative is zero almost everywhere (and the softmax does not depend on the
    mean it subtracts).
    """
    batch, tokens, _ = values.shape
    dtype = compute_dtype(values, features)
    scale = inverse_norms(features)
    tile = plan(batch, tokens, 2 * (values.shape[-1] + features.shape[-1]), dtype)
    z = (total + normaliser_eps(gamma)).unsqueeze(-1)
    projected = (grad.to(dtype) * out.to(dtype)).sum(dim=-1, keepdim=True)  # g_i out_i
    grad_values = torch.zeros_like(values, dtype=dtype, memory_format=torch.contiguous_format)
    grad_unit = torch.zeros_like(features, dtype=dtype, memory_format=torch.contiguous_format)
    for images in spans(batch, tile.images):
        for rows in spans(tokens, tile.rows):
            g = grad[images, rows].to(dtype) / z[images, rows]
            queries = features[images, rows].to(dtype) * scale[images, rows]
            for columns in spans(tokens, tile.columns):
                keys = features[images, columns].to(dtype) * scale[images, columns]
                s = queries @ keys.mT
                w = weights(s, floor[images, None, None], gamma)
                dw = (
                    g @ values[images, columns].to(dtype).mT
                    - projected[images, rows] / z[images, rows]
                )
                ds = dw * (w * gamma if gamma is not None else s >= floor[images, None, None])
                grad_values[images, columns] += w.mT @ g
                grad_unit[images, rows] += ds @ keys
                grad_unit[images, columns] += ds.mT @ queries
    unit = features.to(dtype) * scale
    radial = (unit * grad_unit).sum(dim=-1, keepdim=True) * (scale < 1 / NORM_EPS)
    return grad_values.to(values.dtype), ((grad_unit - unit * radial) * scale).to(features.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float, scale: float
) -> Tensor:
    """`reference.attention` on torch's own, a chunk of queries that its plain form has room for."""
    out = torch.empty_like(content, memory_format=torch.contiguous_format)
    for image, rows in _attention_spans(q, k):
        self_attention = F.scaled_dot_product_attention(
            q[image, :, rows], k[image], v[image], scale=scale
        )
        out[image, :, rows] = self_attention.lerp(content[image, :, rows], alpha)
    return out


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(scale q k^T) v by q, k and v, the attention recomputed in chunks."""
    dtype = compute_dtype(q)
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=dtype) for t in (q, k, v))
    for image, rows in _attention_spans(q, k):
        g, queries, keys, values = (
            t[image].to(dtype) for t in (grad[:, :, rows], q[:, :, rows], k, v)
        )
        grad_q[image, :, rows], by_keys, by_values = _attention_chunk_backward(
            g, queries, keys, values, scale
        )
        grad_k[image] += by_keys
        grad_v[image] += by_values
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _attention_chunk_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, ...]:
    p = torch.softmax((q @ k.mT).mul_(scale), dim=-1)
    ds = g @ v.mT
    ds -= (p * ds).sum(dim=-1, keepdim=True)
    ds.mul_(p).mul_(scale)
    return ds @ k, ds.mT @ q, p.mT @ g


def _attention_spans(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    batch, heads, queries, _ = q.shape
    row_bytes = heads * k.shape[-2] * _TILE_COPIES * compute_dtype(q).itemsize
    for image in spans(batch, 1):
        for rows in spans(queries, max(1, WORKSPACE_BYTES // max(1, row_bytes))):
            yield image, rows


def inverse_norms(features: Tensor) -> Tensor:
    """1 / ||f||, (B, N, 1); the norm is held above `NORM_EPS` as in F.normalize."""
    norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=compute_dtype(features))
    return norms.clamp(min=NORM_EPS).reciprocal()


def _centred(tokens: Tensor, mean: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """tokens (b, n, D) - mean and its squared norms (b, n), with n filled up to a multiple.

    A token that is not finite becomes 0 with the largest finite norm, one that only fills up 0 with
    an infinite norm: in this order they come last.
    """
    batch, n, width = tokens.shape
    missing = -n % multiple
    centred = mean.new_empty(batch, n + missing, width)
    centred[:, n:] = 0
    torch.sub(tokens, mean, out=centred[:, :n])
    norms = torch.linalg.vector_norm(centred, dim=-1).square_()
    broken = ~norms.isfinite()
    norms.masked_fill_(broken, torch.finfo(norms.dtype).max)[:, n:] = torch.inf
    return centred.masked_fill_(broken.unsqueeze(-1), 0), norms


def _keep_smallest(best_scores: Tensor, best_indices: Tensor, scores: Tensor, first: int) -> None:
    """Merge scores (b, r, c), whose columns count from `first`, into the best so far (b, r, k)."""
    k = best_scores.shape[-1]
    found, position = smallest_grouped(scores, k)
    position += first
    if first > 0 or found.shape[-1] < k:
        found, order = smallest(torch.cat([best_scores, found], dim=-1), k)
        position = torch.cat([best_indices, position], dim=-1).gather(-1, order)
    best_scores.copy_(found)
    best_indices.copy_(position)

"""The torch path, on CPU and GPU: the reference's equations tile by tile, never an N x N tensor.

Beyond the tensors it returns, a call holds at most about `WORKSPACE_BYTES`, whatever N, D and the
batch are, plus O(B N) floats (norms, sums).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import NORM_EPS, normaliser_eps, weights

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
                keys = features[images, columns], scale[images, columns], values[images, columns]
                part, part_sum = weighed(queries, *keys, floor[images], gamma)
                average = average + part
                weight_sum = weight_sum + part_sum
            out[images, rows] = (average / (weight_sum + normaliser_eps(gamma)).unsqueeze(-1)).to(
                out.dtype
            )
            total[images, rows] = weight_sum
    return out, total


def weighed(
    queries: Tensor,
    features: Tensor,
    scale: Tensor,
    values: Tensor,
    floor: Tensor,
    gamma: float | None,
) -> tuple[Tensor, Tensor]:
    """Sums (b, r, Dv) of the values (b, c, Dv) by weight, and of the weights (b, r).

    Queries (b, r, D) are unit rows in the dtype of the sums, scale (b, c, 1) the features' inverse
    norms. Both are NaN for a token that is not finite: its column has weight 0, its row sums NaN.
    """
    s = (queries @ features.to(queries.dtype).mT).mul_(scale.mT)
    w = weights(s, floor[:, None, None], gamma)
    total = w.sum(dim=-1).masked_fill_(queries[..., 0].isnan(), torch.nan)
    # A weight of 0 times an infinity would be NaN.
    return w @ values.to(queries.dtype).masked_fill(scale.isnan(), 0), total


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
    mean it subtracts). A token that is not finite has gradients of 0, and its row sends none.
    """
    batch, tokens, _ = values.shape
    dtype = compute_dtype(values, features)
    scale = inverse_norms(features)
    broken = scale.isnan()
    tile = plan(batch, tokens, 2 * (values.shape[-1] + features.shape[-1]), dtype)
    z = (total + normaliser_eps(gamma)).unsqueeze(-1)
    projected = (grad.to(dtype) * out.to(dtype)).sum(dim=-1, keepdim=True)  # g_i out_i
    offset = (projected / z).masked_fill_(broken, 0)
    grad_values = torch.zeros_like(values, dtype=dtype, memory_format=torch.contiguous_format)
    grad_unit = torch.zeros_like(features, dtype=dtype, memory_format=torch.contiguous_format)
    for images in spans(batch, tile.images):
        for rows in spans(tokens, tile.rows):
            at = images, rows
            g = (grad[at].to(dtype) / z[at]).masked_fill_(broken[at], 0)
            queries = (features[at].to(dtype) * scale[at]).masked_fill_(broken[at], 0)
            for columns in spans(tokens, tile.columns):
                at = images, columns
                keys = (features[at].to(dtype) * scale[at]).masked_fill_(broken[at], 0)
                s = queries @ keys.mT
                w = weights(s, floor[images, None, None], gamma)
                dw = g @ values[at].to(dtype).masked_fill(broken[at], 0).mT - offset[images, rows]
                ds = dw * (w * gamma if gamma is not None else s >= floor[images, None, None])
                grad_values[at] += w.mT @ g
                grad_unit[images, rows] += ds @ keys
                grad_unit[at] += ds.mT @ queries
    unit = features.to(dtype) * scale
    radial = (unit * grad_unit).sum(dim=-1, keepdim=True) * (scale < 1 / NORM_EPS)
    grad_features = ((grad_unit - unit * radial) * scale).masked_fill_(broken, 0)
    return grad_values.masked_fill_(broken, 0).to(values.dtype), grad_features.to(features.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, content: Tensor, alpha: float, scale: float
) -> Tensor:
    """`reference.attention` on torch's own, a chunk of queries that its plain form has room for."""
    # On a GPU, torch's fused attention of float32 multiplies on tensor cores, whose sums truncate.
    plain = q.dtype == torch.float32 and q.device.type != "cpu"
    attend = _plain_attention if plain else F.scaled_dot_product_attention
    out = torch.empty_like(content, memory_format=torch.contiguous_format)
    for image, rows in _attention_spans(q, k):
        self_attention = attend(q[image, :, rows], k[image], v[image], scale=scale)
        out[image, :, rows] = self_attention.lerp(content[image, :, rows], alpha)
    return out


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax((q @ k.mT).mul_(scale), dim=-1) @ v


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
    """1 / ||f||, (B, N, 1), with the norm held above `NORM_EPS`; NaN where it is not finite."""
    norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=compute_dtype(features))
    return norms.clamp(min=NORM_EPS).reciprocal().masked_fill_(~norms.isfinite(), torch.nan)

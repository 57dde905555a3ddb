"""Means of values weighted by cosine similarity, and their gradients, tile by tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import NORM_EPS, content_floor, normaliser_eps, weights
from .gram import gram, images_per_step, tile_pairs
from .tiles import Scratch, compute_dtype, plan, spans


def aggregate(
    values: Tensor, features: Tensor, floor: Tensor, gamma: float | None
) -> tuple[Tensor, Tensor]:
    """`reference.aggregate`: means (B, N, Dv) and sums of the weights (B, N); floor is (B,)."""
    scale = inverse_norms(features)
    if values.device.type == "cpu" and values.numel() and not scale.isnan().any():
        return _aggregate_symmetric(values, features, scale, floor, gamma)
    batch, tokens, _ = values.shape
    dtype = compute_dtype(values, features)
    tile = plan(batch, tokens, values.shape[-1] + features.shape[-1], dtype)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    total = torch.empty(batch, tokens, dtype=dtype, device=values.device)
    for images in spans(batch, tile.images):
        for rows in spans(tokens, tile.rows):
            queries = features[images, rows].to(dtype) * scale[images, rows]
            value_sum = weight_sum = torch.zeros((), dtype=dtype, device=values.device)
            for columns in spans(tokens, tile.columns):
                keys = features[images, columns], scale[images, columns], values[images, columns]
                tile_values, tile_weights = weighted_sums(queries, *keys, floor[images], gamma)
                value_sum = value_sum + tile_values
                weight_sum = weight_sum + tile_weights
            z = (weight_sum + normaliser_eps(gamma)).unsqueeze(-1)
            out[images, rows] = (value_sum / z).to(out.dtype)
            total[images, rows] = weight_sum
    return out, total


def _aggregate_symmetric(
    values: Tensor, features: Tensor, scale: Tensor, floor: Tensor, gamma: float | None
) -> tuple[Tensor, Tensor]:
    """`aggregate` with each similarity of two tokens computed once, as weights are symmetric too.

    The sums of all rows are held at once, in the dtype of the sums.

    Args:
        scale: `inverse_norms` of the features, all of which are finite.
    """
    batch, tokens, width = values.shape
    dtype = compute_dtype(values, features)
    sums = torch.empty(batch, tokens, width, dtype=dtype)
    total = torch.empty(batch, tokens, dtype=dtype)
    pairs = tile_pairs(tokens, dtype)
    step = images_per_step(tokens, max(width, features.shape[-1]), dtype)
    scratch = Scratch()

    def add(images: slice, rows: slice, columns: slice, w: Tensor) -> None:
        column_values = values[images, columns].to(dtype)
        if columns.start == 0:  # the first tile of these rows
            torch.bmm(w, column_values, out=sums[images, rows])
            total[images, rows] = w.sum(dim=-1)
        else:
            sums[images, rows].baddbmm_(w, column_values)
            total[images, rows] += w.sum(dim=-1)

    for images in spans(batch, step):
        for rows, columns in pairs:
            unit = unit_rows = features[images, rows].to(dtype) * scale[images, rows]
            if rows != columns:
                unit = features[images, columns].to(dtype) * scale[images, columns]
            shape = len(unit), unit_rows.shape[1], unit.shape[1]
            tile = gram(unit_rows, unit, scratch.take("tile", shape, dtype), scratch)
            w = weights_(tile, floor[images], gamma)
            add(images, rows, columns, w)
            if rows != columns:
                add(images, columns, rows, w.mT)
    sums /= (total + normaliser_eps(gamma)).unsqueeze(-1)
    return sums.to(values.dtype), total


def content_weights(features: Tensor, gamma: float) -> Tensor:
    """The weights C (b, N, N) of content attention, softmax of gamma (S - mu) over S >= mu.

    A token that is not finite has the weight 0 in other rows, and NaN in its own.

    Args:
        features: (b, N, D) on a CPU, in the dtype of the weights.
    """
    scale = inverse_norms(features)
    broken = scale.isnan() if scale.isnan().any() else None
    unit = features * scale
    if broken is not None:
        unit.masked_fill_(broken, 0)
    n_finite = features.shape[1] if broken is None else (~broken).sum(dim=1).clamp(min=1)
    mu = (unit.sum(dim=1) / n_finite).square().sum(dim=-1)
    w = gram(unit, unit, unit.new_empty(len(unit), unit.shape[1], unit.shape[1]), Scratch())
    w = weights_(w, content_floor(mu), gamma)
    if broken is not None:
        w.masked_fill_(broken.mT, 0).masked_fill_(broken, torch.nan)
    return w.div_(w.sum(dim=-1, keepdim=True).add_(normaliser_eps(gamma)))


def weights_(s: Tensor, floor: Tensor, gamma: float | None) -> Tensor:
    """`reference.weights` in the memory of the similarities s (b, r, c), none of which is NaN.

    A threshold takes a thirtieth of the time of a comparison and `masked_fill_`.

    Args:
        s: on a CPU.
        floor: (b,), in the dtype of s.
        gamma: as for `reference.weights`.
    """
    below = torch.nextafter(floor, floor.new_tensor(-torch.inf)).tolist()
    for image, limit in zip(s, below, strict=True):
        F.threshold(image, limit, 0 if gamma is None else -torch.inf, inplace=True)
    if gamma is None:
        return s
    gamma = max(gamma, torch.finfo(s.dtype).tiny)  # 0 times -inf would be NaN
    return torch.add(s.new_tensor(-gamma), s, alpha=gamma, out=s).exp_()


def weighted_sums(
    queries: Tensor,
    features: Tensor,
    scale: Tensor,
    values: Tensor,
    floor: Tensor,
    gamma: float | None,
) -> tuple[Tensor, Tensor]:
    """Sums of w_ij v_j (b, r, Dv) and of w_ij (b, r) over the columns j of one tile.

    A token that is not finite has NaN in `queries` or `scale`. Its column has the weight 0, and its
    row the sum NaN.

    Args:
        queries: (b, r, D), unit vectors of the rows in the dtype of the sums.
        features: (b, c, D) of the columns.
        scale: (b, c, 1), `inverse_norms` of the features.
        values: (b, c, Dv) of the columns.
        floor: (b,).
        gamma: as for `reference.weights`.
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

    With the upstream gradient g, z_i = sum_j w_ij + eps and a_ij = w_ij / z_i:

        dv_j  = sum_i a_ij g_i
        dw_ij = (g_i v_j - g_i out_i) / z_i

    The floor only gates, so its derivative is zero almost everywhere, and the softmax does not
    depend on the mean that it subtracts. A token that is not finite has gradients of 0, and its row
    contributes nothing to other gradients.
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
    # d(f / ||f||) is orthogonal to f, except where the norm is held at `NORM_EPS`.
    unit = features.to(dtype) * scale
    radial = (unit * grad_unit).sum(dim=-1, keepdim=True) * (scale < 1 / NORM_EPS)
    grad_features = ((grad_unit - unit * radial) * scale).masked_fill_(broken, 0)
    return grad_values.masked_fill_(broken, 0).to(values.dtype), grad_features.to(features.dtype)


def inverse_norms(features: Tensor) -> Tensor:
    """1 / ||f||, (B, N, 1), with the norm held above `NORM_EPS`; NaN for tokens not finite."""
    norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=compute_dtype(features))
    return norms.clamp(min=NORM_EPS).reciprocal().masked_fill_(norms == torch.inf, torch.nan)

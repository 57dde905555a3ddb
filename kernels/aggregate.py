"""Similarity-weighted means of the values: which kernels for which shape, and their workspace.

    s_ij  = r_i r_j f_i f_j                          cosine similarity, r = 1 / ||f||
    w_ij  = 1[s_ij >= floor] s_ij                    SC-CLIP's aggregation, or
    w_ij  = 1[s_ij >= floor] exp(gamma (s_ij - 1))   (SOFTMAX) that of softmax(gamma (s_ij - mu))
    out_i = sum_j w_ij v_j / (sum_j w_ij + eps)

f (B, N, D), v (B, N, DV) any strides, r (B, N) and floor (B,) float32
-> out (B, N, DV), total (B, N) float32, the sums of the weights.

A token j has no direction where r_j is not a finite number above 0: w_ij = 0 for all other i,
whatever v_j, and out_j and total_j are NaN.

- A panel of the weights, as many rows as the workspace holds, is written by one product and read by
  another (`panel.py`): no similarity is computed twice, however wide the values are, and of a panel
  that holds all rows only one triangle is computed.
- Where N is so large that a panel has few rows, the weights never leave the chip (`stream.py`).

Half-precision operands are multiplied as they are. Float32 ones are split into two of fp16 each,
x = x_1 + x_2 to 22 bits, and three of the four products taken: fp16 rather than tf32, as its tensor
cores are twice as fast, and split once rather than in every tile.
"""

from __future__ import annotations

import torch
import triton

from .panel import product_launch, weights_launch
from .products import Operand
from .stream import stream_launch

WORKSPACE_BYTES = 64 * 2**20
LEAST_ROWS = 1024  # of a panel; fewer leave the second product too few programs
FEATURE_SCALE = 64.0  # brings the second half of a unit feature into fp16's normal range
VALUE_SCALE = 8  # log2, of the largest value of a channel


def aggregate_triton(
    values: torch.Tensor,
    features: torch.Tensor,
    scale: torch.Tensor,
    floor: torch.Tensor,
    gamma: float | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, total) of the module's equations; gamma=None for the thresholded similarity itself."""
    batch, n, _ = values.shape
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    total = torch.empty(batch, n, dtype=torch.float32, device=values.device)
    unit = None
    if torch.float32 in (values.dtype, features.dtype):
        f = _split(features.float() * (scale * FEATURE_SCALE).unsqueeze(-1))
        has_direction = (scale > 0) & scale.isfinite()
        scale = torch.where(has_direction, 1 / FEATURE_SCALE, torch.nan)
        v, unit = _split_values(values.float().where(has_direction.unsqueeze(-1), 0))
    else:
        f, v = Operand(_in_rows(features), None), Operand(_in_rows(values), None)
    weight = dict(scale=scale.contiguous(), floor=floor.contiguous(), gamma=gamma)
    halves = 1 if f.second is None else 2
    columns = triton.cdiv(n, 128) * 128
    rows = WORKSPACE_BYTES // (2 * halves * columns)
    if rows >= min(n, LEAST_ROWS):
        _by_panels(v, f, weight, eps, out, total, rows, columns)
    else:
        stream_launch(v, f, **weight, eps=eps, out=out, total=total).run()
    return (out if unit is None else out.mul_(unit)), total


def _by_panels(
    v: Operand,
    f: Operand,
    weight: dict,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor,
    rows: int,
    columns: int,
) -> None:
    batch, n, _ = out.shape
    images = min(batch, max(1, rows // columns))
    rows = min(columns, rows // 128 * 128)
    dtype = v.first.dtype
    for image in range(0, batch, images):
        part = slice(image, image + images)
        fs, vs = (Operand(*(t if t is None else t[part] for t in o)) for o in (f, v))
        some = {k: t[part] if isinstance(t, torch.Tensor) else t for k, t in weight.items()}
        for first in range(0, n, rows):
            shape = (len(fs.first), min(rows, columns - first), columns)
            panel = Operand(*(t if t is None else t.new_empty(shape, dtype=dtype) for t in fs))
            sums = total.new_empty(shape[0], columns // 128, shape[1])
            weights_launch(fs, **some, panel=panel, sums=sums, first=first).run()
            last = min(n, first + rows)
            torch.sum(sums[..., : last - first], dim=1, out=total[part, first:last])
            product_launch(panel, vs, some["scale"], total[part], eps, out[part], first).run()


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """Itself, or a copy where a token's channels lie apart, which is read many times as slowly."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _split(x: torch.Tensor) -> Operand:
    first = x.half()
    return Operand(first, (x - first).half())


def _split_values(values: torch.Tensor) -> tuple[Operand, torch.Tensor]:
    """Values (B, N, DV) over a power of two a channel, and those (B, 1, DV)."""
    largest = values.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 1)
    exponent = torch.frexp(largest).exponent.clamp(min=-100) - VALUE_SCALE  # 2^108 is finite
    return _split(torch.ldexp(values, -exponent)), torch.ldexp(torch.ones_like(largest), exponent)

"""Means of the values weighted by similarity: which kernels for which shape, and their workspace.

    s_ij  = r_i r_j f_i f_j                          cosine similarity, r = 1 / ||f||
    w_ij  = 1[s_ij >= floor] s_ij                    SC-CLIP's aggregation, or
    w_ij  = 1[s_ij >= floor] exp(gamma (s_ij - 1))   (SOFTMAX) as in softmax(gamma (s_ij - mu))
    out_i = sum_j w_ij v_j / (sum_j w_ij + eps)

f (B, N, D), v (B, N, DV) any strides, floor (B,) float32
-> out (B, N, DV), total (B, N) float32, the sums of the weights.

A token j has no direction if r_j is not a finite number above 0. Then w_ij = 0 for all other i,
whatever v_j, and out_j and total_j are NaN.

- `panel.py` writes a panel of the weights, as many rows as the workspace holds, by one product and
  reads it in a second one. No similarity is computed twice, however wide the values are, and only
  one triangle of a panel that holds all rows is computed.
- `stream.py` keeps the weights on the chip. It serves N so large that a panel would have few rows.

Half-precision operands are multiplied as they are. A float32 operand is split into two of fp16,
x = x_1 + x_2 to 22 bits, of whose four products three are computed: fp16 and not tf32, as its
tensor cores are twice as fast, and split once and not in every tile: `norms.py` splits features,
`values.py` values.
"""

from __future__ import annotations

import torch

from ._launch import cdiv
from ._plan import planned
from .aggregate_details.norms import inverse_norms, split_features
from .aggregate_details.panel import product_launch, weights_launch
from .aggregate_details.products import Operand
from .aggregate_details.stream import stream_launch
from .aggregate_details.values import split_values

WORKSPACE_BYTES = 64 * 2**20
LEAST_ROWS = 1024  # of a panel; fewer make too few programs of the second product


def aggregate_triton(
    values: torch.Tensor,
    features: torch.Tensor,
    floor: torch.Tensor,
    gamma: float | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, total) of the module's equations; gamma=None takes the similarity itself as weight."""
    settings = gamma, eps
    halves = 2 if torch.float32 in (values.dtype, features.dtype) else 1
    if _panel_bytes(values, halves) > WORKSPACE_BYTES:  # a plan would hold all panels at once
        return _aggregate(values, features, floor, *settings)
    return planned(_aggregate, (values, None if features is values else features, floor), settings)


def _aggregate(
    values: torch.Tensor,
    features: torch.Tensor | None,
    floor: torch.Tensor,
    gamma: float | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`aggregate_triton`, launch by launch; features=None if these are the values."""
    features = values if features is None else features
    batch, n, _ = values.shape
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    total = torch.empty(batch, n, dtype=torch.float32, device=values.device)
    unit = None
    if torch.float32 in (values.dtype, features.dtype):
        f, scale = split_features(features)
        v, unit = split_values(values, scale)
    else:
        f, v = Operand(_in_rows(features), None), Operand(_in_rows(values), None)
        scale = inverse_norms(f.first)
    floor = floor.contiguous()
    halves = 1 if f.second is None else 2
    columns = cdiv(n, 128) * 128
    rows = WORKSPACE_BYTES // (2 * halves * columns)
    if rows < min(n, LEAST_ROWS):
        stream_launch(v, f, scale, floor, unit, gamma, eps, out, total).run()
        return out, total
    images = min(batch, max(1, rows // columns))
    rows = min(columns, rows // 128 * 128)
    for image in range(0, batch, images):
        some = slice(image, image + images)
        fs, vs, units = f.images(some), v.images(some), None if unit is None else unit[some]
        for first in range(0, n, rows):
            shape = (len(fs.first), min(rows, columns - first), columns)
            panel = Operand(*(h if h is None else vs.first.new_empty(shape) for h in fs))
            sums = total.new_empty(shape[0], columns // 128, shape[1])
            weights_launch(fs, scale[some], floor[some], gamma, panel, sums, first).run()
            sums_and_out = sums, total[some], units, eps, out[some]
            product_launch(panel, vs, scale[some], *sums_and_out, first).run()
    return out, total


def _panel_bytes(values: torch.Tensor, halves: int) -> int:
    """The bytes of the weights of all pairs of tokens."""
    return 2 * halves * len(values) * (128 * cdiv(values.shape[1], 128)) ** 2


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """x with each token's channels side by side: apart, they are read many times as slowly."""
    return x if x.stride(-1) == 1 else x.contiguous()

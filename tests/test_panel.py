"""Tests `panel`: every c of its tiles, and the chain that it begins.

The table lists the parts that were broken by hand, with the tests that failed.

| broken in `panel` | fails |
|---|---|
| the diagonal is kept; tiles are stored once; c below 0 is kept | the panel holds c[self] |
| an image of columns at the stride of rows; a2 of rows for columns | the panel holds c[two] |
| the first row of the pass is left out | the panel holds c[two-later] |
| padding has c (`rounding.py`) | the panel holds c |
"""

from __future__ import annotations

import pytest
import torch
from cases import GPU

from scclip_fast.kernels import knn
from scclip_fast.kernels._launch import Architecture
from scclip_fast.kernels.knn_details.panel import panel_launch

DEVICE = "cuda" if GPU else "cpu"
HALF_STEP, LEAST_HALF_STEP = 2.0**-11, 2.0**-25  # of fp16


def panel_of(rows, columns, exclude_self, first=0, tile=64):
    halves = knn.rounded(rows.to(DEVICE), columns.to(DEVICE), exclude_self, 128)
    count = halves[0].padded_n - first
    shape = len(rows), count, halves[1].padded_n
    panel = torch.full(shape, torch.nan, dtype=torch.float16, device=DEVICE)
    panel_launch(*halves, exclude_self, panel, first, tile).run()
    squares, y = [t.a2.cpu().double() for t in halves], [t.y.cpu().double() for t in halves]
    c = squares[0][..., None] + squares[1][:, None] - 2 * y[0] @ y[1].mT
    rounding = 1e-6 * (squares[0][..., None] + squares[1][:, None])  # of float32's sums
    if exclude_self:
        c.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return panel.cpu(), c[:, first:], rounding[:, first:]


@pytest.mark.parametrize("tile", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [None, 0, 128], ids=["self", "two", "two-later"])
def test_the_panel_holds_c(first, tile):
    """Every pair of the rows of a pass, with c = +inf for a token itself, padding and no number."""
    x = torch.randn(2, 300, 70)
    x[1, 7] = torch.nan
    x[0, 20:60:2] *= 100
    x[0, 21:60:2] = x[0, 20:60:2]  # so that rounding makes some c negative
    queries = x if first is None else torch.randn(2, 140, 70)
    panel, c, rounding = panel_of(queries, x, first is None, first or 0, tile)
    assert torch.equal(panel.isinf(), c.isinf())
    assert c.isinf().sum() > panel.shape[0] * panel.shape[1] * 84  # padding columns
    number = c.isfinite()
    stored = c.clamp(min=0)[number]
    error = (panel[number].double() - stored).abs()
    assert (error <= 1.01 * HALF_STEP * stored + LEAST_HALF_STEP + rounding[number]).all()
    assert (panel >= 0).all()
    if first is None:
        assert torch.equal(panel, panel.mT)


@pytest.mark.skipif(GPU, reason="a GPU has tiles of its own")
def test_the_tile_of_hopper(monkeypatch):
    monkeypatch.setattr(knn, "architecture", lambda device: Architecture(90, 227 * 1024))
    x = torch.randn(1, 300, 20)
    whole = knn.nearest_triton(x, 5, True)
    monkeypatch.undo()
    assert all(map(torch.equal, whole, knn.nearest_triton(x, 5, True)))


def test_two_runs_give_the_same_bits():
    x = torch.randn(3, 200, 24, device=DEVICE)
    x[:, :100] = 3 + 1e-5 * x[:, :100]
    first, second = (knn.nearest_triton(x, 9, True) for _ in range(2))
    assert all(map(torch.equal, first, second))

"""Tests the second look of `collect` at undecided rows, and the search over what it leaves.

The table lists the parts that were broken by hand, with the tests that failed then.

| broken in `collect` | fails |
|---|---|
| no second look | all tests of `collect` |
| slots beyond the list are row 0 with W = -1 | touches no row, both |
| a row may be its own neighbour | finds what a full bin dropped |
| over 64 columns are stored | touches no row, both; then memory is corrupt |
| rows with over 64 are not listed | listed once, nothing decides |
| every tile beyond 64 lists the row | listed once; then memory is corrupt |

Without the search over measured distances in `kernels/knn.py`, the rows that nothing decides fail.
"""

from __future__ import annotations

import pytest
import torch
from cases import GPU
from tolerance import assert_neighbors

import scclip_fast as sf
from scclip_fast.kernels import knn
from scclip_fast.kernels.knn_details.table import positions

DEVICE = "cuda" if GPU else "cpu"
WIDTH, CAPACITY = 8, 64


def table_of(x, k, first=0):
    """The table before `collect` from `first` on, the table after it from 0 on, and the lists."""
    x = x[None].to(DEVICE)
    halves = knn.rounded(x, x, True, 64)
    before, undecided = knn.decide(*halves, True, 1, first, x.shape[1] - first, k)
    around = torch.full((1, first + before.shape[1], CAPACITY), -7, dtype=torch.int32)
    around = around.to(DEVICE)
    around[:, first:] = before
    undecided.n_candidates[0, undecided.n_positions.item() :] = 0  # fresh memory may be so
    knn.collect(*halves, True, undecided, around[:, first:], first)
    return before[0].cpu(), around[0].cpu(), undecided


def test_the_second_look_finds_what_a_full_bin_dropped():
    """Four neighbours of one token are stored in one bin; `collect` writes all of them."""
    n, order = 256, positions(256)
    token_at = order.argsort()
    x = 30 * torch.randn(n, WIDTH)
    query, near = token_at[0].item(), token_at[torch.arange(4) * 64 + 5]
    x[near] = x[query] + torch.eye(WIDTH)[:4]
    before, after, undecided = table_of(x, 4)
    assert 0 in undecided.positions[0, : undecided.n_positions.item()].tolist()
    assert (before[0] == -1).all()
    entries = after[0][after[0] >= 0]
    assert set(near.tolist()) <= set(entries.tolist()) and query not in entries.tolist()
    n_candidates = undecided.n_candidates[0][undecided.positions[0] == 0][0]
    assert len(entries) == n_candidates == len(entries.unique())
    assert not undecided.n_tokens.any()


def giant(first, seed):
    """67 or more tokens alike, which are undecided, and a giant token 0 with near duplicates."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(max(256, first + 128), 64, generator=g)
    flat = slice(first, first + 75) if first else slice(64, 131)
    x[flat] = 3 + 1e-5 * torch.randn(flat.stop - flat.start, 64, generator=g)
    base = 2e4 * torch.randn(64, generator=g)
    for token in (0, 5, 30, 140, 170, 190):
        x[token] = base * (1 + 2e-5 * torch.randn(64, generator=g))
    return x


@pytest.mark.parametrize("first, seed", [(0, 2), (256, 0)])
def test_the_second_look_touches_no_row_but_the_listed(first, seed):
    """Rounding makes c of the giant and its duplicates -1 or less; the list ends within a block."""
    x = giant(first, seed)
    before, after, undecided = table_of(x, 3, first)
    listed = (undecided.positions[0, : undecided.n_positions.item()] - first).long().cpu()
    assert len(listed) % 64
    assert (after[:first] == -7).all()
    after = after[first:]
    others = torch.ones(len(before), dtype=torch.bool)
    others[listed] = False
    assert torch.equal(after[others], before[others])
    assert (before != after)[listed].any(dim=1).all()


def test_a_row_with_more_candidates_is_listed_once():
    """100 tokens closer than fp16 resolves have 99 candidates each, from several tiles."""
    x = 10 * torch.randn(256, WIDTH)
    alike = torch.randperm(256)[:100]
    x[alike] = 1 + 1e-7 * torch.randn(100, WIDTH)
    _, _, undecided = table_of(x, 9)
    tokens = undecided.tokens[0, : undecided.n_tokens.item()].cpu()
    assert len(tokens.unique()) == len(tokens) and torch.isin(alike, tokens.long()).all()


@pytest.mark.usefixtures("poisoned")
def test_rows_that_nothing_decides_are_measured(monkeypatch):
    """Neither `certify` nor `collect` decides a row of two clusters finer than fp16 resolves."""
    monkeypatch.setattr(knn, "MOST_COLUMNS_OF_PANEL", 0)
    x = 1e-7 * torch.randn(1, 200, WIDTH)
    x[:, ::2] += 1
    x[0, 7, 0] = torch.nan  # nothing bounds this row
    distances, indices = sf.knn(x.to(DEVICE), 9, backend="triton")
    assert distances[0, 7].isinf().all() and indices[0, 7].tolist() == [*range(7), 8, 9]
    others = torch.arange(200) != 7
    neighbors = indices[0, others].cpu()
    assert_neighbors(neighbors - (neighbors > 7).long(), x=x[0, others], k=9, tie=1e-5)

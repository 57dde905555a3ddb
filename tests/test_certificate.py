"""Tests each clause of the certificate on an input that this clause alone saves.

Most inputs are bins written by hand: one row, with c for each column, and true distances as far
from c as the error model of `kernels/knn_details/README.md` admits. The table lists the clauses
that were broken by hand, with the tests that failed then (`candidate` and `sure` are the first
two). No other test here failed.

| broken in `certify` or its bounds | fails |
|---|---|
| full is never true | a full bin; and the bits of a tile, which reads W of a full row |
| no gamma in t_most, or in W | candidate[gamma] |
| no gamma in t_least, or in S2 | sure[gamma] |
| no eta | candidate, sure [eta] |
| no r | candidate, sure [r] |
| no u a | candidate, sure [u of the row] |
| no 1 + u, or no 1 - u, in V | candidate [u of the column, u of the row] |
| no 1 - u, or no 1 + u, in S | sure [u of the column, u of the row] |
| e once in V | candidate [eta, u of the row, r] |
| e once in S | sure [eta, u of the row, r] |
| u of the rows | candidate, sure [u of the column, u of the row]; without a bound[u, W overflows] |
| a or r of the columns | all of candidate and sure; the bits of a tile |
| a or r of the rows at the columns' stride of an image | the same as of the columns |
| W without the bits of a tile | the bits of a tile |
| 65 candidates are complete | no more candidates than a table holds |
| u of 1/2 and more | without a bound[u] |
| W may overflow | without a bound[W overflows]; [u], whose W is negative |
| every candidate is sure | all of candidate and sure |
| unbounded rows are not listed | without a bound |
"""

from __future__ import annotations

import pytest
import torch
from error_model import (
    DEVICE,
    EXACT,
    MODELS,
    Decision,
    Model,
    decision,
    four_columns,
    fresh,
    rounded,
    second_but_a_neighbour,
)

from scclip_fast.kernels.knn_details.certify import certify_launch

ROWS = 64
FAR = 3e3  # the c of a column that is no candidate


def folded(c: torch.Tensor) -> torch.Tensor:
    """Bins (2, 64, 1, 3, 64) as the kernel writes them: row 0 of image 1 has c, no other any."""
    tiles = len(c) // 64
    mask = 2 ** (tiles - 1).bit_length() - 1
    key = c.float().view(torch.int32).view(tiles, 64) & ~mask | torch.arange(tiles)[:, None]
    bins = torch.full((2, ROWS, 1, 3, 64), 2**31 - 1, dtype=torch.int32)
    bins[1, 0, 0, : min(3, tiles)] = key.int().sort(dim=0).values[:3]
    return bins


def certify(near: dict[int, float], k: int, model: Model = EXACT, tiles: int = 4) -> Decision:
    """Runs `certify` on one row of the second of two images, which have 64 rows each.

    near: c by position of a column; all other columns of the tiles are far.
    """
    n = 64 * tiles
    c = torch.full((n,), FAR)
    c[0] = torch.inf  # of the row itself
    for position, value in near.items():
        c[position] = value
    table, undecided = fresh(ROWS)
    certify_launch(folded(c).to(DEVICE), *rounded(ROWS, n, model), table, undecided, 0, k).run()
    return decision(table, undecided, n)


@pytest.mark.parametrize("name", MODELS)
def test_a_neighbour_that_the_pass_ranks_second_is_a_candidate(name):
    """The c of the other is below the neighbour's by as much as the errors of both admit; k = 1."""
    other, true = second_but_a_neighbour(MODELS[name])
    found = certify({1: other, 2: true}, 1, MODELS[name])
    assert found.columns == {1, 2} and not found.sure


@pytest.mark.parametrize("name", MODELS)
def test_only_a_neighbour_is_sure(name):
    """The second column is among the three nearest by c alone, so it must not be sure; k = 3."""
    found = certify(dict(enumerate(four_columns(MODELS[name]), 1)), 3, MODELS[name])
    assert found.columns == {1, 2, 3, 4}
    assert found.sure == {1}  # so the clause does call a column sure


def test_a_full_bin_is_not_decided():
    """Four near columns meet in one bin, which keeps three of them; other columns are near too."""
    near = {64 * tile + 5: 1.0 for tile in range(4)}
    others = {6: 1.5, 7: 1.5, 8: 1.5}
    found = certify(near | others, 6)
    assert not found.columns and 1.5 <= found.W < 1.51
    del near[5]  # three are left, and the third might have a fourth behind it
    assert not certify(near | others, 6).columns
    del near[69]
    assert certify(near | others, 5).columns == near.keys() | others.keys()


def test_the_bound_counts_the_bits_that_number_a_tile():
    """A column with c = W in the last of 512 tiles has a key above the bits of W."""
    first = {1: 1.0, 65: 1.0, 129: 1.0}
    model = Model(r=0.1)
    W = certify(first, 1, model, tiles=512).W  # the row is undecided, as its bin is full
    last = 511 * 64 + 9
    found = certify({1: 1.0, last: W}, 1, model, tiles=512)
    assert found.columns == {1, last}


def test_no_more_candidates_than_a_table_holds():
    near = {64 + bin_: 1.0 for bin_ in range(64)}
    assert certify(near, 3).columns == near.keys()
    found = certify(near | {1: 1.0}, 3)
    assert not found.columns and found.W is not None and not found.unbounded


@pytest.mark.parametrize(
    "near, k, model",
    [
        pytest.param({1: 1.0, 2: 2.0}, 1, Model(u=1.5), id="u"),
        pytest.param({p: 3e38 for p in range(1, 256)}, 1, Model(u=0.4), id="W overflows"),
        pytest.param({p: torch.inf for p in range(3, 256)}, 3, Model(), id="finite columns"),
    ],
)
def test_rows_without_a_bound_are_measured(near, k, model):
    found = certify(near, k, model)
    assert found.unbounded and found.W is None and not found.columns

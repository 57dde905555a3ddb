"""Tests `select`, each clause on an input that this clause alone saves.

Most inputs are panels written by hand: one row, with c for each column, and true distances as far
from c as the model of `error_model.py` admits. The bounds that `certify` shares have their tests in
test_certificate.py. The table lists the parts that were broken by hand, with the tests that failed.

| broken in `select` | fails |
|---|---|
| no 2^-11 of tau_most, or of W | stored too far[relative] |
| no 2^-25 of tau_most, or of W | stored too far[absolute] |
| no 2^-11 of tau_least, or of a sure p | stored too near[relative] |
| no 2^-25 of tau_least, or of a sure p | stored too near[absolute] |
| W beyond fp16's largest number | a bound beyond fp16 |
| tau_least of the minima | minima of groups |
| the first bound alone | the second bound is narrower; minima of groups |
| the minima's k-th, or the second k-th, is the one before | second but a neighbour, and others |
| groups below 0.9 W | second but a neighbour, and others |
| 65 candidates | no more candidates[65] |
| 128 columns and more decide | columns that were not written out |
| columns beyond 128 are stored | a long list |
| p = 0 beyond the row; group 0 for no group | a row that ends within a block |
| undecided rows without a bound are not listed | a bound beyond fp16; without a bound |
| every candidate is sure | second but a neighbour, only a neighbour is sure, storage |
| u, a or r of the other set, or at its stride | all of row 0 |
| u of 1/2 and more (`certificate.py`) | without a bound[u] |
| no gamma in t_most, or in S2; e once in V, or in S (the same) | the models of these names |
"""

from __future__ import annotations

import math

import pytest
import torch
from error_model import (
    DEVICE,
    EXACT,
    MODELS,
    SURE,
    Decision,
    Model,
    decision,
    four_columns,
    fresh,
    rounded,
    second_but_a_neighbour,
)

from scclip_fast.kernels.knn_details.select import GROUPS, NARROWED, select_launch
from scclip_fast.kernels.knn_details.table import Undecided, positions

ROWS = 64
HALF_STEP = 2.0**-11  # of fp16, as a share of the numbers just above a power of two
LEAST_HALF_STEP = 2.0**-25
ABOVE = 1 + 1e-3  # by which the errors stay within their bounds, for float32 to tell them apart


def select(
    near: dict[int, float], k: int, model: Model = EXACT, n: int = 256, far: float = 3e3
) -> Decision:
    """Runs `select` on one row of the second of two images, whose other rows hold NaN.

    near: c by position of a column; all other columns have c = far.
    """
    panel = torch.full((2, ROWS, n), torch.nan, dtype=torch.float16)
    panel[1, 0] = row_of(near, n, far)
    return decision(*select_all(panel, k, model), n)


def row_of(near: dict[int, float], n: int, far: float) -> torch.Tensor:
    c = torch.full((n,), far, dtype=torch.float64)
    c[0] = torch.inf  # of the row itself
    c[list(near)] = torch.tensor(list(near.values()), dtype=torch.float64)
    return c.clamp(min=0).half()


def select_all(panel: torch.Tensor, k: int, model: Model) -> tuple[torch.Tensor, Undecided]:
    table, undecided = fresh(ROWS)
    sets = rounded(ROWS, panel.shape[2], model)
    select_launch(panel.to(DEVICE), *sets, table, undecided.searched, 0, k).run()
    return table, undecided


BOUNDED = [name for name in MODELS if name != "eta"]  # which fp16's own least step hides


@pytest.mark.parametrize("name", BOUNDED)
def test_a_neighbour_that_the_panel_ranks_second_is_a_candidate(name):
    """The c of the other is below the neighbour's by as much as the errors of both admit; k = 1."""
    other, true = second_but_a_neighbour(MODELS[name])
    found = select({1: other, 2: true}, 1, MODELS[name])
    assert found.columns == {1, 2} and not found.sure and not found.unbounded


@pytest.mark.parametrize("name", BOUNDED)
def test_only_a_neighbour_is_sure(name):
    """The second column is among the three nearest by c alone, so it must not be sure; k = 3."""
    found = select(dict(enumerate(four_columns(MODELS[name]), 1)), 3, MODELS[name])
    assert found.columns == {1, 2, 3, 4}
    assert found.sure == {1}


@pytest.mark.parametrize(
    "stored, error",
    [
        pytest.param((0.5, 1 + 2 * HALF_STEP), (HALF_STEP / 2, HALF_STEP), id="relative"),
        pytest.param((2.0**-22, 2.0**-20), (LEAST_HALF_STEP,) * 2, id="absolute"),
    ],
)
class TestStorage:
    """Two columns whose c fp16 moves apart by as much as it can, and r as large as it must be."""

    def test_a_neighbour_stored_too_far_is_a_candidate(self, stored, error):
        """fp16 rounds c of the other down and of the neighbour up; k = 1."""
        other, true = stored[0] + error[0] / ABOVE, stored[1] - error[1] / ABOVE
        r = (
            (math.sqrt(true) - math.sqrt(other)) / 2 * (1 + 1e-6)
        )  # the other is as far, by its errors
        assert as_stored(other) == stored[0] and as_stored(true) == stored[1]
        found = select({1: other, 2: true}, 1, Model(r=r))
        assert found.columns == {1, 2} and not found.sure

    def test_a_column_stored_too_near_is_not_sure(self, stored, error):
        """fp16 rounds c of the other down, and up for the two that are nearer; k = 3."""
        other, nearer = stored[0] + error[0] / ABOVE, stored[1] - error[1] / ABOVE
        r = (math.sqrt(nearer) - math.sqrt(other)) / 2 * (1 + 1e-6)
        found = select({1: 0.0, 2: other, 3: nearer, 4: nearer}, 3, Model(r=r))
        assert found.columns == {1, 2, 3, 4} and found.sure == {1}


def as_stored(c: float) -> float:
    return torch.tensor(c, dtype=torch.float64).half().item()


def test_a_bound_beyond_fp16_is_none():
    """c of the neighbour is 66,000, which fp16 stores as infinity; k = 1."""
    other, true = 60_000.0, 66_000.0
    r = (math.sqrt(true) - math.sqrt(other)) / 2 * (1 + 1e-6)
    found = select({1: other, 2: true}, 1, Model(r=r), far=torch.inf)
    assert found.unbounded and not found.columns
    assert select({1: other, 2: true}, 1, far=torch.inf).columns == {1}


def test_minima_of_groups_bound_no_sure_column():
    """Two of three near columns share a group, so that the second smallest minimum is far; k = 2.

    Of the three, the two nearest by c are known, but not that they are the nearest.
    """
    near = {1: 1.0, 1 + GROUPS: 1.5, 1 + 2 * GROUPS: 2.0}
    found = select(near | {2: 10.0}, 2, Model(r=0.2), n=3 * GROUPS)
    assert found.columns == near.keys() and not found.sure


def test_the_second_bound_is_narrower():
    """The minima of groups leave 102 columns, their own second smallest p the right two."""
    near = {1: 1.0, 1 + GROUPS: 1.5} | {p: 2.0 for p in range(2, 102)}
    found = select(near, 2, n=2 * GROUPS)
    assert found.columns == {1, 1 + GROUPS} and not found.unbounded


@pytest.mark.parametrize("n, decided", [(64, True), (65, False), (NARROWED + 40, False)])
def test_no_more_candidates_than_a_table_holds(n, decided):
    near = {p: 1.0 for p in range(1, n + 1)}
    found = select(near, 3)
    assert found.columns == (near.keys() if decided else set())
    assert found.unbounded == (not decided)


def test_a_row_that_ends_within_a_block():
    """The columns of the last block that are none have no p, and a group has a column once."""
    found = select({1: 1.0, GROUPS: 1.5}, 2, n=GROUPS + 128)
    assert found.columns == {1, GROUPS}


def test_a_long_list_leaves_the_next_row_alone():
    """Row 0 has its 129th and later columns within the first W after row 1 has its columns."""
    near = dict.fromkeys([*range(1, 101), *range(GROUPS + 1, GROUPS + 101)], 1.0)
    panel = torch.full((2, ROWS, 2 * GROUPS), torch.nan, dtype=torch.float16)
    for row, columns in enumerate((near, {7: 1.0, 8: 2.0})):
        panel[1, row] = row_of(columns, 2 * GROUPS, 3e3)
    table, _ = select_all(panel, 2, EXACT)
    entries = table[1, 1].cpu() % SURE
    assert set(positions(2 * GROUPS)[entries[:2].long()].tolist()) == {7, 8}


def test_columns_that_were_not_written_out_decide_nothing():
    """203 columns lie within the first W, of which the nearest is beyond the 128 that are kept."""
    near = {1: 1.0, 1 + GROUPS: 1.0, 1 + 2 * GROUPS: 0.5}
    others = {p + start: 2.0 for p in range(2, 102) for start in (0, GROUPS)}
    found = select(near | others, 2, n=3 * GROUPS)
    assert found.unbounded and not found.columns


@pytest.mark.parametrize(
    "near, k, model",
    [
        pytest.param({1: 1.0, 2: 2.0}, 1, Model(u=1.5), id="u"),
        pytest.param({p: 3e4 for p in range(1, 256)}, 1, Model(u=0.4), id="W overflows"),
        pytest.param({p: torch.inf for p in range(3, 256)}, 3, Model(), id="finite columns"),
    ],
)
def test_rows_without_a_bound_are_measured(near, k, model):
    found = select(near, k, model)
    assert found.unbounded and not found.columns

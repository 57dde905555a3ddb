"""Tests each clause of the certificate on an input that this clause alone saves.

Most inputs are bins written by hand: one row, with c for each column, and true distances as far
from c as the error model of `kernels/knn_details/README.md` admits. The table lists the clauses
that were broken by hand, with the tests that failed then (`candidate` and `sure` are the first
two). No other test here failed.

| broken in `certify` | fails |
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

from typing import NamedTuple

import pytest
import torch
from cases import GPU

from scclip_fast.kernels.knn_details.certify import certify_launch, gamma
from scclip_fast.kernels.knn_details.rounding import eta
from scclip_fast.kernels.knn_details.table import Rounded, Undecided, positions

DEVICE = "cuda" if GPU else "cpu"
ROWS, WIDTH, CAPACITY, SURE = 64, 8, 64, 2**30
FAR = 3e3  # the c of a column that is no candidate
SHARE = 0.99  # of the largest error that the model admits
STEP = 1 + 1e-4  # ratio of two distances that float32 tells apart


class Decision(NamedTuple):
    """The result of `certify` for row 0.

    Attributes:
        columns: the positions of the columns in its row of the table.
        sure: the positions of those that are sure.
        W: the bound, if the row is listed for `collect`; otherwise None.
        unbounded: whether the row is listed for the search over measured distances.
    """

    columns: set[int]
    sure: set[int]
    W: float | None
    unbounded: bool


class Model(NamedTuple):
    """The errors of a row: its norm a, rounding r, and image's u; and the scale of distances."""

    a: float = 0.0
    r: float = 0.0
    u: float = 0.0
    length: float = 1.0

    def distance_error(self, h: float) -> float:
        return SHARE * (self.r + self.u * (self.a + h) + eta(WIDTH))

    def c_error(self, h: float) -> float:
        return SHARE * 2 * gamma(WIDTH) * self.a * (self.a + h)


EXACT = Model()


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
    # NaN stands where no bound may look: in the other image, and in the a and r of the columns and
    # the u of the rows, as r_j <= u a_j + eta and a_j <= a + h.
    unused = torch.full((2, n), torch.nan)
    square, error, u = unused[:, :ROWS].clone(), unused[:, :ROWS].clone(), unused[:, 0].clone()
    square[1], error[1], u[1] = 0.0, 0.0, model.u
    square[1, 0], error[1, 0] = model.a**2, model.r
    table = torch.full((2, ROWS, CAPACITY), -7, dtype=torch.int32)
    integers = (torch.zeros(2, ROWS, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    lists = (*integers, torch.zeros(2, ROWS), integers[0], *integers)
    undecided = Undecided(*(t.clone().to(DEVICE) for t in lists))
    y = torch.empty(2, n, WIDTH, dtype=torch.float16)  # which `certify` does not read
    tensors = (y[:, :ROWS], square, error, unused[:, 0]), (y, unused, unused, u)
    sizes = (ROWS, WIDTH), (n, WIDTH)
    rows, columns = (
        Rounded(*(t.to(DEVICE) for t in some), *size)
        for some, size in zip(tensors, sizes, strict=True)
    )
    table = table.to(DEVICE)
    certify_launch(folded(c).to(DEVICE), rows, columns, table, undecided, 0, k).run()
    entries = table[1, 0].cpu()
    entries = entries[entries != -1]
    at = positions(n)[(entries % SURE).long()]
    listed = undecided.positions[1, : undecided.n_positions[1]].tolist()
    token = (positions(n) == 0).nonzero().item()
    return Decision(
        set(at.tolist()),
        set(at[entries >= SURE].tolist()),
        undecided.W[1, listed.index(0)].item() if 0 in listed else None,
        token in undecided.tokens[1, : undecided.n_tokens[1]].tolist(),
    )


MODELS = {
    "gamma": Model(a=100.0),
    "eta": Model(length=4 * eta(WIDTH)),
    "u of the column": Model(u=0.1),
    "u of the row": Model(a=10.0, u=0.01),
    "r": Model(r=0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_neighbour_that_the_pass_ranks_second_is_a_candidate(name):
    """The c of `other` is below that of `true` by as much as the errors of both admit; k = 1."""
    model = MODELS[name]
    other = model.length
    farthest = other + model.distance_error(other)
    # The largest h whose true distance can be below `farthest`.
    true = (farthest / STEP + model.distance_error(0)) / (1 - SHARE * model.u)
    assert true - model.distance_error(true) < farthest
    c_other = other**2 - model.c_error(other)
    decision = certify({1: c_other, 2: true**2 + model.c_error(true)}, 1, model)
    assert decision.columns == {1, 2} and not decision.sure


@pytest.mark.parametrize("name", MODELS)
def test_only_a_neighbour_is_sure(name):
    """`other` is among the three nearest by c alone, so it must not be sure; k = 3."""
    model = MODELS[name]
    near, first = 0.1 * model.length, model.length
    second = first * STEP
    nearest_two = second - model.distance_error(second)
    other = (nearest_two * STEP - model.distance_error(0)) / (1 + SHARE * model.u)
    assert other + model.distance_error(other) > nearest_two
    c = {2: other**2 - model.c_error(other)}
    c |= {3: first**2 + model.c_error(first), 4: second**2 + model.c_error(second)}
    decision = certify({1: near**2} | c, 3, model)
    assert decision.columns == {1, 2, 3, 4}
    assert decision.sure == {1}  # so the clause does call a column sure


def test_a_full_bin_is_not_decided():
    """Four near columns meet in one bin, which keeps three of them; other columns are near too."""
    near = {64 * tile + 5: 1.0 for tile in range(4)}
    others = {6: 1.5, 7: 1.5, 8: 1.5}
    decision = certify(near | others, 6)
    assert not decision.columns and 1.5 <= decision.W < 1.51
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
    decision = certify({1: 1.0, last: W}, 1, model, tiles=512)
    assert decision.columns == {1, last}


def test_no_more_candidates_than_a_table_holds():
    near = {64 + bin_: 1.0 for bin_ in range(64)}
    assert certify(near, 3).columns == near.keys()
    decision = certify(near | {1: 1.0}, 3)
    assert not decision.columns and decision.W is not None and not decision.unbounded


@pytest.mark.parametrize(
    "near, k, model",
    [
        pytest.param({1: 1.0, 2: 2.0}, 1, Model(u=1.5), id="u"),
        pytest.param({p: 3e38 for p in range(1, 256)}, 1, Model(u=0.4), id="W overflows"),
        pytest.param({p: torch.inf for p in range(3, 256)}, 3, Model(), id="finite columns"),
    ],
)
def test_rows_without_a_bound_are_measured(near, k, model):
    decision = certify(near, k, model)
    assert decision.unbounded and decision.W is None and not decision.columns

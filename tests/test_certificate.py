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
| W without the bits of a tile | the bits of a tile |
| 65 candidates are complete | no more candidates than a table holds |
| u of 1/2 and more | without a bound[u] |
| W may overflow | without a bound[W overflows]; [u], whose W is negative |
| every candidate is sure | all of candidate and sure |
| unbounded rows are not listed | without a bound |

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

from typing import NamedTuple

import pytest
import torch
from cases import GPU
from tolerance import assert_neighbors

import scclip_fast as sf
from scclip_fast.kernels import knn
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
    """Bins (1, 64, 1, 3, 64) as the kernel writes them: one row with these c, and empty rows."""
    tiles = len(c) // 64
    mask = 2 ** (tiles - 1).bit_length() - 1
    key = c.float().view(torch.int32).view(tiles, 64) & ~mask | torch.arange(tiles)[:, None]
    bins = torch.full((1, ROWS, 1, 3, 64), 2**31 - 1, dtype=torch.int32)
    bins[0, 0, 0, : min(3, tiles)] = key.int().sort(dim=0).values[:3]
    return bins


def certify(near: dict[int, float], k: int, model: Model = EXACT, tiles: int = 4) -> Decision:
    """Runs `certify` on one row. near: c by position; all other columns of the tiles are far."""
    n = 64 * tiles
    c = torch.full((n,), FAR)
    c[0] = torch.inf  # of the row itself
    for position, value in near.items():
        c[position] = value
    square, error = torch.zeros(2, 1, n)
    square[0, 0], error[0, 0] = model.a**2, model.r
    table = torch.full((1, ROWS, CAPACITY), -7, dtype=torch.int32)
    integers = (torch.zeros(1, ROWS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    lists = (*integers, torch.zeros(1, ROWS), integers[0], *integers)
    undecided = Undecided(*(t.clone().to(DEVICE) for t in lists))
    y = torch.empty(1, n, WIDTH, dtype=torch.float16)  # which `certify` does not read
    u, table = torch.full((1,), model.u), table.to(DEVICE)
    # The columns' a and r and the rows' u are in no bound: r_j <= u a_j + eta and a_j <= a + h.
    unused, zero = torch.full((1, n), torch.nan), torch.zeros(1)
    rows = Rounded(*(t.to(DEVICE) for t in (y, square, error, zero)), n, WIDTH)
    columns = Rounded(*(t.to(DEVICE) for t in (y, unused, unused, u)), n, WIDTH)
    certify_launch(folded(c).to(DEVICE), rows, columns, table, undecided, 0, k).run()
    entries = table[0, 0].cpu()
    entries = entries[entries != -1]
    at = positions(n)[(entries % SURE).long()]
    listed = undecided.positions[0, : undecided.n_positions.item()].tolist()
    token = (positions(n) == 0).nonzero().item()
    return Decision(
        set(at.tolist()),
        set(at[entries >= SURE].tolist()),
        undecided.W[0, listed.index(0)].item() if 0 in listed else None,
        token in undecided.tokens[0, : undecided.n_tokens.item()].tolist(),
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


def table_of(x, k, first=0):
    """The table before `collect` from `first` on, the table after it from 0 on, and the lists."""
    x = x[None].to(DEVICE)
    halves = knn.rounded(x, x, True, 1)
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
def test_rows_that_nothing_decides_are_measured():
    """Neither `certify` nor `collect` decides a row of two clusters finer than fp16 resolves."""
    x = 1e-7 * torch.randn(1, 200, WIDTH)
    x[:, ::2] += 1
    x[0, 7, 0] = torch.nan  # nothing bounds this row
    distances, indices = sf.knn(x.to(DEVICE), 9, backend="triton")
    assert distances[0, 7].isinf().all() and indices[0, 7].tolist() == [*range(7), 8, 9]
    others = torch.arange(200) != 7
    neighbors = indices[0, others].cpu()
    assert_neighbors(neighbors - (neighbors > 7).long(), x=x[0, others], k=9, tie=1e-5)

"""The errors that the certificate's model admits, for tests that write its inputs by hand.

Row 0 of the second of two images has the errors of a `Model`. NaN stands wherever no bound may
look: in the other image, and in the a and r of the columns and the u of the rows, as r_j <= u a_j +
eta and a_j <= a + h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import GPU

from scclip_fast.kernels.knn_details.certificate import gamma
from scclip_fast.kernels.knn_details.rounding import eta
from scclip_fast.kernels.knn_details.table import Rounded, Undecided, positions

DEVICE = "cuda" if GPU else "cpu"
WIDTH, CAPACITY, SURE = 8, 64, 2**30
SHARE = 0.99  # of the largest error that the model admits
STEP = 1 + 1e-4  # ratio of two distances that float32 tells apart


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
MODELS = {
    "gamma": Model(a=100.0),
    "eta": Model(length=4 * eta(WIDTH)),
    "u of the column": Model(u=0.1),
    "u of the row": Model(a=10.0, u=0.01),
    "r": Model(r=0.1),
}


class Decision(NamedTuple):
    """The result for row 0 of image 1.

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


def rounded(m: int, n: int, model: Model) -> tuple[Rounded, Rounded]:
    """m rows and n columns in each of two images, without the y that no certificate reads."""
    unused = torch.full((2, max(m, n)), torch.nan, device=DEVICE)
    square, error, u = unused[:, :m].clone(), unused[:, :m].clone(), unused[:, 0].clone()
    square[1], error[1], u[1] = 0.0, 0.0, model.u
    square[1, 0], error[1, 0] = model.a**2, model.r
    y = torch.empty(2, max(m, n), WIDTH, dtype=torch.float16, device=DEVICE)
    rows = Rounded(y[:, :m], square, error, unused[:, 0], m, WIDTH)
    return rows, Rounded(y[:, :n], unused[:, :n], unused[:, :n], u, n, WIDTH)


def fresh(rows: int) -> tuple[torch.Tensor, Undecided]:
    """The table and the lists of two images, before a kernel writes them."""
    integers = (torch.zeros(2, rows, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    lists = (*integers, torch.zeros(2, rows), integers[0], *integers)
    table = torch.full((2, rows, CAPACITY), -7, dtype=torch.int32, device=DEVICE)
    return table, Undecided(*(t.clone().to(DEVICE) for t in lists))


def decision(table: torch.Tensor, undecided: Undecided, n: int) -> Decision:
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


def second_but_a_neighbour(model: Model) -> tuple[float, float]:
    """The c of two columns, of which the second may be the nearest by as much as both errors."""
    other = model.length
    farthest = other + model.distance_error(other)
    # The largest h whose true distance can be below `farthest`.
    true = (farthest / STEP + model.distance_error(0)) / (1 - SHARE * model.u)
    assert true - model.distance_error(true) < farthest
    return other**2 - model.c_error(other), true**2 + model.c_error(true)


def four_columns(model: Model) -> list[float]:
    """The c of four columns: the first of the three nearest, one that is none of them, and two."""
    near, first = 0.1 * model.length, model.length
    second = first * STEP
    nearest_two = second - model.distance_error(second)
    other = (nearest_two * STEP - model.distance_error(0)) / (1 + SHARE * model.u)
    assert other + model.distance_error(other) > nearest_two
    c = [near**2, other**2 - model.c_error(other)]
    return c + [h**2 + model.c_error(h) for h in (first, second)]

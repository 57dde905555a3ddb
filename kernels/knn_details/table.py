"""The storage that the kernels of the search share: positions, table entries, and lists of rows.

The rows of a search are M tokens an image whose neighbours are sought, its columns N tokens among
which these are. Rows and columns are two tensors in every kernel. A search within one set passes
this set twice, with `exclude_self`, which leaves out the pairs of a token with itself.

A *token* is the number of a token in its image and set, a *position* the place where `rounding.py`
stores it. A pass treats R positions of rows, whole blocks from `first` on; a *row* is a position
less `first`.

The table (B, R, 64) int32 holds the candidates of each row: columns' tokens, with `SURE` added to
those that are neighbours for certain, and `NO_COLUMN` behind the last. The entries without `SURE`
come first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import Architecture

TILE: tl.constexpr = tl.constexpr(64)  # positions among which the tokens of a tile are rotated
CAPACITY: tl.constexpr = tl.constexpr(64)  # candidates that a row of the table can hold
SURE: tl.constexpr = tl.constexpr(1 << 30)  # the bit of an entry that need not be measured
NO_COLUMN: tl.constexpr = tl.constexpr(-1)  # an entry without a token
NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)  # a key of `bins` without a column
LARGEST_FLOAT: tl.constexpr = tl.constexpr(3.4028234663852886e38)  # of float32
# Rows of a program of `certify`, `select` and `settle`: a row a warp or two, whose sums hardly need
# shared memory. The interpreter's time goes by the number of programs.
ROWS = 64 if triton.knobs.runtime.interpret else 1
MOST_PROGRAMS = 1024  # that share the listed rows of all images


class Rounded(NamedTuple):
    """One set of half-precision tokens of a batch and their errors, by position.

    Attributes:
        y: (B, padded N, padded D) float16, the rounded tokens.
        a2: (B, padded N) float32, their squared norms; +inf for positions without a usable token.
        r: (B, padded N) float32, the errors of the rounding.
        u: (B,) float32, the largest relative error.
        n: the number of tokens N of an image.
        d: the number of channels D.
    """

    y: torch.Tensor
    a2: torch.Tensor
    r: torch.Tensor
    u: torch.Tensor
    n: int
    d: int

    @property
    def padded_n(self) -> int:
        return self.y.shape[1]

    @property
    def padded_d(self) -> int:
        return self.y.shape[2]

    def images(self, some: slice) -> Rounded:
        """The same set of some images of the batch."""
        if some.start == 0 and some.stop >= len(self.u):
            return self  # four slices take 5 us of Python
        return Rounded(self.y[some], self.a2[some], self.r[some], self.u[some], self.n, self.d)


class Searched(NamedTuple):
    """The rows of one pass for the search over measured distances: a list an image, in any order.

    Attributes:
        tokens: (B, R) int32, the tokens of these rows.
        n_tokens: (B,) int32, their number.
    """

    tokens: torch.Tensor
    n_tokens: torch.Tensor


class Undecided(NamedTuple):
    """The rows of one pass that `certify` leaves undecided: two lists an image, in any order.

    Attributes:
        positions: (B, R) int32, the positions of the rows that `collect` searches.
        n_positions: (B,) int32, their number.
        W: (B, R) float32, the bounds on c of these rows' neighbours.
        n_candidates: (B, R) int32, the number of columns with c <= W that `collect` has counted.
        tokens: (B, R) int32, the tokens for the search over measured distances: those without a
            bound W, and those with more candidates than the table holds.
        n_tokens: (B,) int32, their number.
    """

    positions: torch.Tensor
    n_positions: torch.Tensor
    W: torch.Tensor
    n_candidates: torch.Tensor
    tokens: torch.Tensor
    n_tokens: torch.Tensor

    @property
    def searched(self) -> Searched:
        return Searched(self.tokens, self.n_tokens)

    def pointers(self) -> dict[str, torch.Tensor]:
        """The lists as the kernels' arguments: {"positions_ptr": positions, ...}."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}


@triton.jit
def _rotation(tile):
    return (tile * -1640531527) >> 26 & 63  # the top bits of a product with 2^32 / golden ratio


@triton.jit
def position_of(token):
    """Returns the position of a token; int32."""
    tile = token // TILE
    return tile * TILE + ((token % TILE + _rotation(tile)) & (TILE - 1))


@triton.jit
def token_at(position):
    """Returns the token at a position; int32."""
    tile = position // TILE
    return tile * TILE + ((position % TILE - _rotation(tile)) & (TILE - 1))


def positions(n: int) -> torch.Tensor:
    """Host copy of `position_of` for the tokens 0, ..., n - 1, for tests and benchmarks."""
    token = torch.arange(n)
    tile = token // TILE.value
    return tile * TILE.value + (token + (tile * 2654435769 % 2**32 >> 26)) % TILE.value


@triton.jit
def store_entries(table_ptr, column, candidate, sure, decided):
    """Stores the candidates of rows: columns to be measured, sure columns, empty entries.

    table_ptr: [R, 1], the rows of the table; rows that are not decided are empty.
    column, candidate, sure: [R, columns]; at most 64 candidates of a decided row.
    """
    measured = (candidate & (sure == 0)).to(tl.int32)
    measured_slot = tl.cumsum(measured, axis=1) - 1
    sure_slot = tl.sum(measured, axis=1)[:, None] + tl.cumsum(sure.to(tl.int32), axis=1) - 1
    entry = tl.where(sure, column | SURE, column)
    slot = tl.where(sure, sure_slot, measured_slot)
    tl.store(table_ptr + slot, entry, mask=candidate & decided[:, None])
    slots = tl.arange(0, CAPACITY)[None, :]
    n_candidates = tl.where(decided, tl.sum(candidate.to(tl.int32), axis=1), 0)
    empty = tl.zeros([column.shape[0], CAPACITY], tl.int32) + NO_COLUMN
    tl.store(table_ptr + slots, empty, mask=slots >= n_candidates[:, None])


@triton.jit
def append(list_ptr, count_ptr, item, mask):
    """Appends the items of a block to a list, in any order, and returns their places in it."""
    place = tl.atomic_add(count_ptr + item * 0, 1, mask=mask)
    tl.store(list_ptr + place, item, mask=mask)
    return place


@triton.jit
def shares_of(count, BLOCK_M: tl.constexpr, programs, most):
    """Returns the number of programs that share the columns of each block of `count` rows."""
    blocks = tl.maximum(tl.cdiv(count, BLOCK_M), 1)
    return tl.maximum(tl.minimum(programs // blocks, most), 1)


def programs_for_lists(gpu: Architecture) -> int:
    """The number of programs that share listed rows: two a multiprocessor.

    The rows are counted on the device, so that the number of programs cannot depend on them.
    """
    return min(MOST_PROGRAMS, 2 * gpu.multiprocessors)

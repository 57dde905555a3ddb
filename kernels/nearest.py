"""The k nearest neighbours as a chain of launches: which search for which shape, and its workspace.

    centre -> round -> [ bins -> certify -> collect -> settle -> search -> merge ]  half precision
    search -> merge                                                           measured distances

The half-precision chain runs a bounded number of rows at a time. `collect` finds the candidates of
rows that `certify` leaves undecided. Rows with too many of them or without a bound go through the
search over measured distances, which runs last and overwrites what `settle` wrote. Nothing waits
for the GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from . import candidates, certify, knn
from ._launch import Launch, architecture, multiprocessors, power_of_two, strides
from .collect import collect_launch
from .rounding import TILE, centre_launch, round_launch
from .settle import settle_launch

LEAST_TOKENS_FOR_HALF = 128  # fewer fill no tile
MOST_NEIGHBORS_FOR_HALF = 48  # of 64 candidates
MAX_K = 128
MOST_SPLITS = 32  # programs that share the columns of one block of rows in the measured search
PROGRAMS = 1024  # at most, that listed rows of all images are shared out to: two a multiprocessor
BINS_BYTES = 32 * 2**20


def nearest_triton(x: torch.Tensor, k: int, measure_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k <= 128 nearest others of x (B, N, D) float16, bfloat16 or float32.

    Returns:
        Squared distances float32, (B, N, k), or without measure_all of the k-th alone, (B, N, 1),
        and indices (B, N, k) int64: nearest first, or without measure_all those first that are
        sure, by column. A distance is +inf where it overflows, and NaN where one of its two tokens
        holds a NaN or an infinity.
    """
    batch, n, _ = x.shape
    indices = torch.empty(batch, n, k, dtype=torch.int64, device=x.device)
    distances = torch.empty(batch, n, k if measure_all else 1, device=x.device)
    if n >= LEAST_TOKENS_FOR_HALF and k <= MOST_NEIGHBORS_FOR_HALF:
        _nearest_half(x, indices, distances)
    else:
        _search(x, indices, distances)
    return distances, indices


class Rounded(NamedTuple):
    """The operands of the half-precision pass for a batch: y, a^2, r and u of `rounding.py`."""

    half: torch.Tensor
    square: torch.Tensor
    error: torch.Tensor
    ratio: torch.Tensor


class Undecided(NamedTuple):
    """The rows of one pass that `certify` leaves, R of them at most, in two lists an image.

    Attributes:
        rows: (B, R) int32, the positions of the rows that `collect` searches.
        count: (B,) int32, how many they are.
        limit: (B, R) float32, their bounds W.
        found: (B, R) int32, how many candidates `collect` has found.
        rest: (B, R) int32, the tokens for the search over measured distances: those without a
            bound, and those with more candidates than the table holds.
        rest_count: (B,) int32, how many they are.
    """

    rows: torch.Tensor
    count: torch.Tensor
    limit: torch.Tensor
    found: torch.Tensor
    rest: torch.Tensor
    rest_count: torch.Tensor


def _nearest_half(x: torch.Tensor, indices: torch.Tensor, distances: torch.Tensor) -> None:
    batch, n, d = x.shape
    k = indices.shape[-1]
    shares = splits(batch, n, multiprocessors(x.device))
    _, whole = rounded(x, shares)
    fitting = BINS_BYTES // (shares * candidates.DEPTH.value * TILE.value * 4)
    rows = max(1, fitting // candidates.BLOCK_M) * candidates.BLOCK_M
    rows = min(rows, _whole_blocks(n))
    images = max(1, fitting // rows)
    for image in range(0, batch, images):
        part = slice(image, image + images)
        tokens = Rounded(*(t[part] for t in whole))
        for first in range(0, n, rows):
            table, undecided = decide(tokens, shares, first, min(rows, n - first), n, d, k)
            collect(tokens, undecided, table, first, n)
            settle_launch(x[part], table, indices[part], distances[part], first).run()
            _search(x[part], indices[part], distances[part], undecided)


def decide(
    tokens: Rounded, shares: int, first: int, rows: int, n: int, d: int, k: int
) -> tuple[torch.Tensor, Undecided]:
    """The certificate's table (B, R, 64) of the rows from `first` on, R whole blocks of them.

    With it come the rows that it leaves undecided.
    """
    size, rows = len(tokens.half), _whole_blocks(rows)
    new, integer = tokens.half.new_empty, torch.int32
    bins = new(size, rows, shares, candidates.DEPTH.value, TILE.value, dtype=integer)
    table = new(size, rows, candidates.CAPACITY.value, dtype=integer)
    count, rest_count = torch.zeros(2, size, dtype=integer, device=table.device)
    listed, found, rest = new(3, size, rows, dtype=integer)
    limit = new(size, rows, dtype=torch.float32)
    undecided = Undecided(listed, count, limit, found, rest, rest_count)
    block_n = candidates.block_columns(n, d, architecture(table.device))
    candidates.bins_launch(tokens.half, tokens.square, bins, first, block_n).run()
    certify.certify_launch(bins, *tokens[1:], table, undecided, first, n, d, k).run()
    return table, undecided


def collect(tokens: Rounded, undecided: Undecided, table: torch.Tensor, first: int, n: int) -> None:
    """Writes all candidates of the undecided rows into the table; lists rows with over 64."""
    programs = max(_shared_out(table.device) // len(table), triton.cdiv(table.shape[1], 64))
    collect_launch(tokens.half, tokens.square, undecided, table, first, n, programs).run()


def _shared_out(device: torch.device) -> int:
    return min(PROGRAMS, 2 * multiprocessors(device))


def _whole_blocks(rows: int) -> int:
    return triton.cdiv(rows, candidates.BLOCK_M) * candidates.BLOCK_M


def rounded(x: torch.Tensor, splits: int) -> tuple[torch.Tensor, Rounded]:
    """The mean and x (B, N, D) less it, padded to whole blocks of rows, equal shares of columns."""
    batch, n, d = x.shape
    block_n = candidates.block_columns(n, d, architecture(x.device))
    multiple = math.lcm(splits * block_n, candidates.BLOCK_M)
    padded_n = triton.cdiv(n, multiple) * multiple
    padded_d = power_of_two(d, 64, 256) if d <= 256 else triton.cdiv(d, 64) * 64
    half = x.new_empty(batch, padded_n, padded_d, dtype=torch.float16)
    square, error = x.new_empty(2, batch, padded_n, dtype=torch.float32)
    ratio = x.new_zeros(batch, dtype=torch.float32)
    mean, spread = _centre(x)
    round_launch(x, mean, spread, half, square, error, ratio).run()
    return mean, Rounded(half, square, error, ratio)


def _centre(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, spread = x.new_empty(2, x.shape[0], x.shape[2], dtype=torch.float32)
    centre_launch(x, mean, spread).run()
    return mean, spread


def splits(batch: int, n: int, processors: int = 132) -> int:
    """Returns how many programs share the columns of a block: enough for the GPU, and for bins."""
    blocks = batch * triton.cdiv(n, candidates.BLOCK_M)
    least = 4 if n <= 1024 or blocks > processors else 3
    return max(least, min(8, processors // blocks))


def _search(
    x: torch.Tensor,
    indices: torch.Tensor,
    distances: torch.Tensor,
    undecided: Undecided | None = None,
) -> None:
    """The search over measured distances, of the rows in the second list or of all."""
    search = search_launch(x, indices.shape[-1], undecided)
    search.run()
    merge_launch(search, indices, distances).run()


def search_launch(x: torch.Tensor, k: int, undecided: Undecided | None = None) -> Launch:
    """The k smallest keys of each row and share of the columns, of the listed tokens or of all."""
    batch, n, d = x.shape
    listed, count = (None, None) if undecided is None else undecided[4:]
    rows = n if listed is None else listed.shape[1]
    blocks = triton.cdiv(rows, knn.ROWS)
    processors = multiprocessors(x.device)
    if listed is None:  # as many programs as fill a GPU, in whole blocks
        share = min(MOST_SPLITS, triton.cdiv(n, 128), processors // (batch * blocks))
        programs = blocks * max(1, share)
    else:
        programs = max(_shared_out(x.device) // batch, blocks)
    block_k = power_of_two(k, 2, MAX_K)
    block_d = power_of_two(d, 16, 64)
    keys = torch.empty(batch * programs, knn.ROWS, block_k, dtype=torch.int64, device=x.device)
    return Launch(
        knn._search_kernel,
        batch * programs,
        dict(x_ptr=x, listed_ptr=listed, count_ptr=count, keys_ptr=keys)
        | dict(N=n, D=d, K=k, rows_per_image=rows, programs=programs, **strides("x", x, "bnd")),
        dict(LISTED=listed is not None, BLOCK_M=knn.ROWS, BLOCK_N=knn.PAIRS // block_d)
        | dict(BLOCK_D=block_d, BLOCK_K=block_k, MOST_SPLITS=MOST_SPLITS),
        dict(num_warps=4),
    )


def merge_launch(search: Launch, indices: torch.Tensor, distances: torch.Tensor) -> Launch:
    """Indices (B, N, k) and distances (B, N, k or 1) of the rows of a search."""
    assert indices.is_contiguous() and distances.is_contiguous()
    block_r, warps = (16, 8) if search.constants["BLOCK_K"] <= 64 else (4, 4)
    shared = ("listed_ptr", "count_ptr", "keys_ptr", "N", "K", "rows_per_image", "programs")
    same = ("LISTED", "BLOCK_M", "BLOCK_K", "MOST_SPLITS")
    return Launch(
        knn._merge_kernel,
        len(indices) * triton.cdiv(search.args["rows_per_image"], block_r),
        {name: search.args[name] for name in shared}
        | dict(indices_ptr=indices, distances_ptr=distances),
        {name: search.constants[name] for name in same}
        | dict(ALL=distances.shape[-1] == indices.shape[-1], BLOCK_R=block_r),
        dict(num_warps=warps),
    )

"""The k nearest neighbours as a chain of launches: which search for which shape, and its workspace.

    centre -> round -> [ bins -> certify -> collect -> settle -> search -> merge ]  half precision
    search -> merge                                                           measured distances

Each kernel stands in a file of `knn_details/`, and the bound that makes the half-precision chain
exact in knn_details/README.md. The chain runs on a bounded number of rows at a time. `collect`
finds the candidates of rows that `certify` leaves undecided. Rows with too many of them, or without
a bound, go through the search over measured distances, which runs last and overwrites what `settle`
wrote. Nothing waits for the GPU.
"""

from __future__ import annotations

import math

import torch
import triton

from ._launch import Architecture, architecture, power_of_two
from .knn_details.bins import BLOCK_M, DEPTH, bins_launch, block_columns
from .knn_details.certify import certify_launch
from .knn_details.collect import collect_launch
from .knn_details.rounding import centre_launch, round_launch
from .knn_details.search import merge_launch, search_launch
from .knn_details.settle import settle_launch
from .knn_details.table import CAPACITY, TILE, Rounded, Undecided, programs_for_lists

LEAST_TOKENS_FOR_HALF = 128  # fewer fill no tile
MOST_NEIGHBORS_FOR_HALF = 48  # of 64 candidates
BINS_BYTES = 32 * 2**20


def nearest_triton(x: torch.Tensor, k: int, measure_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k <= 128 nearest others of each token of x (B, N, D) float16, bfloat16 or float32.

    Returns:
        Squared distances float32 and indices (B, N, k) int64. With measure_all, all distances
        (B, N, k), nearest first. Without it, the distance of the k-th neighbour alone, (B, N, 1),
        and the neighbours that are sure first, by column. A distance is +inf where it overflows,
        and NaN where one of its two tokens holds a NaN or an infinity.
    """
    batch, n, _ = x.shape
    indices = torch.empty(batch, n, k, dtype=torch.int64, device=x.device)
    distances = torch.empty(batch, n, k if measure_all else 1, device=x.device)
    if n >= LEAST_TOKENS_FOR_HALF and k <= MOST_NEIGHBORS_FOR_HALF:
        _nearest_half(x, indices, distances)
    else:
        _search(x, indices, distances)
    return distances, indices


def _nearest_half(x: torch.Tensor, indices: torch.Tensor, distances: torch.Tensor) -> None:
    """Runs the half-precision chain in passes whose bins fit BINS_BYTES."""
    batch, n, d = x.shape
    k = indices.shape[-1]
    shares = shares_of_columns(batch, n, architecture(x.device))
    all_tokens = rounded(x, shares)
    rows_that_fit = BINS_BYTES // (shares * DEPTH.value * TILE.value * 4)
    rows = max(1, rows_that_fit // BLOCK_M) * BLOCK_M
    rows = min(rows, _whole_blocks(n))
    images = max(1, rows_that_fit // rows)
    for image in range(0, batch, images):
        some = slice(image, image + images)
        tokens = Rounded(*(t[some] for t in all_tokens))
        for first in range(0, n, rows):
            table, undecided = decide(tokens, shares, first, min(rows, n - first), n, d, k)
            collect(tokens, undecided, table, first, n)
            settle_launch(x[some], table, indices[some], distances[some], first).run()
            _search(x[some], indices[some], distances[some], undecided)


def decide(
    tokens: Rounded, shares: int, first: int, rows: int, n: int, d: int, k: int
) -> tuple[torch.Tensor, Undecided]:
    """Runs `bins` and `certify` on the positions from `first` on.

    Returns:
        The table (B, R, 64), R the number of rows in whole blocks, and the rows that it leaves
        undecided.
    """
    batch, rows = len(tokens.y), _whole_blocks(rows)
    new, integer = tokens.y.new_empty, torch.int32
    bins = new(batch, rows, shares, DEPTH.value, TILE.value, dtype=integer)
    table = new(batch, rows, CAPACITY.value, dtype=integer)
    n_positions, n_tokens = torch.zeros(2, batch, dtype=integer, device=table.device)
    positions, n_candidates, searched = new(3, batch, rows, dtype=integer)
    W = new(batch, rows, dtype=torch.float32)
    undecided = Undecided(positions, n_positions, W, n_candidates, searched, n_tokens)
    block_n = block_columns(n, d, architecture(table.device))
    bins_launch(tokens.y, tokens.a2, bins, first, block_n).run()
    certify_launch(bins, *tokens[1:], table, undecided, first, n, d, k).run()
    return table, undecided


def collect(tokens: Rounded, undecided: Undecided, table: torch.Tensor, first: int, n: int) -> None:
    """Writes all candidates of the undecided rows into the table; lists rows with over 64."""
    gpu = architecture(table.device)
    programs = max(programs_for_lists(gpu) // len(table), triton.cdiv(table.shape[1], 64))
    collect_launch(tokens.y, tokens.a2, undecided, table, first, n, programs).run()


def _whole_blocks(rows: int) -> int:
    return triton.cdiv(rows, BLOCK_M) * BLOCK_M


def rounded(x: torch.Tensor, shares: int) -> Rounded:
    """Centres, rounds and pads x (B, N, D) to whole blocks of rows and equal shares of columns."""
    batch, n, d = x.shape
    block_n = block_columns(n, d, architecture(x.device))
    multiple = math.lcm(shares * block_n, BLOCK_M)
    padded_n = triton.cdiv(n, multiple) * multiple
    padded_d = power_of_two(d, 64, 256) if d <= 256 else triton.cdiv(d, 64) * 64
    y = x.new_empty(batch, padded_n, padded_d, dtype=torch.float16)
    a2, r = x.new_empty(2, batch, padded_n, dtype=torch.float32)
    u = x.new_zeros(batch, dtype=torch.float32)
    tokens = Rounded(y, a2, r, u)
    mean, spread = x.new_empty(2, batch, d, dtype=torch.float32)
    centre_launch(x, mean, spread).run()
    round_launch(x, mean, spread, tokens).run()
    return tokens


def shares_of_columns(batch: int, n: int, gpu: Architecture) -> int:
    """The number of programs that share the columns of a block: enough for the GPU and for bins."""
    blocks = batch * triton.cdiv(n, BLOCK_M)
    least = 4 if n <= 1024 or blocks > gpu.multiprocessors else 3
    return max(least, min(8, gpu.multiprocessors // blocks))


def _search(
    x: torch.Tensor,
    indices: torch.Tensor,
    distances: torch.Tensor,
    undecided: Undecided | None = None,
) -> None:
    """Runs the search over measured distances on the listed tokens, or on all."""
    search = search_launch(x, indices.shape[-1], undecided)
    search.run()
    merge_launch(search, indices, distances).run()

"""The k nearest neighbours as a chain of launches: which search for which shape, and its workspace.

    centre -> round -> [ bins -> certify -> collect -> search -> merge -> settle ]  half precision
    centre -> search -> merge -> settle                                           single precision

The half-precision chain runs a bounded number of rows at a time. `collect` and `search` see to the
rows that `certify` leaves undecided. Nothing waits for the GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from . import candidates, certify, knn
from ._launch import Launch, dot_precision, on_hopper, power_of_two, strides
from .rounding import TILE, centre_launch, round_launch
from .settle import settle_launch

LEAST_TOKENS_FOR_HALF = 128  # fewer fill no tile
MOST_NEIGHBORS_FOR_HALF = 48  # of 64 candidates
MAX_K = 128
BAND = 4  # single-precision candidates on either side of the k-th place that are measured
MOST_SPLITS = 32  # programs that share the columns of one block of rows in single precision
PROGRAMS = 264  # that listed rows of all images are shared out to: 132 SMs, two each
BINS_BYTES = 32 * 2**20


def nearest_triton(x: torch.Tensor, k: int, measure_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k <= 128 nearest others of x (B, N, D) float16, bfloat16 or float32.

    Returns:
        Squared distances float32, (B, N, k), or without measure_all of the k-th alone, (B, N, 1),
        and indices (B, N, k) int64: nearest first, or without measure_all those first that are
        sure, by column.
    """
    batch, n, _ = x.shape
    indices = torch.empty(batch, n, k, dtype=torch.int64, device=x.device)
    distances = torch.empty(batch, n, k if measure_all else 1, device=x.device)
    if n >= LEAST_TOKENS_FOR_HALF and k <= MOST_NEIGHBORS_FOR_HALF:
        _nearest_half(x, indices, distances)
    else:
        table = torch.empty(batch, n, _block_k(k, n), dtype=torch.int32, device=x.device)
        _search(x, _centre(x)[0], k, table)
        settle_launch(x, table, indices, distances).run()
    return distances, indices


class Rounded(NamedTuple):
    """What the half-precision pass reads of an image batch: y, a^2, r and u of `rounding.py`."""

    half: torch.Tensor
    square: torch.Tensor
    error: torch.Tensor
    ratio: torch.Tensor


class Undecided(NamedTuple):
    """The list of `certify.py`: rows, how many, their limits W, candidates that `collect` found."""

    rows: torch.Tensor
    count: torch.Tensor
    limit: torch.Tensor
    found: torch.Tensor


def _nearest_half(x: torch.Tensor, indices: torch.Tensor, distances: torch.Tensor) -> None:
    batch, n, d = x.shape
    k = indices.shape[-1]
    shares = splits(batch, n)
    mean, whole = rounded(x, shares)
    fitting = BINS_BYTES // (shares * candidates.DEPTH * TILE.value * 4)
    rows = max(1, fitting // candidates.BLOCK_M) * candidates.BLOCK_M
    rows = min(rows, _whole_blocks(n))
    images = max(1, fitting // rows)
    for image in range(0, batch, images):
        part = slice(image, image + images)
        tokens = Rounded(*(t[part] for t in whole))
        for first in range(0, n, rows):
            table, undecided = decide(tokens, shares, first, min(rows, n - first), n, d, k)
            collect(tokens, undecided, table, first, n)
            _search(x[part], mean[part], k, table, first, undecided)
            settle_launch(x[part], table, indices[part], distances[part], first).run()


def decide(
    tokens: Rounded, shares: int, first: int, rows: int, n: int, d: int, k: int
) -> tuple[torch.Tensor, Undecided]:
    """The certificate's table (B, R, 64) of the rows from `first` on, R whole blocks of them.

    With it come the rows that it leaves undecided.
    """
    size, rows = len(tokens.half), _whole_blocks(rows)
    new, integer = tokens.half.new_empty, torch.int32
    bins = new(size, rows, shares, candidates.DEPTH, TILE.value, dtype=integer)
    table = new(size, rows, candidates.CAPACITY.value, dtype=integer)
    undecided = Undecided(
        new(size, rows, dtype=integer),
        torch.zeros(size, dtype=integer, device=table.device),
        new(size, rows, dtype=torch.float32),
        new(size, rows, dtype=integer),
    )
    block_n = candidates.block_columns(n, d, on_hopper(table.device))
    candidates.bins_launch(tokens.half, tokens.square, bins, first, block_n).run()
    certify.certify_launch(bins, *tokens[1:], table, undecided, first, n, d, k).run()
    return table, undecided


def collect(tokens: Rounded, undecided: Undecided, table: torch.Tensor, first: int, n: int) -> None:
    """All candidates of the undecided rows, where they are at most 64."""
    programs = max(PROGRAMS // len(table), triton.cdiv(table.shape[1], 64))
    candidates.collect_launch(
        tokens.half, tokens.square, undecided, table, first, n, programs
    ).run()


def _whole_blocks(rows: int) -> int:
    return triton.cdiv(rows, candidates.BLOCK_M) * candidates.BLOCK_M


def rounded(x: torch.Tensor, splits: int) -> tuple[torch.Tensor, Rounded]:
    """The mean and x (B, N, D) less it, padded to whole blocks of rows, equal shares of columns."""
    batch, n, d = x.shape
    block_n = candidates.block_columns(n, d, on_hopper(x.device))
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


def splits(batch: int, n: int) -> int:
    """How many programs share the columns of a block of rows: enough for 132 SMs, and for bins."""
    blocks = batch * triton.cdiv(n, candidates.BLOCK_M)
    least = 4 if n <= 1024 or blocks > 132 else 3
    return max(least, min(8, 132 // blocks))


def _search(
    x: torch.Tensor,
    mean: torch.Tensor,
    k: int,
    table: torch.Tensor,
    first: int = 0,
    undecided: Undecided | None = None,
) -> None:
    """Fill rows of the table by the search in single precision: undecided ones, or all."""
    launch = search_launch(x, mean, k, undecided)
    launch.run()
    merge_launch(launch, k, table, first).run()


def search_launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    k: int,
    undecided: Undecided | None = None,
    precision: str | None = None,
) -> Launch:
    """mean (B, D) float32; of the undecided rows, those with more than 64 candidates."""
    batch, n, d = x.shape
    limit = min(k + BAND, n - 1, MAX_K)
    block_k = _block_k(k, n)
    # 64 rows are what Hopper's wgmma takes; a list of more than 64 keys, two registers each, leaves
    # room for 16. With these stages neither spills on Triton 3.8 and 3.9.
    block_m, warps, stages = (64, 8, 4) if block_k <= 64 else (16, 4, 1)
    listed, count, _, found = undecided or (None, None, None, None)
    rows = n if listed is None else listed.shape[1]
    blocks = triton.cdiv(rows, block_m)
    if listed is None:  # as many programs as fill a GPU, in whole blocks
        share = max(1, min(MOST_SPLITS, triton.cdiv(n, 128), 132 // (batch * blocks)))
        programs = blocks * share
    else:
        programs = max(PROGRAMS // batch, blocks)
    keys = torch.empty(batch * programs, block_m, block_k, dtype=torch.int64, device=x.device)
    return Launch(
        knn._search_kernel,
        batch * programs,
        dict(x_ptr=x, mean_ptr=mean, listed_ptr=listed, count_ptr=count, found_ptr=found)
        | dict(keys_ptr=keys, N=n, D=d, K=limit, rows_per_image=rows, programs=programs)
        | strides("x", x, "bnd"),
        dict(LISTED=listed is not None, BLOCK_M=block_m, BLOCK_N=32, BLOCK_D=16, BLOCK_K=block_k)
        | dict(MOST_SPLITS=MOST_SPLITS, PRECISION=precision or dot_precision()),
        dict(num_warps=warps, num_stages=stages),
    )


def merge_launch(search: Launch, k: int, table: torch.Tensor, first: int = 0) -> Launch:
    """The lists of a search into rows of the table (B, R, C) int32, those from `first` on."""
    batch, rows, width = table.shape
    assert table.is_contiguous() and width >= search.constants["BLOCK_K"]
    block_r, warps = (16, 8) if search.constants["BLOCK_K"] <= 64 else (4, 4)
    shared = ("listed_ptr", "count_ptr", "found_ptr", "keys_ptr", "N", "K", "programs")
    same = ("LISTED", "BLOCK_M", "BLOCK_K", "MOST_SPLITS")
    return Launch(
        knn._merge_kernel,
        batch * triton.cdiv(rows, block_r),
        {name: search.args[name] for name in shared}
        | dict(table_ptr=table, sure=max(0, k - BAND), first=first, rows_per_image=rows),
        {name: search.constants[name] for name in same} | dict(BLOCK_R=block_r, BLOCK_C=width),
        dict(num_warps=warps),
    )


def _block_k(k: int, n: int) -> int:
    return power_of_two(min(k + BAND, n - 1, MAX_K), 2, MAX_K)

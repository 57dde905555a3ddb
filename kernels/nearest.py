"""The k nearest neighbours as a chain of launches: which search for which shape, and its workspace.

    round -> [ bins -> certify -> search (undecided rows) -> merge ] -> settle      half precision
                       search -> merge -> settle                                    single precision

The half-precision chain runs a bounded number of rows at a time. Nothing waits for the GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from . import candidates, certify, knn
from ._launch import Launch, dot_precision, power_of_two, strides

# Below, the products are too small for tensor cores to matter and the launches are what costs. Not
# yet measured on a GPU, as are the shares and sizes below.
LEAST_TOKENS_FOR_HALF = 1024
MOST_NEIGHBORS_FOR_HALF = 48  # of 64 candidates
MAX_K = 128
BAND = 4  # single-precision candidates on either side of the k-th place that are measured
MOST_SPLITS = 32  # programs that share the columns of one block of rows
PROGRAMS = 256  # that listed rows are shared out to, at least: some 132 SMs, two each
BINS_BYTES = 32 * 2**20
SAMPLE = 64  # tokens from which the scale of the half-precision copy is taken
HALF_ROOT_MEAN_SQUARE = -6  # log2: elements 4 million times as large fit, ones of 1/256 are normal


def nearest_triton(
    x: torch.Tensor, mean: torch.Tensor, k: int, measure_all: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k <= 128 nearest others of x (B, N, D) float16, bfloat16 or float32; mean (B, D) float32.

    Returns:
        Squared distances float32, (B, N, k), or without measure_all of the k-th alone, (B, N, 1),
        and indices (B, N, k) int64: nearest first, or without measure_all those first that are
        sure, by column.
    """
    batch, n, _ = x.shape
    indices = torch.empty(batch, n, k, dtype=torch.int64, device=x.device)
    distances = torch.empty(batch, n, k if measure_all else 1, device=x.device)
    if n >= LEAST_TOKENS_FOR_HALF and k <= MOST_NEIGHBORS_FOR_HALF:
        _nearest_half(x, mean, indices, distances)
    else:
        table = torch.empty(batch, n, _block_k(k, n), dtype=torch.int32, device=x.device)
        _search(x, mean, k, table)
        settle_launch(x, table, indices, distances).run()
    return distances, indices


class Rounded(NamedTuple):
    """What the half-precision pass reads of an image batch: y, a^2, e and u of `certify.py`."""

    half: torch.Tensor
    square: torch.Tensor
    bound: torch.Tensor
    ratio: torch.Tensor


def _nearest_half(
    x: torch.Tensor, mean: torch.Tensor, indices: torch.Tensor, distances: torch.Tensor
) -> None:
    batch, n, d = x.shape
    k = indices.shape[-1]
    shares = splits(batch, n)
    whole = rounded(x, mean, shares)
    fitting = BINS_BYTES // (shares * candidates.DEPTH * candidates.BLOCK_N * 4)
    rows = max(1, fitting // candidates.BLOCK_M) * candidates.BLOCK_M
    rows = min(rows, _whole_blocks(n))
    images = max(1, fitting // rows)
    for image in range(0, batch, images):
        part = slice(image, image + images)
        tokens = Rounded(*(t[part] for t in whole))
        for first in range(0, n, rows):
            found = decide(tokens, shares, first, min(rows, n - first), n, d, k)
            _search(x[part], mean[part], k, found[0], first, *found[1:])
            settle_launch(x[part], found[0], indices[part], distances[part], first).run()


def decide(
    tokens: Rounded, shares: int, first: int, rows: int, n: int, d: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The certificate's table (B, R, 64) of the rows from `first` on, R whole blocks of them.

    With it come the rows that it leaves undecided, (B, R) int32, and how many they are, (B,) int32.
    """
    size, rows = len(tokens.half), _whole_blocks(rows)
    new, integer = tokens.half.new_empty, torch.int32
    bins = new(size, rows, shares, candidates.DEPTH, candidates.BLOCK_N, dtype=integer)
    table = new(size, rows, certify.CAPACITY, dtype=integer)
    listed = new(size, rows, dtype=integer)
    count = torch.zeros(size, dtype=integer, device=table.device)
    candidates.bins_launch(tokens.half, tokens.square, bins, first).run()
    certify.certify_launch(bins, *tokens[1:], table, listed, count, first, n, k, gamma(d)).run()
    return table, listed, count


def _whole_blocks(rows: int) -> int:
    return triton.cdiv(rows, candidates.BLOCK_M) * candidates.BLOCK_M


def gamma(d: int) -> float:
    """What bounds the rounding of a sum of d products, as a share of the product of the norms.

    Tensor cores add 16 products at a time to the sum and truncate each to the largest of them: 17
    units of 2^-23 a step.
    """
    return (1.1 * d + 64) * 2.0**-23


def rounded(x: torch.Tensor, mean: torch.Tensor, splits: int) -> Rounded:
    """x (B, N, D) less its mean, padded to whole blocks of rows and equal shares of columns."""
    batch, n, d = x.shape
    multiple = math.lcm(splits * candidates.BLOCK_N, candidates.BLOCK_M)
    padded_n = triton.cdiv(n, multiple) * multiple
    padded_d = power_of_two(d, 64, 256) if d <= 256 else triton.cdiv(d, 64) * 64
    half = torch.empty(batch, padded_n, padded_d, dtype=torch.float16, device=x.device)
    square = torch.empty(batch, padded_n, device=x.device)
    error = torch.empty(batch, padded_n, device=x.device)
    candidates.round_launch(x, mean, _scale(x, mean), half, square, error).run()
    # fp16 rounds what is below its normal range by 2^-25 at most.
    eta = d**0.5 * 2.0**-25
    length = torch.where(square.isfinite(), square, 0).sqrt()
    share = (error - eta).clamp(min=0) / length.clamp(min=torch.finfo(torch.float32).tiny)
    ratio = share.amax(dim=1) * (1 + 2**-20)
    return Rounded(half, square, error + ratio[:, None] * length + eta, ratio)


def _scale(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """(B,) powers of two that bring the root mean square of a sample to 2^-6."""
    sample = x[:, :: max(1, x.shape[1] // SAMPLE)].float() - mean.unsqueeze(1)
    sample = torch.where(sample.isfinite().all(dim=-1, keepdim=True), sample, 0)
    size = sample.square().mean(dim=(1, 2)).sqrt().clamp(min=2.0**-100, max=2.0**100)
    return torch.exp2(HALF_ROOT_MEAN_SQUARE - size.log2().round())


def splits(batch: int, n: int) -> int:
    """How many programs share the columns of a block of rows: two rounds of 132 SMs, and bins."""
    blocks = batch * triton.cdiv(n, candidates.BLOCK_M)
    return max(4, min(8, triton.cdiv(264, blocks)))


def _search(
    x: torch.Tensor,
    mean: torch.Tensor,
    k: int,
    table: torch.Tensor,
    first: int = 0,
    listed: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Fill rows of the table by the search in single precision: the listed ones, or all."""
    launch = search_launch(x, mean, k, listed, count)
    launch.run()
    merge_launch(launch, k, table, first).run()


def search_launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    k: int,
    listed: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    precision: str | None = None,
) -> Launch:
    """mean (B, D) float32; listed (B, R) int32, of which count (B,) int32 are rows to search."""
    batch, n, d = x.shape
    limit = min(k + BAND, n - 1, MAX_K)
    block_k = _block_k(k, n)
    # 64 rows are what Hopper's wgmma takes; a list of more than 64 keys, two registers each, leaves
    # room for 16. With these stages neither spills on Triton 3.8 and 3.9.
    block_m, warps, stages = (64, 8, 4) if block_k <= 64 else (16, 4, 1)
    rows = n if listed is None else listed.shape[1]
    blocks = triton.cdiv(rows, block_m)
    if listed is None:  # as many programs as fill a GPU, in whole blocks
        share = max(1, min(MOST_SPLITS, triton.cdiv(n, 128), 132 // (batch * blocks)))
        programs = blocks * share
    else:
        programs = max(PROGRAMS, blocks)
    keys = torch.empty(batch * programs, block_m, block_k, dtype=torch.int64, device=x.device)
    return Launch(
        knn._search_kernel,
        batch * programs,
        dict(x_ptr=x, mean_ptr=mean, listed_ptr=listed, count_ptr=count, keys_ptr=keys)
        | dict(N=n, D=d, K=limit, rows_per_image=rows, programs=programs)
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
    shared = ("listed_ptr", "count_ptr", "keys_ptr", "N", "K", "programs")
    same = ("LISTED", "BLOCK_M", "BLOCK_K", "MOST_SPLITS")
    return Launch(
        knn._merge_kernel,
        batch * triton.cdiv(rows, block_r),
        {name: search.args[name] for name in shared}
        | dict(table_ptr=table, sure=max(0, k - BAND), first=first, rows_per_image=rows),
        {name: search.constants[name] for name in same} | dict(BLOCK_R=block_r, BLOCK_C=width),
        dict(num_warps=warps),
    )


def settle_launch(
    x: torch.Tensor,
    table: torch.Tensor,
    indices: torch.Tensor,
    distances: torch.Tensor,
    first: int = 0,
) -> Launch:
    """Indices (B, N, k) and distances (B, N, k or 1) of the rows of a table, those from `first`."""
    batch, rows, width = table.shape
    _, n, d = x.shape
    assert indices.is_contiguous() and distances.is_contiguous()
    block_r = min(16, 256 // width) if width <= 64 else 1
    return Launch(
        knn._settle_kernel,
        batch * triton.cdiv(rows, block_r),
        dict(x_ptr=x, table_ptr=table, indices_ptr=indices, distances_ptr=distances)
        | dict(N=n, D=d, K=indices.shape[-1], first=first, rows_per_image=rows)
        | strides("x", x, "bnd"),
        dict(ALL=distances.shape[-1] == indices.shape[-1], BLOCK_R=block_r, BLOCK_C=width)
        | dict(BLOCK_D=32),
        dict(num_warps=8),
    )


def _block_k(k: int, n: int) -> int:
    return power_of_two(min(k + BAND, n - 1, MAX_K), 2, MAX_K)

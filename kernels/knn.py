"""The k nearest neighbours as a chain of launches: which search for which shape, and its workspace.

    centre -> round -> [ panel -> select           -> settle -> search -> merge ]    few columns
    centre -> round -> [ bins -> certify -> collect -> settle -> search -> merge ]   many columns
    search -> merge                                                           measured distances

Each kernel stands in a file of `knn_details/`, and the bound that makes the half-precision chains
exact in knn_details/README.md. All of them take rows and columns as two tensors: queries and a
bank, or one set of tokens twice. A chain runs on a bounded number of rows at a time. `select` and
`certify` decide which columns may be neighbours; `collect` finds the candidates of rows that
`certify` leaves undecided. Rows with too many of them, or without a bound, go through the search
over measured distances, which runs last and overwrites what `settle` wrote. Nothing waits for the
GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ._launch import Architecture, architecture, cdiv, power_of_two
from ._plan import planned
from .knn_details.bins import BLOCK_M, DEPTH, bins_launch, block_columns
from .knn_details.certify import certify_launch
from .knn_details.collect import collect_launch
from .knn_details.merge import merge_launch
from .knn_details.panel import panel_launch
from .knn_details.rounding import centre_launch, round_launch
from .knn_details.search import search_launch
from .knn_details.select import select_launch
from .knn_details.settle import settle_launch
from .knn_details.table import CAPACITY, TILE, Rounded, Searched, Undecided, programs_for_lists

LEAST_TOKENS_FOR_HALF = 128  # of rows and of columns: fewer fill no tile
MOST_NEIGHBORS_FOR_HALF = 48  # of 64 candidates
PANEL_BYTES = 64 * 2**20  # the panels of a pass
MOST_COLUMNS_OF_PANEL = 5760  # as many rows fit PANEL_BYTES; more columns take bins
BINS_BYTES = 48 * 2**20  # of 170 blocks of rows in three shares: a wave of an H100, and more
# With more tokens, a GPU takes longer than Python, and a plan would hold the workspaces of several
# passes at once.
MOST_PLANNED_TOKENS = 16384


def nearest_triton(
    x: torch.Tensor, k: int, measure_all: bool, queries: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k <= 128 nearest tokens of x for each query, or the nearest others of each token.

    Args:
        x: (B, N, D) float16, bfloat16 or float32, any strides.
        k: at most N with queries, at most N - 1 without.
        measure_all: whether all distances are measured, and the neighbours ranked.
        queries: (B, M, D) of the dtype of x, any strides; no token of x is left out, those equal to
            a query included. None searches x for its own tokens, of which none is its own
            neighbour; M is N then.

    Returns:
        Squared distances float32 and indices (B, M, k) int64. With measure_all, all distances
        (B, M, k), nearest first. Without it, the distance of the k-th neighbour alone, (B, M, 1),
        and the neighbours that are sure first, by column. A distance is +inf where it overflows,
        and NaN where one of its two tokens holds a NaN or an infinity.
    """
    settings = k, measure_all
    tokens = x.shape[1] if queries is None else max(x.shape[1], queries.shape[1])
    if x.shape[0] * tokens > MOST_PLANNED_TOKENS:
        return _nearest(x, queries, *settings)
    return planned(_nearest, (x, queries), settings)


def _nearest(
    x: torch.Tensor, queries: torch.Tensor | None, k: int, measure_all: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest_triton`, launch by launch."""
    exclude_self = queries is None
    rows = x if queries is None else queries
    batch, m, _ = rows.shape
    indices = torch.empty(batch, m, k, dtype=torch.int64, device=x.device)
    distances = torch.empty(batch, m, k if measure_all else 1, device=x.device)
    if not m:
        return distances, indices
    if min(m, x.shape[1]) >= LEAST_TOKENS_FOR_HALF and k <= MOST_NEIGHBORS_FOR_HALF:
        _nearest_half(rows, x, exclude_self, indices, distances)
    else:
        _search(rows, x, exclude_self, indices, distances)
    return distances, indices


def _nearest_half(
    rows: torch.Tensor,
    columns: torch.Tensor,
    exclude_self: bool,
    indices: torch.Tensor,
    distances: torch.Tensor,
) -> None:
    """Runs a half-precision chain, pass by pass."""
    passes = by_panel if columns.shape[1] <= MOST_COLUMNS_OF_PANEL else by_bins
    k = indices.shape[-1]
    for images, first, table, searched in passes(rows, columns, exclude_self, k):
        exact, out = (rows[images], columns[images]), (indices[images], distances[images])
        settle_launch(*exact, table, *out, first).run()
        _search(*exact, exclude_self, *out, searched)


Pass = tuple[slice, int, torch.Tensor, Searched]  # images, first position, table, rows left


def by_panel(
    rows: torch.Tensor, columns: torch.Tensor, exclude_self: bool, k: int
) -> Iterator[Pass]:
    """Decides in passes whose panel fits PANEL_BYTES. A set's own panel is made at once."""
    all_rows, all_columns = rounded(rows, columns, exclude_self, BLOCK_M)
    batch, padded_m, padded_n = len(rows), all_rows.padded_n, all_columns.padded_n
    rows_that_fit = PANEL_BYTES // (2 * padded_n)
    most = padded_m
    if not exclude_self:
        most = min(padded_m, max(1, rows_that_fit // BLOCK_M) * BLOCK_M)
    images = min(batch, max(1, rows_that_fit // most))
    memory = rows.new_empty(images * most * padded_n, dtype=torch.float16)  # of every pass
    for some, first, count in _passes(batch, padded_m, images, most):
        halves = all_rows.images(some), all_columns.images(some)
        shape = len(halves[0].u), count, padded_n
        panel = memory[: math.prod(shape)].view(shape)
        yield some, first, *choose(*halves, exclude_self, panel, first, k)


def by_bins(
    rows: torch.Tensor, columns: torch.Tensor, exclude_self: bool, k: int
) -> Iterator[Pass]:
    """Decides in passes whose bins fit BINS_BYTES."""
    batch, m, _ = rows.shape
    shares, (all_rows, all_columns) = rounded_for_bins(rows, columns, exclude_self)
    rows_that_fit = BINS_BYTES // (shares * DEPTH.value * TILE.value * 4)
    gpu = architecture(columns.device)
    most = BLOCK_M * blocks_of_a_pass(cdiv(m, BLOCK_M), rows_that_fit // BLOCK_M, shares, gpu)
    for some, first, count in _passes(batch, m, max(1, rows_that_fit // most), most):
        halves = all_rows.images(some), all_columns.images(some)
        table, undecided = decide(*halves, exclude_self, shares, first, count, k)
        collect(*halves, exclude_self, undecided, table, first)
        yield some, first, table, undecided.searched


def _passes(batch: int, m: int, images: int, most: int) -> Iterator[tuple[slice, int, int]]:
    """Yields the images, the first row and the number of rows of each pass."""
    for image in range(0, batch, images):
        for first in range(0, m, most):
            yield slice(image, image + images), first, min(most, m - first)


def choose(
    rows: Rounded,
    columns: Rounded,
    exclude_self: bool,
    panel: torch.Tensor,
    first: int,
    k: int,
) -> tuple[torch.Tensor, Searched]:
    """Runs `panel` and `select` on the positions of rows from `first` on.

    Args:
        panel: (B, R, padded N) float16, the workspace.

    Returns:
        The table (B, R, 64), and the rows that it does not decide.
    """
    batch, in_blocks, _ = panel.shape
    table = panel.new_empty(batch, in_blocks, CAPACITY.value, dtype=torch.int32)
    n_tokens = torch.zeros(batch, dtype=torch.int32, device=panel.device)
    searched = Searched(table.new_empty(batch, in_blocks), n_tokens)
    tile = architecture(panel.device).options.panel_tile
    panel_launch(rows, columns, exclude_self, panel, first, tile).run()
    select_launch(panel, rows, columns, table, searched, first, k).run()
    return table, searched


def blocks_of_a_pass(blocks: int, most: int, shares: int, gpu: Architecture) -> int:
    """All blocks of an image if at most `most` fit a pass, else as many as fill whole waves.

    A wave is one program on each multiprocessor, and a block of rows has a program a share.
    """
    if blocks <= most:
        return blocks
    wave = gpu.multiprocessors // math.gcd(gpu.multiprocessors, shares)
    return max(1, most // wave * wave or most)


def decide(
    rows: Rounded,
    columns: Rounded,
    exclude_self: bool,
    shares: int,
    first: int,
    count: int,
    k: int,
) -> tuple[torch.Tensor, Undecided]:
    """Runs `bins` and `certify` on `count` positions of rows from `first` on.

    Returns:
        The table (B, R, 64), R = `count` in whole blocks, and the rows that it leaves undecided.
    """
    batch, in_blocks = len(rows.y), _whole_blocks(count)
    new, integer = rows.y.new_empty, torch.int32
    bins = new(batch, in_blocks, shares, DEPTH.value, TILE.value, dtype=integer)
    table = new(batch, in_blocks, CAPACITY.value, dtype=integer)
    n_positions, n_tokens = torch.zeros(2, batch, dtype=integer, device=table.device)
    positions, n_candidates, searched = new(3, batch, in_blocks, dtype=integer)
    W = new(batch, in_blocks, dtype=torch.float32)
    undecided = Undecided(positions, n_positions, W, n_candidates, searched, n_tokens)
    block_n = block_columns(columns.d, architecture(table.device))
    bins_launch(rows, columns, exclude_self, bins, first, block_n).run()
    certify_launch(bins, rows, columns, table, undecided, first, k).run()
    return table, undecided


def collect(
    rows: Rounded,
    columns: Rounded,
    exclude_self: bool,
    undecided: Undecided,
    table: torch.Tensor,
    first: int,
) -> None:
    """Writes all candidates of the undecided rows into the table; lists rows with over 64."""
    gpu = architecture(table.device)
    programs = max(programs_for_lists(gpu) // len(table), cdiv(table.shape[1], 64))
    collect_launch(rows, columns, exclude_self, undecided, table, first, programs).run()


def _whole_blocks(rows: int) -> int:
    return cdiv(rows, BLOCK_M) * BLOCK_M


def rounded(
    rows: torch.Tensor, columns: torch.Tensor, exclude_self: bool, multiple: int
) -> tuple[Rounded, Rounded]:
    """Centres, rounds and pads both sets: rows to whole blocks, columns to a multiple of positions.

    The columns' centre and scale serve both sets, as the certificate needs. One set that is
    searched for its own tokens is rounded once.
    """
    batch, _, d = columns.shape
    mean, spread = columns.new_empty(2, batch, d, dtype=torch.float32)
    centre_launch(columns, mean, spread).run()
    half_columns = _rounded_set(columns, mean, spread, multiple)
    if exclude_self:
        return half_columns, half_columns
    return _rounded_set(rows, mean, spread, BLOCK_M), half_columns


def _rounded_set(
    x: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor, multiple: int
) -> Rounded:
    """Rounds x (B, N, D) and pads N to a multiple."""
    batch, n, d = x.shape
    padded_n = cdiv(n, multiple) * multiple
    padded_d = power_of_two(d, 64, 256) if d <= 256 else cdiv(d, 64) * 64
    y = x.new_empty(batch, padded_n, padded_d, dtype=torch.float16)
    a2, r = x.new_empty(2, batch, padded_n, dtype=torch.float32)
    tokens = Rounded(y, a2, r, x.new_zeros(batch, dtype=torch.float32), n, d)
    round_launch(x, mean, spread, tokens).run()
    return tokens


def shares_of_columns(batch: int, m: int, gpu: Architecture) -> int:
    """The number of programs that share the columns of a block: enough for the GPU and for bins."""
    blocks = batch * cdiv(m, BLOCK_M)
    least = 4 if blocks > gpu.multiprocessors else 3
    return max(least, min(8, gpu.multiprocessors // blocks))


def rounded_for_bins(
    rows: torch.Tensor, columns: torch.Tensor, exclude_self: bool
) -> tuple[int, tuple[Rounded, Rounded]]:
    """Returns the number of shares of the columns, and both sets `rounded` for them."""
    gpu = architecture(columns.device)
    shares = shares_of_columns(*rows.shape[:2], gpu)
    multiple = multiple_of_bins(shares, rows.shape[2], gpu)
    return shares, rounded(rows, columns, exclude_self, multiple)


def multiple_of_bins(shares: int, d: int, gpu: Architecture) -> int:
    """The multiple of positions to which columns are padded, so that all shares are equal."""
    return math.lcm(shares * block_columns(d, gpu), BLOCK_M)


def _search(
    rows: torch.Tensor,
    columns: torch.Tensor,
    exclude_self: bool,
    indices: torch.Tensor,
    distances: torch.Tensor,
    searched: Searched | None = None,
) -> None:
    """Runs the search over measured distances on the listed rows, or on all."""
    search = search_launch(rows, columns, exclude_self, indices.shape[-1], searched)
    search.run()
    merge_launch(search, indices, distances).run()

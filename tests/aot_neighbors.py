"""The launches of the neighbour search and of LOF, for `aot.py` to compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from meta_tensors import DTYPES, integers, meta

from scclip_fast.kernels._launch import Architecture, Launch
from scclip_fast.kernels.knn_details.bins import bins_launch, block_columns
from scclip_fast.kernels.knn_details.certify import certify_launch
from scclip_fast.kernels.knn_details.collect import collect_launch
from scclip_fast.kernels.knn_details.merge import merge_launch
from scclip_fast.kernels.knn_details.panel import panel_launch
from scclip_fast.kernels.knn_details.rounding import centre_launch, round_launch
from scclip_fast.kernels.knn_details.search import search_launch
from scclip_fast.kernels.knn_details.select import select_launch
from scclip_fast.kernels.knn_details.settle import settle_launch
from scclip_fast.kernels.knn_details.table import Rounded, Undecided, programs_for_lists
from scclip_fast.kernels.lof import lof_launch

Launches = Iterator[tuple[str, Launch]]
#: Padded tokens, channels and shares of the columns of the chain over bins.
HALF = ((6144, 1024, 8), (9216, 1024, 3), (82944, 256, 4))
#: Images, padded tokens and channels of the chain over a panel.
PANELS = ((64, 256, 768), (1, 512, 64), (1, 5248, 1024))


def neighbors(gpu: Architecture) -> Launches:
    for name, dtype in DTYPES.items():
        yield from measured(name, dtype)
    for n, d, shares in HALF:
        yield from half(n, d, shares, gpu)
    for b, n, d in PANELS:
        yield from panels(b, n, d, gpu.options.panel_tile)
    neighbors = meta(1, 5184, 30, dtype=torch.int64)
    yield "lof", lof_launch(meta(1, 5184), neighbors, meta(1, 5184))
    yield from two_sets(gpu)


def measured(name: str, dtype: torch.dtype) -> Launches:
    """Yields the launches that read the tokens themselves, of one set."""
    x, mean = meta(1, 5184, 1024, dtype=dtype), meta(1, 1024)
    for k in (1, 30, 60, 128):
        search, indices = search_launch(x, x, True, k), meta(1, 5184, k, dtype=torch.int64)
        yield f"search-{name}-k{k}", search
        yield f"merge-{name}-k{k}", merge_launch(search, indices, meta(1, 5184, 1))
    for d in (16, 32):
        narrow = meta(1, 5184, d, dtype=dtype)
        yield f"search-{name}-d{d}", search_launch(narrow, narrow, True, 30)
    listed = search_launch(x, x, True, 30, undecided(5184).searched)
    table, indices = integers(1, 5184, 64), meta(1, 5184, 30, dtype=torch.int64)
    yield f"search-listed-{name}", listed
    for kind, places in (("all", 30), ("last", 1)):
        out = indices, meta(1, 5184, places)
        yield f"merge-listed-{kind}-{name}", merge_launch(listed, *out)
        yield f"settle-{kind}-{name}", settle_launch(x, x, table, *out, 0)
    yield f"centre-{name}", centre_launch(x, mean, mean)
    yield f"round-{name}", round_launch(x, mean, mean, rounded(5376, 1024, n=5184))
    if name == "fp32":
        # The stride of an image exceeds 2^31.
        far = meta(2, 3 * 2**30, 2).transpose(1, 2)[:, :, :5184].transpose(1, 2)
        yield "search-fp32-far", search_launch(far, far, True, 30)


def half(n: int, d: int, shares: int, gpu: Architecture) -> Launches:
    """Yields the launches that read half-precision tokens, of one set."""
    bins, table = integers(1, 1024, shares, 3, 64), integers(1, 1024, 64)
    tokens, lists = rounded(n, d), undecided(1024)
    launch = bins_launch(tokens, tokens, True, bins, 0, block_columns(d, gpu))
    yield f"bins-{n}x{d}", launch
    yield f"certify-{n}x{d}", certify_launch(bins, tokens, tokens, table, lists, 0, 30)
    programs = programs_for_lists(gpu)
    launch = collect_launch(tokens, tokens, True, lists, table, 0, programs)
    yield f"collect-{n}x{d}", launch


def panels(b: int, n: int, d: int, tile: int) -> Launches:
    """Yields the launches of a panel, of one set and of queries in a bank of as many tokens."""
    panel, table = meta(b, n, n, dtype=torch.float16), integers(b, n, 64)
    tokens, searched = rounded(n, d, b=b), undecided(n).searched
    yield f"panel-{n}x{d}", panel_launch(tokens, tokens, True, panel, 0, tile)
    launch = panel_launch(tokens, tokens, False, panel, 0, tile)
    yield f"panel-two-{n}x{d}", launch
    yield f"select-{n}x{d}", select_launch(panel, tokens, tokens, table, searched, 0, 30)


def two_sets(gpu: Architecture) -> Launches:
    """Yields the launches of 5184 queries in a bank whose code is not that of one set."""
    table, lists, programs = integers(1, 5376, 64), undecided(5376), programs_for_lists(gpu)
    for n, d, shares in HALF[1:]:
        queries, bank = rounded(5248, d, n=5184), rounded(n, d)
        bins = integers(1, 5248, shares, 3, 64)
        launch = bins_launch(queries, bank, False, bins, 0, block_columns(d, gpu))
        yield f"bins-two-{n}x{d}", launch
        launch = collect_launch(queries, bank, False, lists, table, 0, programs)
        yield f"collect-two-{n}x{d}", launch
    queries, bank = meta(1, 5184, 1024), meta(1, 82944, 1024)
    for k in (30, 128):
        yield f"search-two-fp32-k{k}", search_launch(queries, bank, False, k)
    yield "search-two-listed-fp32", search_launch(queries, bank, False, 30, lists.searched)
    out = meta(1, 5184, 30, dtype=torch.int64), meta(1, 5184, 30)
    yield "settle-two-fp32", settle_launch(queries, bank, table, *out, 0)


def rounded(padded_n: int, d: int, n: int | None = None, b: int = 1) -> Rounded:
    """One set of n tokens, or one without padding."""
    y, of_token = meta(b, padded_n, d, dtype=torch.float16), meta(b, padded_n)
    return Rounded(y, of_token, of_token, meta(b), padded_n if n is None else n, d)


def undecided(rows: int) -> Undecided:
    collected = integers(1, rows), integers(1), meta(1, rows), integers(1, rows)
    return Undecided(*collected, integers(1, rows), integers(1))

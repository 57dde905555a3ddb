"""The code of the three processes of test_distributed.py, and the inputs that both need.

Groups of one, two and three processes share the same tokens in different ways. The group of two has
the ranks 1 and 2, which are its ranks 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, product
from pathlib import Path

import torch
import torch.distributed as dist
from cases import clusters
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import scclip_fast as sf
from scclip_fast import distributed
from scclip_fast.chunked import tiles
from scclip_fast.distributed import kernel_search
from scclip_fast.kernels.knn_details import table

WORLD, LARGE = 3, (1500, 64)
N, D, K = 131, 24, 5
WORKSPACES = {"pieces": 2**14, "whole": tiles.WORKSPACE_BYTES}  # several tiles a rank, or one
KINDS = ("clusters", "far", "ties", "broken")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Every dtype, every kind in the dtypes that sums have and one that they have not.
COMBINATIONS = [
    *product(["pieces"], ["clusters"], DTYPES),
    *product(["pieces"], KINDS[1:], (torch.bfloat16, torch.float32)),
    ("whole", "clusters", torch.float32),
]

#: By kind of tokens, the dtype and op that the kernels run. A tile and a piece have 128 rows, the
#: least for half precision, and the last ones have fewer than K. Of 96 channels, the two kernels
#: that measure a row with and without a certificate make different sums.
KERNEL_CASES = {
    "far": (torch.float32, "knn"),
    "ties": (torch.bfloat16, "knn"),
    "broken": (torch.float16, "scclip"),
}
KERNEL_STEP, KERNEL_WIDTH = 128, 96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Numbers of rows of all ranks but the last, by the size of the group. The cases take them in turn.
SHARES = {1: [()], 2: [(70,), (1,), (N,)], 3: [(17, 60), (1, 0), (65, 65), (0, 0)]}

OPS = {
    "knn": lambda lib, values, x, **group: lib.knn(x, K, **group),
    "scclip": lambda lib, values, x, **group: [lib.lof_scores(x, K, **group)],
    "breunig": lambda lib, values, x, **group: [lib.lof_scores(x, K, variant="breunig", **group)],
    "aggregate": lambda lib, values, x, **group: [lib.aggregate(values, x, 0.3, **group)],
}


def tokens(kind: str, width: int = D) -> Tensor:
    if kind == "ties":
        return torch.randint(3, (N, 3)).double().repeat(1, width // 3) + 100
    x = clusters(1, N, width)[0].double()
    if kind == "far":  # products leave half of the rows undecided, whichever rank holds them
        x[N // 2 :] += 1000
    if kind == "broken":
        x[:, :2] += 300
        x[0, 0], x[N // 2], x[-1, 3] = torch.nan, torch.inf, -torch.inf
    return x


def cases() -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Yields (name, workspace, values, features). Every other tensor of features is strided."""
    for turn, (where, kind, dtype) in enumerate(COMBINATIONS):
        x = tokens(kind).to(dtype)
        x = x.mT.contiguous().mT if turn % 2 else x
        values = torch.randn(N, 5).to(DTYPES[turn // 2 % 4])
        yield f"{where}-{kind}-{str(dtype).removeprefix('torch.')}", WORKSPACES[where], values, x


def results(ops: Iterable[str], values: Tensor, x: Tensor, turn: int, groups: dict) -> dict:
    """The results by the size of the group and by op, for this rank's rows of values and x.

    The ranks take turns to be the group of one. The first rank also has, as "op", the results of
    the ops of one process.
    """
    rank, found = dist.get_rank(), {}
    for world, group in groups.items():
        place = dist.get_rank(group)
        if place < 0 or (world == 1 and rank != turn % WORLD):
            continue
        bounds = [0, *accumulate(SHARES[world][turn % len(SHARES[world])])]
        own = slice(bounds[place], [*bounds[1:], len(x)][place])
        found[world] = _results(ops, distributed, values[own], x[own], group=group)
    if rank == 0:
        found["op"] = _results(ops, sf, values, x)
    return found


def _results(ops: Iterable[str], module, values, x, **group) -> dict[str, list[Tensor]]:
    return {op: [out.cpu() for out in OPS[op](module, values, x, **group)] for op in ops}


def by_kernels(groups: dict) -> dict[str, dict]:
    """The results of the cases whose pieces the kernels search."""
    found, before = {}, (kernel_search.ROWS, kernel_search.PIECE_BYTES)
    for turn, (kind, (dtype, op)) in enumerate(KERNEL_CASES.items()):
        x = tokens(kind, KERNEL_WIDTH).to(DEVICE, dtype)
        kernel_search.ROWS = KERNEL_STEP
        kernel_search.PIECE_BYTES = KERNEL_STEP * KERNEL_WIDTH * x.itemsize
        with sf.backend("triton"):
            found[f"kernels-{kind}"] = results([op], x, x, turn, groups)
    kernel_search.ROWS, kernel_search.PIECE_BYTES = before
    return found


def many_neighbors(rank: int) -> list[bool]:
    """True for each result of 128 neighbours that the backends share, as the kernels take 127."""
    x, found = tokens("clusters").tensor_split(WORLD)[rank].to(DEVICE, torch.float32), []
    for name in ("triton", "torch"):
        with sf.backend(name):
            found.append(distributed.knn(x, 128))
    return [torch.equal(*both) for both in zip(*found, strict=True)]


@contextmanager
def workspace(size: int) -> Iterator[None]:
    before, tiles.WORKSPACE_BYTES = tiles.WORKSPACE_BYTES, size
    yield
    tiles.WORKSPACE_BYTES = before


class Largest(TorchFunctionMode):
    """Counts the numbers of the largest tensor that is made in its context."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.numel = max(self.numel, *made, 0)
        return out


def largest() -> dict[str, int]:
    """The numbers in the largest tensor of each op, for `LARGE` tokens in equal shares."""
    tokens, width = LARGE
    x, found = torch.randn(tokens // WORLD, width), {}
    calls = {
        "knn": lambda: distributed.knn(x, K),
        "lof_scores": lambda: distributed.lof_scores(x, K),
        "aggregate": lambda: distributed.aggregate(x, x),
    }
    for name, call in calls.items():
        with workspace(2**16), Largest() as seen:
            call()
        found[name] = seen.numel
    return found


def error_of(call: Callable[[], object]) -> tuple[str, str]:
    """The type and the text of the error that a call raises, or two empty texts."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def with_backend(name: str, call: Callable[[], object]) -> object:
    with sf.backend(name):
        return call()


def faults(rank: int, pair: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """Calls that must fail on every rank. A call that hangs ends with the group's timeout."""
    x = torch.randn(10, D)
    last = rank == WORLD - 1
    knn, aggregate = distributed.knn, distributed.aggregate
    return {
        "k": lambda: knn(x, 5 + last),
        "k that compares equal": lambda: knn(x, 5.0 if last else 5),
        "width": lambda: knn(x[:, last:], 5),
        "dtype": lambda: knn(x.double() if last else x, 5),
        "width of values": lambda: aggregate(x[:, last:], x),
        "beta": lambda: aggregate(x, x, 0.4 + last),
        "variant": lambda: distributed.lof_scores(x, 5, variant="breunig" if last else "scclip"),
        "op": lambda: distributed.lof_scores(x, 5) if last else knn(x, 5),
        "tokens": lambda: knn(x.long() if last else x, 5),
        "rank": lambda: knn(x[None] if last else x, 5),
        "no channel": lambda: knn(x[:, :0], 5),
        "rows": lambda: aggregate(x[last:], x),
        "device": lambda: knn(x.to("meta") if last else x, 5),
        "gradient": lambda: aggregate(x, x.clone().requires_grad_(last)),
        "k of 30": lambda: knn(x, 30),
        "no k": lambda: knn(x, 2.5),
        "no beta": lambda: aggregate(x, x, float("nan")),
        "no variant": lambda: distributed.lof_scores(x, 5, variant="textbook"),
        "no rows": lambda: knn(x[:0], 5),
        "group": lambda: knn(x, 50, group=pair),
        "backend": lambda: with_backend("reference" if last else "torch", lambda: knn(x, 5)),
        "no kernels": lambda: with_backend("triton", lambda: knn(x.double(), 5)),
    }


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        table.MOST_PROGRAMS = 8  # as in conftest.py
    torch.manual_seed(0)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    alone = [dist.new_group([i]) for i in range(WORLD)]
    pair = dist.new_group([1, 2])
    groups = {1: alone[rank], 2: pair, 3: None}
    found = {}
    for turn, (name, size, values, x) in enumerate(cases()):
        with workspace(size), sf.backend("torch"):
            found[name] = results(OPS, values, x, turn, groups)
    found |= by_kernels(groups)
    found["many neighbors"] = many_neighbors(rank)
    found["largest"] = largest()
    found["gradient"] = gradients()
    found["faults"] = {name: error_of(call) for name, call in faults(rank, pair).items()}
    found["afterwards"] = distributed.knn(torch.arange(3.0)[:, None] + 3 * rank, 1)[1].tolist()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def gradients() -> list[bool]:
    """True for each result that requires a gradient, of tokens that do."""
    x = torch.randn(9, D, requires_grad=True)
    with torch.no_grad():
        means = distributed.aggregate(x, x)
    made = (*distributed.knn(x, K), distributed.lof_scores(x, K), means)
    return [each.requires_grad for each in made]

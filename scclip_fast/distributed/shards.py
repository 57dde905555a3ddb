"""The rows of one image that the ranks of a group share, and their travel between ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import resolve
from ..chunked.tiles import spans
from ..ops import _check


def rows_of(*, differentiable: bool = True, **tensors: Tensor) -> dict[str, Tensor]:
    """The tensors, detached, after a check that each is floating (n, D) with the same n."""
    for name, tensor in tensors.items():
        _check.floating(name, tensor)
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got a tensor of layout {tensor.layout}")
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(
                f"{name} must be (n, D), the rows of one rank, with D of at least 1, got shape "
                f"{tuple(tensor.shape)}"
            )
        if not differentiable and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which is not computed: detach it")
    _check.same_device(**tensors)
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(f"all tensors must have as many rows, got {sizes}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def meet(
    group: dist.ProcessGroup | None, check: Callable[[], dict[str, Tensor]], **settings: object
) -> tuple[Shards, list[Tensor]]:
    """Checks the tensors on every rank, and returns their shards and the tensors.

    This is the one exchange of Python objects. It precedes every tensor and carries errors too,
    because a rank that raised alone would leave the others waiting. Settings are compared as texts,
    as 5 and 5.0 are equal, but only one of them is a k.

    Args:
        check: returns this rank's tensors by name, or raises.
        settings: arguments that must be the same on all ranks, as the backend must.

    Raises:
        ValueError: no process group, an error of another rank, or ranks that disagree.
        Exception: this rank's own error.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed has no process group: call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this process is in")
    tensors, error = {}, None
    try:
        tensors = check()
        settings["the backend"] = resolve(None, next(iter(tensors.values())))
    except Exception as own_error:
        error = own_error
    for name, tensor in tensors.items():
        settings |= {f"the dtype of {name}": tensor.dtype, f"the width of {name}": tensor.shape[1]}
        settings["the kind of device"] = tensor.device.type
    size = max(map(len, tensors.values()), default=0)
    reports: list[Any] = [None] * dist.get_world_size(group)
    report = (error and str(error), size, {name: repr(value) for name, value in settings.items()})
    dist.all_gather_object(reports, report, group)
    if error is not None:
        raise error
    for rank, (problem, _, _) in enumerate(reports):
        if problem is not None:
            raise ValueError(f"rank {rank} has an error: {problem}")
    for name, expected in reports[0][2].items():
        for rank, (_, _, other) in enumerate(reports):
            if other.get(name) != expected:
                raise ValueError(
                    f"all ranks must agree on {name}, got {expected} on rank 0 and "
                    f"{other.get(name)} on rank {rank}"
                )
    device = next(iter(tensors.values())).device
    shards = Shards(group, [size for _, size, _ in reports], device)
    if shards.total == 0:
        raise ValueError("at least one rank must have a row, got none on any")
    return shards, [*tensors.values()]


class Shards:
    """The N rows of one image, of which each rank of a group holds consecutive ones.

    Attributes:
        total: N.
        own_rows: the slice of this rank's rows.
    """

    def __init__(self, group: dist.ProcessGroup | None, sizes: list[int], device: torch.device):
        self._group, self._rank, self._device = group, dist.get_rank(group), device
        self._starts = [0, *accumulate(sizes)]
        self.total = self._starts[-1]
        self.own_rows = slice(*self._starts[self._rank : self._rank + 2])

    def pieces(self, step: int, *tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields all rows of each of the tensors (n, ...), as (first row, pieces (1, `step`, ...)).

        The next piece travels while one is in use. Every rank has to take all pieces.
        """
        travelling: deque[tuple[int, list[Tensor], list[Any]]] = deque()
        for span in spans(self.total, step):
            travelling.append((span.start, *self._broadcast(span, tensors)))
            if len(travelling) == 2:
                yield _arrived(*travelling.popleft())
        yield _arrived(*travelling.pop())

    def all_rows(self, tensor: Tensor) -> Tensor:
        """All rows (1, N) of a tensor (n,), on every rank."""
        ((_, (rows,)),) = self.pieces(self.total, tensor)
        return rows

    def rows_at(self, positions: Tensor, x: Tensor) -> Tensor:
        """The rows (1, p, D) at some positions (p,) among all; x (n, D) are this rank's rows."""
        is_own = (positions >= self.own_rows.start) & (positions < self.own_rows.stop)
        rows = x.new_zeros(len(positions), x.shape[1])
        rows[is_own] = x[positions[is_own] - self.own_rows.start]
        dist.all_reduce(rows, group=self._group)  # exact: every other rank has zeros
        return rows[None]

    def any(self, condition: bool) -> bool:
        """True on all ranks if the condition holds on one of them."""
        flag = torch.tensor([int(condition)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def whole_tiles(self, x: Tensor, step: int) -> tuple[Tensor, int, slice]:
        """The tiles of `step` rows that hold at least one of this rank's rows x (n, D).

        This rank's rows, repeated, stand where the rows of other ranks are: a row of zeros may lie
        far from all tokens, and would then be searched longer than any token.

        Returns these tiles (1, m, D), contiguous, the index of their first row, and the slice of
        this rank's rows in them. A rank without rows has no tile, and m is 0.
        """
        start, stop = self.own_rows.start, self.own_rows.stop
        if start == stop:
            return x.unsqueeze(0), start, slice(0)
        first = start // step * step
        last = min(self.total, -(-stop // step) * step)
        places = torch.arange(first - start, last - start, device=x.device) % len(x)
        kept = slice(start - first, stop - first)
        return x.index_select(0, places).unsqueeze(0), first, kept

    def _broadcast(
        self, span: slice, tensors: tuple[Tensor, ...]
    ) -> tuple[list[Tensor], list[Any]]:
        """Empty pieces for the rows `span` of each tensor, and the broadcasts that fill them."""
        pieces = [tensor.new_empty(span.stop - span.start, *tensor.shape[1:]) for tensor in tensors]
        works = []
        for owner, (start, stop) in enumerate(pairwise(self._starts)):
            first, last = max(start, span.start), min(stop, span.stop)
            for tensor, piece in zip(tensors, pieces, strict=True) if first < last else ():
                owner_rows = piece[first - span.start : last - span.start]
                if owner == self._rank:
                    owner_rows.copy_(tensor[first - start : last - start])
                # Broadcast as bytes, because not every backend supports every dtype.
                owner_rows = owner_rows.view(torch.uint8)
                work = dist.broadcast(owner_rows, group_src=owner, group=self._group, async_op=True)
                works.append(work)
        return pieces, works


def _arrived(first: int, pieces: list[Tensor], works: list[Any]) -> tuple[int, list[Tensor]]:
    for work in works:
        work.wait()
    return first, [piece[None] for piece in pieces]

"""The k smallest numbers of each row, in a fixed order, which torch.topk does not have."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

GROUP = 32  # columns whose minimum `smallest_grouped` reads before it reads any of them singly
KEYS = 2**20  # keys of one step on a CPU without numpy
HAS_NUMPY = find_spec("numpy") is not None


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of the last dimension, ascending, and their positions; equal: the earlier.

    Args:
        values: float32 or float64, not NaN.
    """
    if values.device.type == "cpu" and HAS_NUMPY:
        from .numpy_topk import smallest_by_numpy

        return smallest_by_numpy(values, k)
    if values.dtype != torch.float32:
        ordered, positions = values.sort(dim=-1, stable=True)
        return ordered[..., :k], positions[..., :k]
    rows, columns = values.flatten(0, -2), values.shape[-1]
    on_cpu = values.device.type == "cpu"
    steps = rows.split(max(1, KEYS // columns)) if on_cpu else [rows]
    positions = torch.cat([_smallest_positions(step, k) for step in steps])
    positions = positions.view(*values.shape[:-1], k)
    return values.gather(-1, positions), positions


def _smallest_positions(values: Tensor, k: int) -> Tensor:
    """The positions of the k smallest float32 of each row, in the order of `smallest`."""
    bits = values.view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # in the order of the values
    keys = ordered.long().bitwise_left_shift_(32)
    keys |= torch.arange(values.shape[-1], device=values.device)
    return keys.topk(k, largest=False).values & 0xFFFFFFFF


def smallest_grouped(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`smallest` in two steps, because the k smallest lie in the k groups of the smallest minima.

    The first step reads each number once, the second k groups and not the whole row. The number of
    columns is a multiple of `GROUP`. numpy is faster in one step.
    """
    groups = values.unflatten(-1, (-1, GROUP))
    if groups.shape[-2] <= k or (values.device.type == "cpu" and HAS_NUMPY):
        return smallest(values, min(k, values.shape[-1]))
    chosen = smallest(groups.amin(dim=-1), k)[1].sort(dim=-1).values
    row = torch.arange(chosen[..., 0].numel(), device=values.device).view_as(chosen[..., :1])
    members = groups.reshape(-1, GROUP).index_select(0, (row * groups.shape[-2] + chosen).flatten())
    best, position = smallest(members.view(*chosen.shape[:-1], -1), k)
    return best, chosen.gather(-1, position // GROUP) * GROUP + position % GROUP

"""Processes that share the work on many images, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(days=7)  # the first process to finish waits for the last


class Ranks(NamedTuple):
    """The number of this process and the number of processes that share the work.

    Process r takes the items r, r + world_size, ... of a list.
    """

    rank: int = 0
    world_size: int = 1

    def wait(self) -> None:
        """Waits until every process has reached this call."""
        if self.world_size > 1:
            dist.barrier()

    def total(self, count: int, device: torch.device) -> int:
        """Returns the sum of the counts of all processes, on each of them."""
        if self.world_size == 1:
            return count
        counts = torch.tensor(count, device=device)
        dist.all_reduce(counts)
        return int(counts)


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes that torchrun started; without torchrun, this process is alone.

    They communicate through NCCL on CUDA, else through Gloo.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        ranks = Ranks(dist.get_rank(), world_size)
        yield ranks
        ranks.wait()  # a process that leaves early may abort one that still communicates
    finally:
        dist.destroy_process_group()

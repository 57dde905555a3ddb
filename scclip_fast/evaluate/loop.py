"""The loop over the images of a data set, which several processes share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .datasets import Dataset
from .files import DataError
from .metric import confusion_matrix
from .record import RunRecord, result

_TIMEOUT = timedelta(days=7)  # the first process to finish waits for the last


class Ranks(NamedTuple):
    """The number of this process and the number of processes that share the work."""

    rank: int = 0
    world_size: int = 1

    def wait(self) -> None:
        """Waits until every process has reached this call."""
        if self.world_size > 1:
            dist.barrier()


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
        yield Ranks(dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()


def run(
    segmenter: Callable[[Image.Image], Tensor],
    dataset: Dataset,
    record: RunRecord,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
) -> None:
    """Segments this process's share of the data set: each i with i % world_size == rank.

    Images with a result in the record are skipped, and failures are tried again. An image that
    cannot be read gives one line on stderr and an entry of its failure.

    Args:
        segmenter: maps an image to class indices (H, W) of the image's size.
        dataset: the images and their labels.
        record: receives the results.
        ranks: the number of this process and of all processes.

    Raises:
        SettingsChangedError: the record holds results of other settings.
    """
    entries = record.read()
    finished = {name for name, entry in entries.items() if "error" not in entry}
    share = range(ranks.rank, len(dataset), ranks.world_size)
    todo = [i for i in share if dataset.names[i] not in finished]
    bar = tqdm(
        todo,
        initial=len(share) - len(todo),
        total=len(share),
        unit="image",
        disable=ranks.rank > 0 or None,  # None: where stderr is no terminal
    )
    with record.appending(ranks.rank) as append, bar:
        for i in bar:
            start = time.perf_counter()
            try:
                name, image, labels = dataset[i]
            except DataError as error:
                append({"name": dataset.names[i], "error": str(error)})
                tqdm.write(f"skipped {dataset.names[i]}: {error}", file=sys.stderr)
                continue
            confusion = confusion_matrix(segmenter(image), labels, dataset.num_classes)
            append(result(name, confusion, time.perf_counter() - start))

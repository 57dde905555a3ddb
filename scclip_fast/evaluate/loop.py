"""One image after the other through a segmenter, shared out among processes."""

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

from .datasets import DataError, FolderDataset, Scenes
from .metric import confusion_matrix
from .progress import Progress, result

_PATIENCE = timedelta(days=7)  # the first process to finish waits for the last


class Ranks(NamedTuple):
    """This process among those that share the work."""

    rank: int = 0
    world_size: int = 1

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone; NCCL on CUDA, else Gloo."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_PATIENCE, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()


def run(
    segmenter: Callable[[Image.Image], Tensor],
    dataset: FolderDataset | Scenes,
    progress: Progress,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
) -> None:
    """Segment this process's share of the data set, each i with i % world_size == rank.

    What `progress` holds a result of is skipped, what failed is tried again. An image that can't be
    read is one line on stderr and a record of its failure.

    Args:
        segmenter: image -> class indices (H, W), of the image's size.
        dataset: the images and their labels.
        progress: where the results go.
        ranks: which share.

    Raises:
        SettingsChangedError: `progress` holds results of other settings.
    """
    known = progress.read()
    finished = {name for name, record in known.items() if "error" not in record}
    share = range(ranks.rank, len(dataset), ranks.world_size)
    todo = [i for i in share if dataset.names[i] not in finished]
    bar = tqdm(
        todo,
        initial=len(share) - len(todo),
        total=len(share),
        unit="image",
        disable=ranks.rank > 0 or None,  # None: where stderr is no terminal
    )
    with progress.appending(ranks.rank) as append, bar:
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

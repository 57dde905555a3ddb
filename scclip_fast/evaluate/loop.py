"""The loop over the images of a data set, which several processes share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..ranks import Ranks
from .datasets import Dataset
from .files import DataError
from .metric import confusion_matrix
from .record import RunRecord, result


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

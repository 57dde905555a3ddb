"""The loop over the images of a data set, which several processes share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..ranks import Ranks
from ..threads import ahead, batches
from .comparison import Comparison, Found
from .datasets import Dataset
from .files import DataError
from .metric import confusion_matrix
from .paired_dataset import Sample
from .record import RunRecord, result


def run(
    segmenter: Callable[[Image.Image], Tensor] | Comparison,
    dataset: Dataset,
    record: RunRecord,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    batch: int = 1,
) -> None:
    """Segments this process's share of the data set: each i with i % world_size == rank.

    Images with a result in the record are skipped, and failures are tried again. An image that
    cannot be read gives one line on stderr and an entry of its failure.

    Args:
        segmenter: maps an image to class indices (H, W) of the image's size; or a `Comparison`,
            whose entries have a result of each setting.
        dataset: the images and their labels.
        record: receives the results.
        ranks: the number of this process and of all processes.
        batch: the number of images that the segmenter gets in a list; 1 for single images.

    Raises:
        SettingsChangedError: the record holds results of other settings.
    """
    entries = record.read()
    finished = {name for name, entry in entries.items() if "error" not in entry}
    share = range(ranks.rank, len(dataset), ranks.world_size)
    todo = [i for i in share if dataset.names[i] not in finished]
    bar = tqdm(
        initial=len(share) - len(todo),
        total=len(share),
        unit="image",
        disable=ranks.rank > 0 or None,  # None: where stderr is no terminal
    )
    with record.appending(ranks.rank) as append, bar:
        for some in batches(ahead(dataset.__getitem__, todo, 2 * batch), batch):
            samples = []
            for i, future in some:
                try:
                    samples.append(future.result())
                except DataError as error:
                    append({"name": dataset.names[i], "error": str(error)})
                    tqdm.write(f"skipped {dataset.names[i]}: {error}", file=sys.stderr)
            for sample, found in zip(samples, _found(segmenter, samples), strict=True):
                append({"name": sample.name, **_entry(found, sample.labels, dataset.num_classes)})
            bar.update(len(some))


def _found(
    segmenter: Callable[[Image.Image], Tensor] | Comparison, samples: list[Sample]
) -> Iterator[Found | dict[str, Found]]:
    """Yields the labels of each image and their time, by setting if there are several."""
    if isinstance(segmenter, Comparison):
        yield from (segmenter(sample.image) for sample in samples)
        return
    start, images = time.perf_counter(), [sample.image for sample in samples]
    found = segmenter(images) if len(images) > 1 else map(segmenter, images)
    for labels in found:
        yield Found(labels, (time.perf_counter() - start) / len(images))


def _entry(found: Found | dict[str, Found], labels: np.ndarray, num_classes: int) -> dict:
    """Returns the result of an image, or that of each setting."""
    if isinstance(found, dict):
        return {"settings": {k: _entry(each, labels, num_classes) for k, each in found.items()}}
    return result(confusion_matrix(found.labels, labels, num_classes), found.seconds)

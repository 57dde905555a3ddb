"""The settings that results were published with, a row a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import datasets
from .datasets import FolderDataset, Scenes


@dataclass(frozen=True)
class Protocol:
    """How a data set is segmented; see `PublishedSegmenter` for the rules that all have in common.

    Attributes:
        name: of the benchmark.
        dataset: opens it: dataset(root, limit).
        short_side: of the resized image, in pixels; None for the image's own size.
        logit_scale: of the cosine similarities in the softmax.
        prob_thd: pixels less sure than this become `background`.
        area_thd: classes on a smaller share of the foreground become `background`.
        background: the index of that class, or None.
    """

    name: str
    dataset: type[FolderDataset] | type[Scenes]
    short_side: int | None = 336
    logit_scale: float = 40.0
    prob_thd: float = 0.0
    area_thd: float | None = None
    background: int | None = None

    def class_names(self) -> list[str]:
        """The published prompts: a string a class, its synonyms after commas."""
        path = Path(__file__).with_name("names") / f"{self.name}.txt"
        return path.read_text(encoding="utf-8").splitlines()


# SC-CLIP's configs/cfg_*.py; its class lists are in names/.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("voc20", datasets.VOC20),
        Protocol(
            "voc21", datasets.VOC21, logit_scale=50, prob_thd=0.15, area_thd=0.1, background=0
        ),
        Protocol("context59", datasets.Context59),
        Protocol("context60", datasets.Context60, prob_thd=0.15, background=0),
        Protocol("coco-object", datasets.COCOObject, logit_scale=55, prob_thd=0.35, background=0),
        Protocol("coco-stuff", datasets.COCOStuff),
        Protocol("cityscapes", datasets.Cityscapes, short_side=560),
        Protocol("ade20k", datasets.ADE20K),
        Protocol("scenes", datasets.Scenes, short_side=None),  # ours, at the model's own size
    )
}

"""The settings of the published results, a row for each benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from . import datasets
from .datasets import Dataset


@dataclass(frozen=True)
class Protocol:
    """The settings of a benchmark. `PublishedSegmenter` has the rules that all have in common.

    Attributes:
        name: the name of the benchmark.
        dataset: the class of the data set; dataset(root, limit, allow_missing) opens it.
        short_side: the shorter side of the resized image, in pixels; None keeps the image's size.
        logit_scale: the factor of the cosine similarities in the softmax.
        prob_thd: pixels whose largest probability is below this become `background`.
        area_thd: classes that have at most this share of the foreground are removed; None removes
            no class.
        background: the index of the background's class; None for benchmarks without one.
    """

    name: str
    dataset: Callable[..., Dataset]
    short_side: int | None = 336
    logit_scale: float = 40.0
    prob_thd: float = 0.0
    area_thd: float | None = None
    background: int | None = None

    def thresholds(self) -> dict:
        """Returns the arguments of `PublishedSegmenter` that the benchmark sets."""
        return {field.name: getattr(self, field.name) for field in fields(Protocol)[2:]}

    def class_names(self) -> list[str]:
        """Returns the published prompts: a string a class, its synonyms after commas."""
        path = Path(__file__).with_name("names") / f"{self.name}.txt"
        return path.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class OwnProtocol(Protocol):
    """The settings for a user's own data set.

    Attributes:
        prompts: a string a class, its synonyms after commas.
    """

    prompts: tuple[str, ...] = ()

    def class_names(self) -> list[str]:
        """Returns the prompts."""
        return list(self.prompts)


# From SC-CLIP's configs/cfg_*.py; the class lists are in names/.
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
        # Not published: the drawn scenes of this package, at their own size.
        Protocol("scenes", datasets.Scenes, short_side=None),
    )
}

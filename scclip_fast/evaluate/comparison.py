"""Several settings of one frozen model, which share the work that they have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..clip import SCCLIPConfig
from ..clip.shared_layers import SharedLayers
from ..sam3 import Sam3CalibrationConfig
from ..sam3.config import STAGES, TRUNK_STAGES
from ..segment import Sam3Segmenter, Segmenter

if TYPE_CHECKING:
    from PIL import Image

_OTHER_STAGES = dict.fromkeys(set(STAGES) - set(TRUNK_STAGES), False)


class Found(NamedTuple):
    """The result of one setting for an image."""

    labels: Tensor  # (H, W), class indices
    seconds: float  # without the shared work, which the first setting that needs it does


@dataclass(frozen=True)
class Comparison:
    """Segments an image by one setting after the other.

    Attributes:
        settings: what switches the segmenter to each setting, by the setting's name.
        segment: maps an image to class indices (H, W), by the present setting.
        forget: drops the shared results of an image.
    """

    settings: Mapping[str, Callable[[], None]]
    segment: Callable[[Image.Image], Tensor]
    forget: Callable[[], None]

    def __call__(self, image: Image.Image) -> dict[str, Found]:
        """Returns the result of each setting for an image."""
        return dict(self._each(image))

    def _each(self, image: Image.Image) -> Iterator[tuple[str, Found]]:
        try:
            for name, choose in self.settings.items():
                start = time.perf_counter()
                choose()
                labels = self.segment(image)
                yield name, Found(labels, time.perf_counter() - start)
        finally:
            self.forget()


def compare_clip(
    segmenter: Segmenter, settings: Mapping[str, tuple[str, SCCLIPConfig]]
) -> Comparison:
    """Compares methods and configurations of a CLIP: one pass through all blocks but the last.

    Args:
        segmenter: its encoder is a `SharedLayers`, with a proxy if a method needs one.
        settings: the method and the configuration of each setting.
    """
    encoder = segmenter.encoder
    assert isinstance(encoder, SharedLayers)

    def choose(method: str, config: SCCLIPConfig) -> None:
        encoder.method, encoder.config = method, config

    choices = {name: partial(choose, *setting) for name, setting in settings.items()}
    return Comparison(choices, segmenter, encoder.forget)


class SharedTrunk(Sam3Segmenter):
    """A Sam3Segmenter that keeps what the vision encoder finds in an image until `forget`.

    Settings with the same stages in the trunk share its pass: set `config` between calls with the
    same image.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.forget()

    def forget(self) -> None:
        """Drops what the vision encoder found."""
        self._kept: dict[Sam3CalibrationConfig | None, tuple] = {}

    def _encode_image(self, image: Tensor) -> Any:
        calibrated = self.config is not None and self.config.calibrates_trunk
        trunk = replace(self.config, **_OTHER_STAGES) if calibrated else None
        if trunk not in self._kept:
            self._kept[trunk] = super()._encode_image(image), self.outliers
        vision, self.outliers = self._kept[trunk]
        return vision


def compare_sam3(
    labels: Sam3Labels, settings: Mapping[str, Sam3CalibrationConfig | None]
) -> Comparison:
    """Compares calibrations of a SAM3: one pass through the trunk for those that agree about it.

    Args:
        labels: the labels of a data set, by a `SharedTrunk`.
        settings: the calibration of each setting; None for the frozen model.
    """
    segmenter = labels.segmenter
    assert isinstance(segmenter, SharedTrunk)
    choices = {
        name: partial(setattr, segmenter, "config", config) for name, config in settings.items()
    }
    return Comparison(choices, labels, segmenter.forget)


class Sam3Labels:
    """The labels of a data set's classes by a Sam3Segmenter.

    A data set with a background has it where no class reaches `prob_thd`, and where one of the
    background's names, which are prompts of one class, has the best score. The word "background"
    itself is no prompt, and a name that another class has is that class's. Without a background
    every pixel gets the best class.

    Args:
        make: makes the segmenter of classes and `prob_thd`.
        prompts: a string a class of the data set, with commas between synonyms.
        background: the index of the background's class, or None.
        prob_thd: the threshold of the background, see `Sam3Segmenter`; without one it is 0.
    """

    def __init__(
        self,
        make: Callable[..., Sam3Segmenter],
        prompts: list[str],
        background: int | None,
        prob_thd: float = 0.5,
    ) -> None:
        names = [[name.strip() for name in prompt.split(",")] for prompt in prompts]
        if background is not None:
            others = {
                name.casefold()
                for index, synonyms in enumerate(names)
                for name in synonyms
                if index != background
            } | {"background"}
            own = names[background]
            names[background] = [name for name in own if name.casefold() not in others]
        used = [index for index, synonyms in enumerate(names) if synonyms]
        self.segmenter = make(
            [", ".join(names[index]) for index in used],
            prob_thd=0.0 if background is None else prob_thd,
        )
        # No pixel is below a threshold of 0, so that its class does not matter.
        self._owners = torch.tensor([background or 0, *used])

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the class indices (H, W) of an image."""
        return self._owners[self.segmenter(image)]

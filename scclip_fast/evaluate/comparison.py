"""Several settings of one frozen model, which share the work that they have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..clip import SCCLIPConfig
from ..clip.model import METHODS, PROXY_METHODS
from ..clip.shared_layers import SharedLayers, timed
from ..sam3 import Sam3CalibrationConfig, calibrate
from ..sam3.config import STAGES, TRUNK_STAGES
from ..segment import Sam3Segmenter, Segmenter

if TYPE_CHECKING:
    from PIL import Image

_OTHER_STAGES = dict.fromkeys(set(STAGES) - set(TRUNK_STAGES), False)


class Found(NamedTuple):
    """The result of one setting for an image."""

    labels: Tensor  # (H, W), class indices
    seconds: float  # that the setting takes alone: its own work and all work that it shares


class Shared(Protocol):
    """The results that settings share."""

    saved: float  # the seconds that sharing has saved

    def forget(self) -> None:
        """Drops the results."""


@dataclass(frozen=True)
class Comparison:
    """Segments an image by one setting after the other.

    Attributes:
        settings: what switches the segmenter to each setting, by the setting's name.
        order: the names in the order in which settings run: those that share work are neighbours.
        segment: maps an image to class indices (H, W), by the present setting.
        shared: the results of an image that settings share.
    """

    settings: Mapping[str, Callable[[], None]]
    order: Sequence[str]
    segment: Callable[[Image.Image], Tensor]
    shared: Shared

    def __call__(self, image: Image.Image) -> dict[str, Found]:
        """Returns the result of each setting for an image, in the order of `settings`."""
        found = dict(self._each(image))
        return {name: found[name] for name in self.settings}

    def _each(self, image: Image.Image) -> Iterator[tuple[str, Found]]:
        try:
            for name in self.order:
                start, saved = time.perf_counter(), self.shared.saved
                self.settings[name]()
                labels = self.segment(image)
                seconds = time.perf_counter() - start + self.shared.saved - saved
                yield name, Found(labels, seconds)
        finally:
            self.shared.forget()


def compare_clip(
    segmenter: Segmenter, settings: Mapping[str, tuple[str, SCCLIPConfig]]
) -> Comparison:
    """Compares methods and configurations of a CLIP: one pass through all blocks but the last.

    Args:
        segmenter: its encoder is a `SharedLayers`, with a proxy if a method needs one.
        settings: the method and the configuration of each setting.

    Raises:
        TypeError: the encoder is of another class.
        ValueError: there are no settings, a method is unknown or lacks its proxy, or a
            configuration does not fit the model's depth.
    """
    encoder = segmenter.encoder
    if not isinstance(encoder, SharedLayers):
        kind = type(encoder).__name__
        raise TypeError(f"the segmenter's encoder must be a SharedLayers, got {kind}")
    _check_some(settings)
    allowed = [*METHODS, *(PROXY_METHODS if encoder.proxy is not None else ())]
    for method, config in settings.values():
        if method not in allowed:
            known = ", ".join(allowed)
            raise ValueError(f"a method of this encoder must be one of {known}, got {method!r}")
        config.check(len(encoder.tower.blocks))

    def choose(method: str, config: SCCLIPConfig) -> None:
        encoder.method, encoder.config = method, config

    choices = {name: partial(choose, *setting) for name, setting in settings.items()}
    return Comparison(choices, tuple(choices), segmenter, encoder)


class _Encoded(NamedTuple):
    """The features of an image, and what they depend on."""

    image: Tensor
    trunk: Sam3CalibrationConfig | None
    vision: Any
    outliers: Any
    seconds: float


class SharedTrunk(Sam3Segmenter):
    """A Sam3Segmenter that keeps the features of its last image until `forget`.

    Settings with the same stages in the trunk share its pass: set `config` between calls with the
    same image. At full size the features take hundreds of megabytes, so those of one pass are kept.

    Attributes:
        saved: the seconds that kept features have saved.
    """

    saved: float = 0.0
    _kept: _Encoded | None = None

    def forget(self) -> None:
        """Drops the features."""
        self._kept = None

    def _encode_image(self, image: Tensor) -> Any:
        trunk, kept = _trunk(self.config), self._kept
        if kept is not None and kept.trunk == trunk and torch.equal(kept.image, image):
            self.saved += kept.seconds
            self.outliers = kept.outliers
            return kept.vision
        kept = self._kept = None  # their memory is free before the trunk runs
        vision, seconds = timed(super()._encode_image, image, self.model.device)
        # A clone, because the caller may write the next image into the same memory.
        self._kept = _Encoded(image.clone(), trunk, vision, self.outliers, seconds)
        return vision


def _trunk(config: Sam3CalibrationConfig | None) -> Sam3CalibrationConfig | None:
    """Returns what the features of an image depend on: the stages of the trunk, None for none."""
    calibrated = config is not None and config.calibrates_trunk
    return replace(config, **_OTHER_STAGES) if calibrated else None


def compare_sam3(
    labels: Sam3Labels, settings: Mapping[str, Sam3CalibrationConfig | None]
) -> Comparison:
    """Compares calibrations of a SAM3: one pass through the trunk for those that agree about it.

    Args:
        labels: the labels of a data set, by a `SharedTrunk`.
        settings: the calibration of each setting; None for the frozen model.

    Raises:
        TypeError: the segmenter is of another class, or a configuration is.
        ValueError: there are no settings, or a configuration does not fit the model.
    """
    segmenter = labels.segmenter
    if not isinstance(segmenter, SharedTrunk):
        kind = type(segmenter).__name__
        raise TypeError(f"the segmenter of the labels must be a SharedTrunk, got {kind}")
    _check_some(settings)
    for config in settings.values():
        if config is not None:
            calibrate(segmenter.model, config).remove()
    choices = {
        name: partial(setattr, segmenter, "config", config) for name, config in settings.items()
    }
    trunks = list(map(_trunk, settings.values()))
    first = {name: trunks.index(_trunk(config)) for name, config in settings.items()}
    return Comparison(choices, sorted(choices, key=first.__getitem__), labels, segmenter)


def _check_some(settings: Mapping[str, object]) -> None:
    if not settings:
        raise ValueError("there must be at least one setting, got none")


class Sam3Labels:
    """The labels of a data set's classes by a Sam3Segmenter.

    A data set with a background has it where no class reaches `prob_thd`, where the best two are
    closer than `margin_thd`, and where one of the background's names, which are prompts of one
    class, has the best score. The word "background"
    itself is no prompt, and a name that another class has is that class's. Without a background
    every pixel gets the best class.

    Args:
        make: makes the segmenter of classes, `prob_thd` and `margin_thd`.
        prompts: a string a class of the data set, with commas between synonyms.
        background: the index of the background's class, or None.
        prob_thd, margin_thd: the thresholds of the background, see `Sam3Segmenter`; without a
            background they are 0.
    """

    def __init__(
        self,
        make: Callable[..., Sam3Segmenter],
        prompts: list[str],
        background: int | None,
        prob_thd: float = 0.5,
        margin_thd: float = 0.0,
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
            margin_thd=0.0 if background is None else margin_thd,
        )
        # No pixel is below a threshold of 0, so that its class does not matter.
        self._owners = torch.tensor([background or 0, *used])

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the class indices (H, W) of an image."""
        return self._owners[self.segmenter(image)]

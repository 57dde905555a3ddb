"""The segmenter that runs a SAM3, of transformers or of Meta's package."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clip.prompts import class_names
from ..ops import _check, upsampled_labels
from ..sam3 import Sam3CalibrationConfig
from . import sam3_details
from .base import Band
from .image import LABEL_ROWS, ImageLike, to_tensor, upsampled
from .sam3_details import ClassDetails
from .sam3_heads import HEADS, Preview, check_heads
from .sam3_prompts import PromptedSam3

if TYPE_CHECKING:  # of the extra sam3
    from torch import nn
    from transformers import Sam3Processor

BACKGROUND = "background"
MAX_CLASSES = 1203  # those of LVIS; at full size their maps take 400 MB


class Sam3Segmenter(PromptedSam3):
    """Open-vocabulary segmentation with a frozen SAM3, calibrated or not.

    Every name is a prompt. The trunk runs once an image, the text encoder once a vocabulary, and
    the other parts once for each batch of prompts. At each pixel of SAM3's masks, which are
    288 x 288 at full size, the score of a prompt is

        presence * max(max over queries q of score_q * mask_q, semantic)

    where all four are probabilities in [0, 1], sigmoids of SAM3's logits. The score of a class is
    that of its best name. Scores are upsampled bilinearly to the image. A pixel belongs to the
    class with the best score, and to the first of classes with equal scores. The pixels whose best
    score is below `prob_thd`, or leads the second best by less than `margin_thd`, are background.
    Two published segmenters of whole vocabularies take this score: SegEarth-OV3, and ActiveSAM,
    which makes a small margin background.

    A large photo with 151 classes needs 50 MB for the maps and a few tensors of its own size.
    `probabilities` alone makes all maps at the photo's size: 14.5 GB for 151 classes and 24 million
    pixels.

    The model may be float32, bfloat16 or float16, and autocast may be on; scores are float32. On
    small random models the scores of a frozen model in bfloat16 or under autocast are within 0.01
    of those in float32, and within 0.001 in float16. Batches of another size change scores in
    float32 by less than 1e-5.

    Args:
        model: transformers' Sam3Model, or the Sam3Image of Meta's package, in evaluation mode. It
            must not be calibrated if `config` is given.
        processor: the Sam3Processor of the same package.
        classes: one entry a class, with commas between synonyms: "person, man, woman". There may
            be up to 1203 classes.
        config: the calibration; None leaves the model as it is.
        heads: which of the two heads the score has, "instance", "semantic" or both.
        presence: whether scores are multiplied by the presence.
        prob_thd: pixels whose best score is below this probability are background; 0 for none.
        margin_thd: pixels whose best score leads the second best by less than this difference of
            probabilities, in [0, 1], are background; 0 for none. With one class the second best
            score is 0.
        prompts_per_pass: the number of prompts in a batch; None for an estimate from the memory
            (see `sam3_heads.prompts_in_memory`), 32 at most.
        preview: settings of a cheap pass that chooses the classes to decode; None decodes all.

    Attributes:
        classes: "background", then the first name of each class. The probability of the background
            is one minus that of the best class.
        outliers: (h, w), bool, the outliers among the tokens of the last image; None without
            `trunk_repair`.
        left_out: the names of the classes that the preview left out of the last image.

    Raises:
        TypeError: the processor is of another package, or a setting has another type.
        ValueError: the model is no SAM3 or lacks a head that a setting needs; there are no classes
            or more than 1203; a name is empty, repeated (upper and lower case do not count) or
            longer than the model's context; a class is called "background"; a setting is out of
            range; or the calibration does not fit the model (see `calibrate`).
    """

    left_out: list[str]

    def __init__(
        self,
        model: nn.Module,
        processor: Sam3Processor,
        classes: Sequence[str],
        config: Sam3CalibrationConfig | None = None,
        *,
        heads: Sequence[str] = HEADS,
        presence: bool = True,
        prob_thd: float = 0.5,
        margin_thd: float = 0.0,
        prompts_per_pass: int | None = None,
        preview: Preview | None = None,
    ) -> None:
        names = _class_names(classes)
        super().__init__(model, processor, config, names, prompts_per_pass)
        self.heads = check_heads(heads)
        _check.switch("presence", presence)
        self.presence = presence
        self.prob_thd = _check.number("prob_thd", prob_thd, 0, 1)
        self.margin_thd = _check.number("margin_thd", margin_thd, 0, 1)
        if preview is not None and not isinstance(preview, Preview):
            raise TypeError(f"preview must be a Preview or None, got {type(preview).__name__}")
        self.preview, self.left_out = preview, []
        self.classes = [BACKGROUND, *(synonyms[0] for synonyms in names)]
        self._runner.check(self.heads, presence or preview is not None)
        self._encode_text([name for synonyms in names for name in synonyms])

    def frozen(self) -> Sam3Segmenter:
        """Returns the same segmenter without the calibration; both share the model."""
        twin = copy.copy(self)
        twin.config = None
        return twin

    @torch.inference_mode()
    def details(self, image: ImageLike, min_score: float = 0.3) -> list[ClassDetails]:
        """Returns what the heads find of each class, in the order of `classes[1:]`.

        Args:
            image: as in `forward`.
            min_score: instances with a smaller score are dropped. The default is that of
                transformers' post-processing.

        Raises:
            TypeError, ValueError: as in `forward`, or min_score is not in [0, 1].
        """
        _check.number("min_score", min_score, 0, 1)
        pixels = to_tensor(image)
        found: dict[int, list] = {}
        with self._calibrated():
            vision = self._encode_image(pixels)
            chosen, presences = self._chosen(vision)
            for owners, heads in self._decoded(vision, chosen, "prompts"):
                for prompt, owner in enumerate(owners):
                    each = sam3_details.instances(heads, prompt, min_score, self.presence)
                    found.setdefault(owner, []).append(each)
        size = (pixels.shape[1], pixels.shape[2])
        grid = next(iter(found.values()))[0].size
        return [
            sam3_details.merged(name, found[index], size)
            if index in found
            else sam3_details.left_out(name, presences[index], grid)
            for index, name in enumerate(self.classes[1:])
        ]

    def _bands(self, images: list[Tensor]) -> Iterator[Iterator[Band]]:
        return map(self._bands_of, images)

    @torch.inference_mode()
    def _bands_of(self, image: Tensor) -> Iterator[Band]:
        maps = self._maps(image)
        for scores in upsampled(maps, (image.shape[1], image.shape[2])):
            yield self._labels(scores)

    def _label_bands(self, images: list[Tensor]) -> Iterator[Iterator[Tensor]]:
        # Only the margin needs a second score.
        if self.margin_thd > 0:
            return super()._label_bands(images)
        return map(self._label_bands_of, images)

    @torch.inference_mode()
    def _label_bands_of(self, image: Tensor) -> Iterator[Tensor]:
        labels, best = upsampled_labels(self._maps(image), (image.shape[1], image.shape[2]))
        for some, score in zip(labels.split(LABEL_ROWS), best.split(LABEL_ROWS), strict=True):
            yield (some.long() + 1).masked_fill_(score < self.prob_thd, 0)

    def _labels(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns labels (rows, W) and probabilities (classes, rows, W), the background first."""
        best, labels = scores.max(dim=0)
        background = best < self.prob_thd
        if self.margin_thd > 0:
            second = scores.scatter(0, labels[None], 0).amax(dim=0)
            background |= best - second < self.margin_thd
        labels = (labels + 1).masked_fill_(background, 0)
        # Bilinear weights may sum to slightly more than 1.
        return labels, torch.cat([(1 - best).clamp_(min=0)[None], scores])

    def _maps(self, image: Tensor) -> Tensor:
        """Returns the scores of classes (classes, h, w), float32, without the background."""
        with self._calibrated():
            vision = self._encode_image(image)
            finest = self._runner.finest(vision)
            shape = (len(self.classes) - 1, *finest.shape[-2:])
            maps = torch.zeros(shape, device=finest.device)
            chosen, _ = self._chosen(vision)
            for owners, heads in self._decoded(vision, chosen, "prompts"):
                for owner, score in zip(owners, heads.maps(self.heads, self.presence), strict=True):
                    maps[owner] = torch.maximum(maps[owner], score)
        return maps

    def _chosen(self, vision: Any) -> tuple[Sequence[int], list[float]]:
        """Returns the indices of the classes to decode, and the presence of each in the preview.

        Without a preview these are all classes, and there are no presences.
        """
        if self.preview is None:
            self.left_out = []
            return range(len(self.classes) - 1), []
        presences = [0.0] * (len(self.classes) - 1)
        coarse = self._runner.coarser(vision, self.preview.scale)
        for owners, heads in self._decoded(coarse, range(len(presences)), "preview"):
            assert heads.presence is not None  # the constructor checks it
            for owner, presence in zip(owners, heads.presence.tolist(), strict=True):
                presences[owner] = max(presences[owner], presence)
        chosen = self.preview.best(presences)
        names = enumerate(self.classes[1:])
        self.left_out = [name for index, name in names if index not in set(chosen)]
        return chosen, presences


def _class_names(classes: Sequence[str]) -> list[list[str]]:
    """Returns the names of each class, or raises ValueError."""
    names = class_names(classes, shared=False)
    if len(names) > MAX_CLASSES:
        raise ValueError(f"classes must be at most {MAX_CLASSES}, got {len(names)}")
    if BACKGROUND in (synonyms[0] for synonyms in names):
        raise ValueError(f"classes must not name the {BACKGROUND}, which every SAM3 adds")
    return names

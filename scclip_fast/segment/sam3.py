"""The segmenter that runs a SAM3 of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import progress
from ..clip.model import check_finite
from ..clip.prompts import class_names
from ..extras import needs
from ..sam3 import Sam3CalibrationConfig, calibrate
from .base import ImageSegmenter

with needs("clip"):
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

if TYPE_CHECKING:  # of the extra sam3
    from transformers import Sam3Model, Sam3Processor

BACKGROUND = "background"


class Sam3Segmenter(ImageSegmenter):
    """Open-vocabulary segmentation with a frozen SAM3, calibrated or not.

    Every name is a prompt, for which transformers' post-processing returns instances with scores.
    The probability of a class at a pixel is the score of the best instance of any of its names that
    covers the pixel; the probability of the background is one minus that of the best class. All of
    an image is one band.

    Args:
        model: a Sam3Model that is not calibrated.
        processor: its Sam3Processor.
        classes: one entry a class, with commas between synonyms: "person, man, woman".
        config: the calibration; None leaves the model frozen.

    Attributes:
        classes: "background", for pixels that no instance covers, and the first name of each class.
        outliers: (h, w), bool, the outliers among the tokens of the last image; None without
            `trunk_repair`.

    Raises:
        ValueError: there are no classes; a name is empty, repeated (upper and lower case do not
            count) or longer than the model's context; or a class is called "background".
    """

    def __init__(
        self,
        model: Sam3Model,
        processor: Sam3Processor,
        classes: Sequence[str],
        config: Sam3CalibrationConfig | None,
    ) -> None:
        super().__init__()
        self.prompts = class_names(classes, shared=False)  # the names of each class
        self.classes = [BACKGROUND, *(names[0] for names in self.prompts)]
        if BACKGROUND in self.classes[1:]:
            raise ValueError(f"classes must not name the {BACKGROUND}, which every SAM3 adds")
        self.model, self.processor, self.config = model, processor, config
        self.outliers: np.ndarray | None = None
        self._tokens = {
            name: processor(text=name, return_tensors="pt")
            for names in self.prompts
            for name in names
        }
        longest = model.config.text_config.max_position_embeddings
        for name, tokens in self._tokens.items():
            if (length := tokens.input_ids.shape[1]) > longest:
                raise ValueError(f"{name!r} is too long a prompt: {length} tokens of {longest}")

    def frozen(self) -> Sam3Segmenter:
        """Returns the same segmenter without the calibration; both share the model."""
        twin = copy.copy(self)
        twin.config = None
        return twin

    @torch.inference_mode()
    def _bands(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        calibration = nullcontext() if self.config is None else calibrate(self.model, self.config)
        with calibration, progress.shown_by(_search_bar):
            probabilities = self._probabilities(image)
        yield probabilities.argmax(dim=0), probabilities

    def _probabilities(self, image: Tensor) -> Tensor:
        """Returns float32 probabilities (classes, H, W), the background first."""
        photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        inputs = self.processor(images=photo, return_tensors="pt").to(self.model.device)
        embeds = self.model.get_vision_features(inputs.pixel_values.to(self.model.dtype))
        mask = getattr(embeds, "outlier_mask", None)
        self.outliers = None if mask is None else mask[0].cpu().numpy()
        size = (photo.height, photo.width)
        probabilities = torch.zeros(len(self.classes), *size, device=self.model.device)
        background, best = probabilities[0], probabilities[1:]
        prompts = [(index, name) for index, names in enumerate(self.prompts) for name in names]
        for index, name in tqdm(prompts, unit="prompt", leave=False, disable=None):
            for score, mask in self._instances(embeds, name, size):
                best[index] = torch.maximum(best[index], score * mask)
        torch.sub(1, best.amax(dim=0), out=background)
        return probabilities

    def _instances(
        self, embeds: Any, prompt: str, size: tuple[int, int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the score and the mask (H, W) of each instance of a prompt."""
        tokens = self._tokens[prompt].to(self.model.device)
        output = self.model(vision_embeds=embeds, **tokens)
        check_finite("logits and masks", output.pred_logits, output.pred_masks)
        (instances,) = self.processor.post_process_instance_segmentation(
            output, target_sizes=[size]
        )
        return zip(instances["scores"].float(), instances["masks"], strict=True)


def _search_bar(steps: list) -> Iterable:
    """Wraps the steps of a search for outliers in a progress bar, if there are several.

    The search among the mask head's 82,944 pixels takes long on a CPU.
    """
    if len(steps) == 1:
        return steps
    return tqdm(steps, desc="outliers of pixels", unit="tile", leave=False, disable=None)

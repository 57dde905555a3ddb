"""A SAM3 of either package with a vocabulary whose text features are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import progress
from ..extras import needs
from ..ops import _check
from ..sam3 import Sam3CalibrationConfig, calibrate
from ..sam3.calibrate import adapter
from .base import ImageSegmenter
from .sam3_heads import Heads, prompts_in_memory

with needs("clip"):
    import numpy as np
    from tqdm import tqdm

if TYPE_CHECKING:  # of the extra sam3
    from transformers import Sam3Processor

_TEXTS = 64  # names whose text features are computed in one batch


class PromptedSam3(ImageSegmenter):
    """A SAM3 that decodes the prompts of a vocabulary in batches; see `Sam3Segmenter`.

    Args:
        model, processor, config, prompts_per_pass: those of `Sam3Segmenter`.
        names: the names of each class; every name is a prompt.
    """

    text_features: Tensor
    text_mask: Tensor

    def __init__(
        self,
        model: nn.Module,
        processor: Sam3Processor,
        config: Sam3CalibrationConfig | None,
        names: Sequence[Sequence[str]],
        prompts_per_pass: int | None,
    ) -> None:
        super().__init__()
        if prompts_per_pass is not None:
            _check.integer("prompts_per_pass", prompts_per_pass, 1)
        self.prompts_per_pass = prompts_per_pass
        self.model, self.processor, self.config = model, processor, config
        self.outliers: np.ndarray | None = None
        # The index of the class of each prompt.
        self._owners = [index for index, synonyms in enumerate(names) for _ in synonyms]
        self._runner = _runner(model)(model, processor)
        if config is not None:
            calibrate(model, config).remove()  # raises if the calibration does not fit

    @torch.no_grad()
    def _encode_text(self, names: Sequence[str]) -> None:
        """Registers the text features of all names as buffers, which follow the model's device."""
        chunks = []
        for start in range(0, len(names), _TEXTS):
            tokens = self._runner.tokens(names[start : start + _TEXTS])
            chunks.append(self._runner.encode_text(tokens))
        features, masks = map(torch.cat, zip(*chunks, strict=True))
        self.register_buffer("text_features", features, persistent=False)
        self.register_buffer("text_mask", masks, persistent=False)

    @contextmanager
    def _calibrated(self) -> Iterator[None]:
        """Installs the calibration, if there is one, and shows long searches for outliers."""
        if self.model.training:
            raise ValueError("model must be in evaluation mode, got one in training; call eval()")
        calibration = nullcontext() if self.config is None else calibrate(self.model, self.config)
        with calibration, progress.shown_by(_search_bar):
            yield

    def _encode_image(self, image: Tensor) -> Any:
        """Returns the vision encoder's results for an image (3, H, W), uint8."""
        vision = self._runner.encode_image(image)
        mask = self._runner.outlier_mask(vision)
        self.outliers = None if mask is None else mask[0].cpu().numpy()
        return vision

    def _decoded(
        self, vision: Any, classes: Sequence[int], title: str
    ) -> Iterator[tuple[list[int], Heads]]:
        """Yields the results of each batch of prompts, with the index of each prompt's class.

        Args:
            vision: the result of `_encode_image`.
            classes: the indices of the classes to decode.
            title: the title of the progress bar.
        """
        chosen = set(classes)
        prompts = [prompt for prompt, owner in enumerate(self._owners) if owner in chosen]
        runner, step = self._runner, self.prompts_per_pass
        device = runner.finest(vision).device
        step = step or prompts_in_memory(runner.finest(vision), runner.queries)
        with tqdm(total=len(prompts), desc=title, unit="prompt", leave=False, disable=None) as bar:
            for start in range(0, len(prompts), step):
                batch = prompts[start : start + step]
                # The buffers are elsewhere if the model alone was moved.
                text = (t[batch].to(device) for t in (self.text_features, self.text_mask))
                heads = runner.decode(vision, *text)
                yield [self._owners[prompt] for prompt in batch], heads
                bar.update(len(batch))


def _runner(model: nn.Module) -> type:
    """Returns the class that runs the model of its package. Only that package is imported."""
    package = adapter(model).__name__.rpartition(".")[2]
    return import_module(f"{__package__}.sam3_{package}").Runner


def _search_bar(steps: list) -> Iterable:
    """Wraps the steps of a search for outliers in a progress bar, if there are several.

    The search among the mask head's 82,944 pixels takes long on a CPU.
    """
    if len(steps) == 1:
        return steps
    return tqdm(steps, desc="outliers of pixels", unit="tile", leave=False, disable=None)

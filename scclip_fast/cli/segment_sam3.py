"""`scclip-fast segment --model facebook/sam3`: a calibrated SAM3 in the place of CLIP."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import Sam3Model, Sam3Processor

from .. import progress
from ..clip.model import check_finite
from ..clip.sources import HubError, first_line, load_transformers
from ..sam3 import Sam3CalibrationConfig, calibrate
from ..sam3.config import STAGES
from . import models
from .common import CommandError

BACKGROUND = "background"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Sam3Segmenter:
    """Class names to a mask, as `segment.Segmenter`: a prompt a name, instances by transformers.

    Attributes:
        classes: what no instance covers, "background", and the first name of each class.
        outliers: (h, w) bool, those among the tokens of the last photo; None without trunk_repair.
    """

    def __init__(
        self,
        model: Sam3Model,
        processor: Sam3Processor,
        classes: list[str],
        config: Sam3CalibrationConfig | None,
    ) -> None:
        """Of a model that is not calibrated; with config None it stays so."""
        self.model, self.processor, self.config = model, processor, config
        self.prompts = [[name.strip() for name in entry.split(",")] for entry in classes]
        self.classes = [BACKGROUND, *(names[0] for names in self.prompts)]
        self.outliers: np.ndarray | None = None
        self._tokens = {
            name: processor(text=name, return_tensors="pt")
            for names in self.prompts
            for name in names
        }
        most = model.config.text_config.max_position_embeddings
        for name, tokens in self._tokens.items():
            if (length := tokens.input_ids.shape[1]) > most:
                raise CommandError(f"{name!r} is too long a prompt: {length} tokens of {most}")

    def frozen(self) -> Sam3Segmenter:
        """The same without the calibration."""
        twin = copy.copy(self)
        twin.config = None
        return twin

    @torch.inference_mode()
    def bands(self, photo: Image.Image) -> Iterator[tuple[Tensor, Tensor]]:
        """The classes (H, W) and probabilities (C, H, W) of the whole photo, as its only band.

        A pixel has of each class the score of the best instance that covers it, and is background
        as surely as no class has it.
        """
        calibration = nullcontext() if self.config is None else calibrate(self.model, self.config)
        with calibration, progress.shown_by(_search_bar):
            probabilities = self._probabilities(photo)
        yield probabilities.argmax(dim=0), probabilities

    def _probabilities(self, photo: Image.Image) -> Tensor:
        """(C, H, W), float32, of the background first."""
        images = self.processor(images=photo, return_tensors="pt").to(self.model.device)
        embeds = self.model.get_vision_features(images.pixel_values.to(self.model.dtype))
        mask = getattr(embeds, "outlier_mask", None)
        self.outliers = None if mask is None else mask[0].cpu().numpy()
        size = (photo.height, photo.width)
        found = torch.zeros(len(self.classes), *size, device=self.model.device)
        background, scores = found[0], found[1:]
        prompts = [(index, name) for index, names in enumerate(self.prompts) for name in names]
        for index, name in tqdm(prompts, unit="prompt", leave=False, disable=None):
            for score, mask in self._instances(embeds, name, size):
                scores[index] = torch.maximum(scores[index], score * mask)
        torch.sub(1, scores.amax(dim=0), out=background)
        return found

    def _instances(
        self, embeds, prompt: str, size: tuple[int, int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The score and the mask (H, W) of each."""
        tokens = self._tokens[prompt].to(self.model.device)
        output = self.model(vision_embeds=embeds, **tokens)
        check_finite("logits and masks", output.pred_logits, output.pred_masks)
        found = self.processor.post_process_instance_segmentation(output, target_sizes=[size])[0]
        return zip(found["scores"].float(), found["masks"], strict=True)


def _search_bar(steps: list) -> Iterable:
    """A bar where outliers are sought for long: of the mask head's 82,944 pixels on a CPU."""
    if len(steps) == 1:
        return steps
    return tqdm(steps, desc="outliers of pixels", unit="tile", leave=False, disable=None)


def settings(args: argparse.Namespace) -> dict:
    """All of the options that results depend on.

    Raises:
        CommandError: --sam3-stages names no stage.
    """
    return {
        "model": args.model,
        "precision": args.precision,
        "sam3_preset": args.sam3_preset,
        "sam3_stages": _stages(args.sam3_stages),
    }


def _stages(text: str | None) -> list[str]:
    """Names of STAGES, in their order."""
    if text is None:
        return [name for name in STAGES if getattr(Sam3CalibrationConfig, name)]
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in STAGES]:
        allowed = ", ".join(STAGES)
        raise CommandError(f"--sam3-stages must be none or some of {allowed}; got {unknown[0]!r}")
    return [name for name in STAGES if name in names]


def load(args: argparse.Namespace, classes: list[str]) -> Sam3Segmenter:
    """The model of --model, a name on the hub or a folder, to be calibrated as the options say.

    Raises:
        CommandError: no weights there, no such device, or a trunk too small for the preset.
    """
    device = models.device(args.device)
    try:
        model, processor = load_transformers(
            Sam3Model, Sam3Processor, args.model, DTYPES[args.precision]
        )
    except torch.OutOfMemoryError:
        raise
    except HubError as error:
        raise CommandError(f"{error}; {models.OFFLINE}") from None
    except Exception as error:  # of transformers, safetensors, the file system
        raise CommandError(f"cannot load {args.model}: {first_line(error)}") from None
    try:
        config = _config(args, model)
    except ValueError as error:
        raise CommandError(f"--sam3-preset {args.sam3_preset} does not fit: {error}") from None
    return Sam3Segmenter(model.to(device).eval(), processor, classes, config)


def _config(args: argparse.Namespace, model: Sam3Model) -> Sam3CalibrationConfig:
    layers, stages = len(model.vision_encoder.backbone.layers), _stages(args.sam3_stages)
    seed = args.sam3_preset == "seed"
    preset = Sam3CalibrationConfig.seed() if seed else Sam3CalibrationConfig.for_depth(layers)
    config = replace(preset, **{name: name in stages for name in STAGES})
    config.check(layers, len(model.detr_decoder.layers))
    return config

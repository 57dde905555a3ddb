"""`scclip-fast segment --model facebook/sam3`: a calibrated SAM3 in the place of CLIP."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from transformers import Sam3Model, Sam3Processor

from ..sam3 import calibrate
from . import common
from .common import CommandError

BACKGROUND = "background"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Sam3Segmenter:
    """Class names to a mask, as `segment.Segmenter`: a prompt a name, instances by transformers.

    Attributes:
        classes: what no instance covers, "background", and the first name of each class.
    """

    def __init__(self, model: Sam3Model, processor: Sam3Processor, classes: list[str]) -> None:
        self.model, self.processor = model, processor
        self.prompts = [[name.strip() for name in entry.split(",")] for entry in classes]
        self.classes = [BACKGROUND, *(names[0] for names in self.prompts)]

    @torch.inference_mode()
    def bands(self, photo: Image.Image) -> Iterator[tuple[Tensor, Tensor]]:
        """The classes (H, W) and probabilities (C, H, W) of the whole photo, as its only band.

        A pixel has of each class the score of the best instance that covers it, and is background
        as surely as no class has it.
        """
        images = self.processor(images=photo, return_tensors="pt").to(self.model.device)
        embeds = self.model.get_vision_features(images.pixel_values.to(self.model.dtype))
        size = (photo.height, photo.width)
        scores = torch.stack(
            [
                torch.stack([self._score(embeds, name, size) for name in names]).amax(dim=0)
                for names in self.prompts
            ]
        )
        probabilities = torch.cat([1 - scores.amax(dim=0, keepdim=True), scores])
        yield probabilities.argmax(dim=0), probabilities

    def _score(self, embeds, prompt: str, size: tuple[int, int]) -> Tensor:
        tokens = self.processor(text=prompt, return_tensors="pt").to(self.model.device)
        output = self.model(vision_embeds=embeds, **tokens)
        found = self.processor.post_process_instance_segmentation(output, target_sizes=[size])[0]
        covered = found["scores"].float()[:, None, None] * found["masks"].float()
        none = covered.new_zeros(1, *size)
        return torch.cat([none, covered.reshape(-1, *size)]).amax(dim=0)


def load(args: argparse.Namespace, classes: list[str]) -> Sam3Segmenter:
    """The calibrated model of --model, a name on the hub or a folder.

    Raises:
        CommandError: no weights there, or no such device.
    """
    device = common.device(args.device)
    try:
        processor = Sam3Processor.from_pretrained(args.model)
        model = Sam3Model.from_pretrained(args.model, dtype=DTYPES[args.precision])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(
            f"cannot load {args.model}: {reason} To use facebook/sam3, accept its license on "
            "huggingface.co, log in with `hf auth login`, or give --model the folder of a "
            "download; without a network there is --model scenes, for drawn scenes only"
        ) from None
    model.to(device).eval()
    calibrate(model)
    return Sam3Segmenter(model, processor, classes)

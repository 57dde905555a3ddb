"""transformers' SAM3 with a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Sam3Model, Sam3Processor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from .sam3_heads import Heads


@dataclass
class Runner:
    """A `Sam3Model` with its processor.

    Attributes:
        model: the model, calibrated or not.
        processor: its processor.
    """

    model: Sam3Model
    processor: Sam3Processor

    def __post_init__(self) -> None:
        if not isinstance(self.processor, Sam3Processor):
            kind = type(self.processor).__name__
            raise TypeError(f"processor must be transformers' Sam3Processor, got {kind}")

    @property
    def queries(self) -> int:
        """The number of object queries."""
        return self.model.config.detr_decoder_config.num_queries

    def check(self, heads: Sequence[str], presence: bool) -> None:
        """Does nothing: every `Sam3Model` has both heads and a presence token."""

    def tokens(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns token ids and their mask, (names, length) each.

        Raises:
            ValueError: a name has more tokens than the model's context.
        """
        longest = self.model.config.text_config.max_position_embeddings
        encoded = [self.processor(text=name, return_tensors="pt") for name in names]
        for name, tokens in zip(names, encoded, strict=True):
            if (length := tokens.input_ids.shape[1]) > longest:
                raise ValueError(f"{name!r} is too long a prompt: {length} tokens of {longest}")
        fields = ("input_ids", "attention_mask")
        return {field: torch.cat([tokens[field] for tokens in encoded]) for field in fields}

    def encode_text(self, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns text features (P, length, C) and their mask (P, length)."""
        tokens = {name: ids.to(self.model.device) for name, ids in tokens.items()}
        features = self.model.get_text_features(**tokens, return_dict=True).pooler_output
        return features, tokens["attention_mask"]

    def encode_image(self, image: Tensor) -> Sam3VisionEncoderOutput:
        """Returns the features of an image (3, H, W), uint8."""
        photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        inputs = self.processor(images=photo, return_tensors="pt").to(self.model.device)
        return self.model.get_vision_features(
            inputs.pixel_values.to(self.model.dtype), return_dict=True
        )

    def finest(self, vision: Sam3VisionEncoderOutput) -> Tensor:
        """Returns the features (1, C, h, w) whose size the masks have."""
        return vision.fpn_hidden_states[0]

    def outlier_mask(self, vision: Sam3VisionEncoderOutput) -> Tensor | None:
        """Returns the outliers (1, h, w) among the trunk's tokens, or None."""
        return getattr(vision, "outlier_mask", None)

    def coarser(self, vision: Sam3VisionEncoderOutput, scale: float) -> Sam3VisionEncoderOutput:
        """Returns features averaged to a grid of `scale` times the side of the tokens' grid.

        All levels have this size, because the finer ones serve the masks alone.
        """
        *_, tokens, _ = vision.fpn_hidden_states  # the coarsest level is not read by the model
        side = max(round(scale * tokens.shape[-1]), 1)
        positions = self.model.vision_encoder.neck.position_encoding(
            (1, tokens.shape[1], side, side), tokens.device, tokens.dtype
        )
        levels = tuple(F.adaptive_avg_pool2d(level, side) for level in vision.fpn_hidden_states)
        return Sam3VisionEncoderOutput(
            fpn_hidden_states=levels, fpn_position_encoding=(positions,) * len(levels)
        )

    def decode(self, vision: Sam3VisionEncoderOutput, features: Tensor, mask: Tensor) -> Heads:
        """Returns the heads of prompts by their text features (P, length, C) and masks."""
        count = len(features)
        expanded = Sam3VisionEncoderOutput(
            fpn_hidden_states=_expanded(vision.fpn_hidden_states, count),
            fpn_position_encoding=_expanded(vision.fpn_position_encoding, count),
        )
        text = BaseModelOutputWithPooling(pooler_output=features.to(self.model.dtype))
        output = self.model(
            vision_embeds=expanded, text_embeds=text, attention_mask=mask, return_dict=True
        )
        return Heads.of_logits(
            output.presence_logits,
            output.pred_logits,
            output.pred_boxes,
            output.pred_masks,
            output.semantic_seg,
        )


def _expanded(levels: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    return tuple(level.expand(count, -1, -1, -1) for level in levels)

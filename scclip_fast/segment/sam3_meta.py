"""The SAM3 of Meta's package with a batch of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sam3.model.data_misc import FindStage
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from torch import Tensor, nn

from .sam3_heads import Heads

_NORMS = (nn.LayerNorm, nn.GroupNorm)


@dataclass
class Runner:
    """A `Sam3Image` with its processor.

    Attributes:
        model: the model, calibrated or not.
        processor: its processor, of which the resizing and normalisation of images are used.
    """

    model: Sam3Image
    processor: Sam3Processor

    def __post_init__(self) -> None:
        if not isinstance(self.processor, Sam3Processor):
            kind = type(self.processor).__name__
            raise TypeError(f"processor must be the Sam3Processor of Meta's package, got {kind}")

    @property
    def queries(self) -> int:
        """The number of object queries."""
        return self.model.transformer.decoder.num_queries

    def check(self, heads: Sequence[str], presence: bool) -> None:
        """ValueError unless the model has the heads, and presence apart from the scores."""
        if getattr(self.model, "supervise_joint_box_scores", False):
            raise ValueError(
                "the scores of a Sam3Image with supervise_joint_box_scores=True, as of the video "
                "model, hold the presence already; build the image model"
            )
        head = self.model.segmentation_head
        if head is None or ("semantic" in heads and not hasattr(head, "semantic_seg_head")):
            raise ValueError(f"heads {heads} need a segmentation_head that has them, got {head}")
        if presence and self.model.transformer.decoder.presence_token is None:
            raise ValueError("presence=True needs a decoder with a presence token, got one without")

    def tokens(self, names: Sequence[str]) -> list[str]:
        """Returns the names, which the model's text encoder splits into tokens itself.

        Raises:
            ValueError: a name has more tokens than the model's context, where Meta's tokenizer
                would drop the rest.
        """
        text = self.model.backbone.language_backbone
        longest = text.context_length
        tokens = text.tokenizer(list(names), context_length=longest + 1)
        for name, row in zip(names, tokens, strict=True):
            if row[-1] != 0:
                raise ValueError(f"{name!r} is too long a prompt: more than {longest} tokens")
        return list(names)

    def encode_text(self, tokens: list[str]) -> tuple[Tensor, Tensor]:
        """Returns text features (P, length, C) and their mask (P, length), True for padding."""
        with _any_dtype(self.model):
            out = self.model.backbone.forward_text(tokens, device=self.model.device)
        return out["language_features"].transpose(0, 1), out["language_mask"]

    def encode_image(self, image: Tensor) -> dict[str, Any]:
        """Returns the features of an image (3, H, W), uint8."""
        pixels = self.processor.transform(image.to(self.model.device))[None]
        with _any_dtype(self.model):
            return self.model.backbone.forward_image(pixels)

    def finest(self, vision: dict[str, Any]) -> Tensor:
        """Returns the features (1, C, h, w) whose size the masks have."""
        return vision["backbone_fpn"][0]

    def outlier_mask(self, vision: dict[str, Any]) -> Tensor | None:
        """Returns the outliers (1, h, w) among the trunk's tokens, or None."""
        return vision.get("outlier_mask")

    def coarser(self, vision: dict[str, Any], scale: float) -> dict[str, Any]:
        """Returns features averaged to a grid of `scale` times the side of the tokens' grid.

        All levels have this size, because the finer ones serve the masks alone.
        """
        levels = vision["backbone_fpn"]
        side = max(round(scale * levels[-1].shape[-1]), 1)
        levels = [F.adaptive_avg_pool2d(level, side) for level in levels]
        encoding = self.model.backbone.vision_backbone.position_encoding
        positions = [encoding(level).to(level.dtype) for level in levels]
        return {"backbone_fpn": levels, "vision_pos_enc": positions}

    def decode(self, vision: dict[str, Any], features: Tensor, mask: Tensor) -> Heads:
        """Returns the heads of prompts by their text features (P, length, C) and masks."""
        count, device = len(features), self.model.device
        image_ids = torch.zeros(count, dtype=torch.long, device=device)
        stage = FindStage(image_ids, torch.arange(count, device=device), *[None] * 5)
        text = {"language_features": features.transpose(0, 1), "language_mask": mask}
        no_geometry = self.model._get_dummy_prompt(count)
        with _any_dtype(self.model):
            out = self.model.forward_grounding(vision | text, stage, None, no_geometry)
        return Heads.of_logits(
            out.get("presence_logit_dec"),
            out["pred_logits"][:, :, 0],
            out["pred_boxes_xyxy"],
            out["pred_masks"],
            out.get("semantic_seg"),
        )


@contextmanager
def _any_dtype(model: Sam3Image) -> Iterator[None]:
    """Lets a model run after a cast of its weights, to float16 or bfloat16 above all.

    Meta's positions and boxes are float32, so the layers of a cast model run under autocast. The
    norms, which take one dtype on a CPU, have float32 weights inside the block.
    """
    _restore_rotations(model)
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float16, torch.bfloat16):
        yield
        return
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    weights = [(weight, weight.data) for norm in norms for weight in norm.parameters()]
    try:
        for weight, data in weights:
            weight.data = data.float()
        with torch.autocast(model.device.type, dtype):
            yield
    finally:
        for weight, data in weights:
            weight.data = data


def _restore_rotations(model: Sam3Image) -> None:
    """Computes the complex rotary embedding again where a cast of the model has made it real.

    `model.to(dtype)` drops the imaginary part, also for float32, and the trunk would then run on
    without an error. `half()`, `bfloat16()` and `float()` keep it.
    """
    for block in model.backbone.vision_backbone.trunk.blocks:
        attention = block.attn
        if attention.use_rope and not attention.freqs_cis.is_complex():
            device = attention.freqs_cis.device
            with torch.inference_mode(False):  # the buffer outlives the block
                attention._setup_rope_freqs()
                attention.freqs_cis = attention.freqs_cis.to(device)

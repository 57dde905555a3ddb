"""transformers' SAM3 modules with a stage in their forward; they become it by their `__class__`.

Weights, names and `isinstance` stay as they are, and torch.compile notices the change, which it
does not of forward hooks (measured). Each class adds to what its parent returns, so that nothing of
SAM3 is written twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, Sam3Model
from transformers.modeling_utils import _CAN_RECORD_REGISTRY
from transformers.models.sam3 import modeling_sam3 as sam3

from ..ops import blended_attention
from . import stages
from .config import Sam3CalibrationConfig
from .output import CalibratedSegmentationOutput, CalibratedVisionOutput
from .state import TRUNK_FOUND

ATTENTION = "scclip_blended"


class TappedLayer(sam3.Sam3ViTLayer):
    """A layer of the trunk whose output a later stage reads."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return self.scclip.tap(self.scclip_index, super().forward(hidden_states, **kwargs))


class CalibratedLastLayer(sam3.Sam3ViTLayer):
    """The trunk's last layer, in the middle of `stages.calibrate_trunk`."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        def last(x: Tensor, content: Tensor | None) -> Tensor:
            blend = {} if content is None else {"scclip_content": (content, self.scclip.config)}
            return super(CalibratedLastLayer, self).forward(x, **kwargs, **blend)

        return self.scclip.run_last(hidden_states, last)


def blended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    scclip_content: tuple[Tensor, Sam3CalibrationConfig],
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, H, N, d), after the rotary embedding, to (B, N, H, d).

    Under autocast q and k come in the rotary embedding's float32.
    """
    content, config = scclip_content
    out = blended_attention(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        content,
        gamma=config.gamma,
        alpha=config.residual_weight,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


class CalibratedVisionModel(sam3.Sam3VisionModel):
    """The vision encoder, whose output carries what was found: reused, it is found once."""

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Any:
        stages.check_pixels("pixel_values", pixel_values)
        try:
            out = super().forward(pixel_values, *args, **kwargs)
            return _extended(CalibratedVisionOutput, out, self.scclip.take(*TRUNK_FOUND))
        finally:
            self.scclip.clear()


class AggregatedCrossAttention(sam3.Sam3Attention):
    """The attention of image tokens to the prompt in a layer of the DETR encoder."""

    def forward(self, query: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        attended, weights = super().forward(query, *args, **kwargs)
        return stages.aggregate_attended(attended, query, self.scclip.config), weights


class CalibratedDecoderLayer(sam3.Sam3DetrDecoderLayer):
    """A layer of the DETR decoder; its token 0, for presence, is no object query."""

    def forward(self, *args, **kwargs) -> Tensor:
        out = super().forward(*args, **kwargs)
        presence, queries = out[:, :1], out[:, 1:]
        return torch.cat([presence, stages.calibrate_queries(queries, self.scclip.config)], dim=1)


class TappedDecoder(sam3.Sam3DetrDecoder):
    """The DETR decoder, whose queries of all layers the output shows."""

    def forward(self, *args, **kwargs) -> Any:
        out = super().forward(*args, **kwargs)
        self.scclip.found["query_features"] = out.intermediate_hidden_states
        return out


class RepairedPixelDecoder(sam3.Sam3PixelDecoder):
    """The mask head's pyramid, from repaired tokens."""

    def forward(self, backbone_features: list[Tensor]) -> Tensor:
        *finer, coarsest = backbone_features
        return super().forward([*finer, stages.repair_map(coarsest, self.scclip.config)])


class CalibratedProjection(nn.Conv2d):
    """What makes the pixel features that meet the queries."""

    def forward(self, pixels: Tensor) -> Tensor:
        out, config = super().forward(pixels), self.scclip.config
        if config.repaired_grid == "pixels":
            out = stages.repair_map(out, config)
        if config.mask_threshold:
            self.scclip.found["pixel_norms"] = out.norm(dim=1)
        return out


class MeasuredMaskEmbedder(sam3.Sam3MaskEmbedder):
    """What makes the queries' embeddings, whose lengths the threshold needs."""

    def forward(self, queries: Tensor) -> Tensor:
        out = super().forward(queries)
        self.scclip.found["query_norms"] = out.norm(dim=-1)
        return out


class ThresholdedMaskDecoder(sam3.Sam3MaskDecoder):
    """The mask head without the logits of pixels that are unlike the query."""

    def forward(self, *args, **kwargs) -> Any:
        out = super().forward(*args, **kwargs)
        norms = self.scclip.take("query_norms", "pixel_norms")
        beta = self.scclip.config.similarity_beta
        out.pred_masks = stages.threshold_logits(out.pred_masks, *norms.values(), beta)
        return out


class CalibratedModel(Sam3Model):
    """The whole model, whose output is `CalibratedSegmentationOutput`."""

    def forward(self, pixel_values=None, vision_embeds=None, *args, **kwargs) -> Any:
        try:
            return self._forward(pixel_values, vision_embeds, *args, **kwargs)
        finally:
            self.scclip.clear()

    def _forward(self, pixel_values, vision_embeds, *args, **kwargs) -> Any:
        if pixel_values is not None and vision_embeds is None:
            context = {k: v for k, v in kwargs.items() if k not in _PROMPTS}
            vision_embeds = self.vision_encoder(pixel_values, **context | {"return_dict": True})
            pixel_values = None
        out = super().forward(pixel_values, vision_embeds, *args, **kwargs)
        found = {name: getattr(vision_embeds, name, None) for name in TRUNK_FOUND}
        return _extended(
            CalibratedSegmentationOutput, out, found | self.scclip.take("query_features")
        )


# save_pretrained writes this name, by which the checkpoint is loaded without this package.
CalibratedModel.__name__ = Sam3Model.__name__
_PROMPTS = ("input_ids", "attention_mask", "text_embeds", "input_boxes", "input_boxes_labels")


def _extended(kind: type, out: Any, found: dict[str, Tensor | None]) -> Any:
    """transformers' output as the dataclass that adds fields to it; tuples as they are."""
    if isinstance(out, tuple):
        return out
    return kind(**{f.name: getattr(out, f.name) for f in fields(out)}, **found)


AttentionInterface.register(ATTENTION, blended)


def depths(model: Sam3Model) -> tuple[int, int]:
    """Layers of the trunk and of the DETR decoder."""
    return len(model.vision_encoder.backbone.layers), len(model.detr_decoder.layers)


def replacements(
    model: Sam3Model, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    """Each module that a stage needs, the class it becomes, and attributes that it gets."""
    for module, kind, attributes in _chosen(model, config):
        if isinstance(module, PreTrainedModel):
            # By the name of its class transformers knows what a model can record; a name that is
            # missing would lose hidden states and attentions without a word.
            _CAN_RECORD_REGISTRY[str(kind)] = module._can_record_outputs
        yield module, kind, attributes


def _chosen(
    model: Sam3Model, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    yield model, CalibratedModel, {}
    yield model.vision_encoder, CalibratedVisionModel, {}
    yield model.detr_decoder, TappedDecoder, {}
    if config.calibrates_trunk:
        layers = model.vision_encoder.backbone.layers
        for index in set().union(*config.taps.values()):
            yield layers[index], TappedLayer, {"scclip_index": index}
        yield layers[-1], CalibratedLastLayer, {}
        if config.trunk_attention:
            attention = layers[-1].attention
            own = copy.copy(attention.config)  # all layers of the trunk share one
            own._attn_implementation = ATTENTION
            yield attention, type(attention), {"config": own}
    if config.cross_attention:
        for layer in model.detr_encoder.layers:
            yield layer.cross_attn, AggregatedCrossAttention, {}
    if config.decoder_calibration:
        for layer in {model.detr_decoder.layers[index] for index in config.decoder_layers}:
            yield layer, CalibratedDecoderLayer, {}
    head = model.mask_decoder
    if config.repaired_grid == "tokens":
        yield head.pixel_decoder, RepairedPixelDecoder, {}
    if config.mask_threshold or config.repaired_grid == "pixels":
        yield head.instance_projection, CalibratedProjection, {}
    if config.mask_threshold:
        yield head.mask_embedder, MeasuredMaskEmbedder, {}
        yield head, ThresholdedMaskDecoder, {}

"""Subclasses of transformers' SAM3 modules that run the stages of the calibration.

`calibrate` assigns them to `module.__class__`: weights, names and `isinstance` stay as they are,
and torch.compile notices the change, which it does not do for forward hooks (measured). Each class
adds a stage to the output of its parent, so that no code of SAM3 is repeated here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, Sam3Model
from transformers.modeling_utils import _CAN_RECORD_REGISTRY
from transformers.models.sam3 import modeling_sam3 as sam3

from ..ops import blended_attention
from . import stages
from .config import Sam3CalibrationConfig
from .output import CalibratedSegmentationOutput, CalibratedVisionOutput, extended
from .state import TRUNK_RESULTS

ATTENTION = "scclip_blended"


class KeptLayer(sam3.Sam3ViTLayer):
    """A layer of the trunk whose output the last layer reads."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return self.scclip.keep(self.scclip_index, super().forward(hidden_states, **kwargs))


class CalibratedLastLayer(sam3.Sam3ViTLayer):
    """The trunk's last layer, which runs within `stages.calibrate_trunk`."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        def last(x: Tensor, content: Tensor | None) -> Tensor:
            blend = {} if content is None else {"scclip_content": (content, self.scclip.config)}
            return super(CalibratedLastLayer, self).forward(x, **kwargs, **blend)

        return stages.calibrate_trunk(hidden_states, last, self.scclip)


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
    """Blended attention as an entry of transformers' `AttentionInterface`.

    Query, key and value are (B, H, N, d), after the rotary embedding; the result is (B, N, H, d).
    Under autocast the rotary embedding returns query and key in float32.
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


AttentionInterface.register(ATTENTION, blended)


class CalibratedVisionModel(sam3.Sam3VisionModel):
    """The vision encoder. Its output carries the results of the trunk to every prompt."""

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Any:
        stages.check_pixels("pixel_values", pixel_values)
        try:
            out = super().forward(pixel_values, *args, **kwargs)
            return extended(CalibratedVisionOutput, out, self.scclip.trunk_results())
        finally:
            self.scclip.clear()


class AggregatedCrossAttention(sam3.Sam3Attention):
    """The attention of image tokens to the prompt in a layer of the DETR encoder."""

    def forward(self, query: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        attended, weights = super().forward(query, *args, **kwargs)
        return stages.aggregate_attended(attended, query, self.scclip.config), weights


class CalibratedDecoderLayer(sam3.Sam3DetrDecoderLayer):
    """A layer of the DETR decoder. Token 0 is the presence token, which is no object query."""

    def forward(self, *args, **kwargs) -> Tensor:
        out = super().forward(*args, **kwargs)
        presence, queries = out[:, :1], out[:, 1:]
        return torch.cat([presence, stages.calibrate_queries(queries, self.scclip.config)], dim=1)


class KeptDecoder(sam3.Sam3DetrDecoder):
    """The DETR decoder. The model's output has the queries of all its layers."""

    def forward(self, *args, **kwargs) -> Any:
        out = super().forward(*args, **kwargs)
        self.scclip.query_features = out.intermediate_hidden_states
        return out


class RepairedPixelDecoder(sam3.Sam3PixelDecoder):
    """The pixel decoder of the mask head, on repaired tokens."""

    def forward(self, backbone_features: list[Tensor]) -> Tensor:
        *finer, coarsest = backbone_features
        return super().forward([*finer, stages.repair_map(coarsest, self.scclip.config)])


class CalibratedProjection(nn.Conv2d):
    """The projection to the pixel features that are multiplied with the queries."""

    def forward(self, pixels: Tensor) -> Tensor:
        out, config = super().forward(pixels), self.scclip.config
        if config.repaired_grid == "pixels":
            out = stages.repair_map(out, config)
        if config.mask_threshold:
            self.scclip.pixel_norms = out.norm(dim=1)
        return out


class MeasuredMaskEmbedder(sam3.Sam3MaskEmbedder):
    """The embedding of the queries. The threshold needs the norms of its output."""

    def forward(self, queries: Tensor) -> Tensor:
        out = super().forward(queries)
        self.scclip.query_norms = out.norm(dim=-1)
        return out


class ThresholdedMaskDecoder(sam3.Sam3MaskDecoder):
    """The mask head, whose logits are 0 where pixel and query are not similar."""

    def forward(self, *args, **kwargs) -> Any:
        out, state = super().forward(*args, **kwargs), self.scclip
        norms, beta = (state.query_norms, state.pixel_norms), state.config.similarity_beta
        state.query_norms = state.pixel_norms = None
        out.pred_masks = stages.threshold_logits(out.pred_masks, *norms, beta)
        return out


class CalibratedModel(Sam3Model):
    """The whole model. Its output is a `CalibratedSegmentationOutput`."""

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
        results = {name: getattr(vision_embeds, name, None) for name in TRUNK_RESULTS}
        results["query_features"] = self.scclip.query_features
        return extended(CalibratedSegmentationOutput, out, results)


# save_pretrained writes this name, by which the checkpoint is loaded without this package.
CalibratedModel.__name__ = Sam3Model.__name__
_PROMPTS = ("input_ids", "attention_mask", "text_embeds", "input_boxes", "input_boxes_labels")


def depths(model: Sam3Model) -> tuple[int, int]:
    """Number of layers of the trunk and of the DETR decoder."""
    return len(model.vision_encoder.backbone.layers), len(model.detr_decoder.layers)


def replacements(
    model: Sam3Model, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    """Each module that a stage changes, its new class, and attributes to set on it."""
    for module, kind, attributes in _chosen(model, config):
        if isinstance(module, PreTrainedModel):
            # transformers looks up what a model can record by the name of its class. Under a name
            # that is not registered, hidden states and attentions would be lost without an error.
            _CAN_RECORD_REGISTRY[str(kind)] = module._can_record_outputs
        yield module, kind, attributes


def _chosen(
    model: Sam3Model, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    yield model, CalibratedModel, {}
    yield model.vision_encoder, CalibratedVisionModel, {}
    yield model.detr_decoder, KeptDecoder, {}
    if config.calibrates_trunk:
        layers = model.vision_encoder.backbone.layers
        for index in config.kept_layers:
            yield layers[index], KeptLayer, {"scclip_index": index}
        yield layers[-1], CalibratedLastLayer, {}
        if config.trunk_attention:
            attention = layers[-1].attention
            attention_config = copy.copy(attention.config)  # all layers of the trunk share one
            attention_config._attn_implementation = ATTENTION
            yield attention, type(attention), {"config": attention_config}
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

"""Subclasses of Meta's SAM3 modules that run the stages, as those of `huggingface.py` do.

Meta's decoder keeps its queries (Q, B, C) and their presence token apart. Its blocks take no
keywords, so the last block passes the content features to its attention in `ForwardState.content`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sam3.model import (
    decoder,
    maskformer_segmentation,
    model_misc,
    sam3_image,
    vitdet,
    vl_combiner,
)
from torch import Tensor, nn

from ..ops import blended_attention
from . import stages
from .config import Sam3CalibrationConfig
from .state import TRUNK_RESULTS


class KeptBlock(vitdet.Block):
    """A block of the trunk whose output the last block reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scclip.keep(self.scclip_index, super().forward(x))


class CalibratedLastBlock(vitdet.Block):
    """The trunk's last block, which runs within `stages.calibrate_trunk`."""

    def forward(self, x: Tensor) -> Tensor:
        _refuse_training(self)

        def last(x: Tensor, content: Tensor | None) -> Tensor:
            self.scclip.content = content
            return super(CalibratedLastBlock, self).forward(x)

        return stages.calibrate_trunk(x, last, self.scclip)


class BlendedAttention(vitdet.Attention):
    """The last block's attention over all tokens (B, h, w, D), blended with content attention."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.scclip
        content, state.content = state.content, None
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self._apply_rope(q, k)
        out = blended_attention(
            q,
            k,
            v,
            content,
            gamma=state.config.gamma,
            alpha=state.config.residual_weight,
            scale=self.scale,
        )
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))


class CalibratedBackbone(vl_combiner.SAM3VLBackbone):
    """The encoders. The dictionary of an image carries the results of the trunk to every prompt."""

    def forward_image(self, samples: Tensor) -> dict[str, Any]:
        stages.check_pixels("samples", samples)
        try:
            return super().forward_image(samples) | self.scclip.trunk_results()
        finally:
            self.scclip.clear()


class AggregatedCrossAttention(model_misc.MultiheadAttentionWrapper):
    """The attention of image tokens to the prompt in a layer of the DETR encoder."""

    def forward(self, query: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        attended, _ = super().forward(query, *args, **kwargs)
        return stages.aggregate_attended(attended, query, self.scclip.config), None


class CalibratedDecoderLayer(decoder.TransformerDecoderLayer):
    """A layer of the DETR decoder."""

    def forward(self, **kwargs) -> tuple[Tensor, Tensor | None]:
        _refuse_training(self)
        queries, presence = super().forward(**kwargs)
        calibrated = stages.calibrate_queries(queries.transpose(0, 1), self.scclip.config)
        return calibrated.transpose(0, 1), presence


class RepairedPixelDecoder(maskformer_segmentation.PixelDecoder):
    """The pixel decoder of the mask head, on repaired tokens."""

    def forward(self, backbone_feats: list[Tensor]) -> Tensor:
        *finer, coarsest = backbone_feats
        return super().forward([*finer, stages.repair_map(coarsest, self.scclip.config)])


class CalibratedMaskPredictor(maskformer_segmentation.MaskPredictor):
    """The product of queries (B, Q, C) and pixel features (B, C, h, w)."""

    def forward(self, obj_queries: Tensor, pixel_embed: Tensor) -> Tensor:
        config = self.scclip.config
        if config.repaired_grid == "pixels":
            pixel_embed = stages.repair_map(pixel_embed, config)
        logits = super().forward(obj_queries, pixel_embed)
        if not config.mask_threshold:
            return logits
        query_norms = self.mask_embed(obj_queries).norm(dim=-1)
        return stages.threshold_logits(
            logits, query_norms, pixel_embed.norm(dim=1), config.similarity_beta
        )


class CalibratedModel(sam3_image.Sam3Image):
    """The whole model. Its dictionary has the results of the trunk and of all decoder layers."""

    def forward_grounding(self, *args, **kwargs) -> dict[str, Any]:
        out = super().forward_grounding(*args, **kwargs)
        image = out["prev_encoder_out"]["backbone_out"]
        return out | {name: image.get(name) for name in TRUNK_RESULTS}

    def _update_scores_and_boxes(self, out, hs, reference_boxes, *args, **kwargs) -> None:
        # hs and reference_boxes are batch first, one entry for each layer of the decoder.
        super()._update_scores_and_boxes(out, hs, reference_boxes, *args, **kwargs)
        out.update(query_features=hs, decoder_reference_boxes=reference_boxes)


def depths(model: sam3_image.Sam3Image) -> tuple[int, int]:
    """Number of blocks of the trunk and of layers of the DETR decoder."""
    return len(model.backbone.vision_backbone.trunk.blocks), len(model.transformer.decoder.layers)


def replacements(
    model: sam3_image.Sam3Image, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    """Each module that a stage changes, its new class, and attributes to set on it."""
    _check(model, config)
    yield model, CalibratedModel, {}
    yield model.backbone, CalibratedBackbone, {}
    if config.calibrates_trunk:
        blocks = model.backbone.vision_backbone.trunk.blocks
        for index in config.kept_layers:
            yield blocks[index], KeptBlock, {"scclip_index": index}
        yield blocks[-1], CalibratedLastBlock, {}
        if config.trunk_attention:
            yield blocks[-1].attn, BlendedAttention, {}
    if config.cross_attention:
        for layer in model.transformer.encoder.layers:
            yield layer.cross_attn_image, AggregatedCrossAttention, {}
    if config.decoder_calibration:
        layers = model.transformer.decoder.layers
        for layer in {layers[index] for index in config.decoder_layers}:
            yield layer, CalibratedDecoderLayer, {}
    head = model.segmentation_head
    if config.repaired_grid == "tokens":
        yield head.pixel_decoder, RepairedPixelDecoder, {}
    if config.mask_threshold or config.repaired_grid == "pixels":
        yield head.mask_predictor, CalibratedMaskPredictor, {}


def _check(model: sam3_image.Sam3Image, config: Sam3CalibrationConfig) -> None:
    """ValueError for variants of Meta's modules that the stages do not support."""
    last = model.backbone.vision_backbone.trunk.blocks[-1]
    if config.calibrates_trunk and (
        last.window_size > 0 or last.attn.cls_token or last.attn.use_rel_pos
    ):
        raise ValueError(
            "the trunk must be SAM3's, without class token and relative positions, and its last "
            f"block must have attention over all tokens; got window_size={last.window_size}, "
            f"cls_token={last.attn.cls_token}, use_rel_pos={last.attn.use_rel_pos}"
        )
    attentions = [layer.cross_attn_image for layer in model.transformer.encoder.layers]
    if config.cross_attention and not all(attention.batch_first for attention in attentions):
        raise ValueError(
            "cross_attention needs an encoder whose cross attention takes (B, N, C), got one with "
            "batch_first=False"
        )
    head = model.segmentation_head
    if (config.mask_repair or config.mask_threshold) and (head is None or head.aux_masks):
        raise ValueError(
            "mask_repair and mask_threshold need a segmentation_head with aux_masks=False, got "
            + ("none" if head is None else "aux_masks=True")
        )


def _refuse_training(module: nn.Module) -> None:
    if module.training:
        raise ValueError(
            "a calibrated Sam3Image must be in evaluation mode, got one in training; call its "
            "eval(): in training its trunk runs blocks twice, and its decoder has every query twice"
        )

"""The modules of Meta's package `sam3` with a stage in their forward, as `modules.py` has them.

Meta's decoder keeps its queries (Q, B, C) and their presence token apart; its blocks take no
keywords, so that the last one leaves its attention the content features in `Shared`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sam3.model import decoder, maskformer_segmentation, sam3_image, vitdet, vl_combiner
from torch import Tensor, nn

from ..ops import blended_attention
from . import stages
from .config import Sam3CalibrationConfig

_TRUNK_FOUND = ("outlier_mask", "lof_scores", "calibrated_features")


class TappedBlock(vitdet.Block):
    """A block of the trunk whose output a later stage reads."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.scclip.features[self.scclip_index] = out.flatten(1, 2)
        return out


class CalibratedLastBlock(vitdet.Block):
    """The trunk's last block, in the middle of `stages.calibrate_trunk`."""

    def forward(self, x: Tensor) -> Tensor:
        shared, grid = self.scclip, (x.shape[1], x.shape[2])

        def last(tokens: Tensor, content: Tensor | None) -> Tensor:
            if content is not None:
                shared.found["content"] = content
            out = super(CalibratedLastBlock, self).forward(tokens.unflatten(1, grid))
            return out.flatten(1, 2)

        tokens, outliers = stages.calibrate_trunk(
            x.flatten(1, 2), shared.features, last, grid, shared.config
        )
        shared.features.clear()
        if outliers is not None:
            shared.found["outlier_mask"] = outliers.mask.unflatten(1, grid)
            shared.found["lof_scores"] = outliers.scores.unflatten(1, grid)
        shared.found["calibrated_features"] = tokens
        return tokens.unflatten(1, grid)


class BlendedAttention(vitdet.Attention):
    """The last block's attention, over all tokens (B, h, w, D), blended with the content's."""

    def forward(self, x: Tensor) -> Tensor:
        config = self.scclip.config
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self._apply_rope(q, k)
        out = blended_attention(
            q,
            k,
            v,
            self.scclip.found.pop("content"),
            gamma=config.gamma,
            alpha=config.residual_weight,
            scale=self.scale,
        )
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))


class CalibratedBackbone(vl_combiner.SAM3VLBackbone):
    """The encoders, whose image dictionary carries what was found: reused, it is found once."""

    def forward_image(self, samples: Tensor) -> dict[str, Any]:
        stages.check_pixels("samples", samples)
        try:
            return super().forward_image(samples) | self.scclip.take(*_TRUNK_FOUND)
        finally:
            self.scclip.clear()


class CalibratedDecoderLayer(decoder.TransformerDecoderLayer):
    """A layer of the DETR decoder."""

    def forward(self, **kwargs) -> tuple[Tensor, Tensor | None]:
        if self.training:
            raise ValueError(
                "decoder_calibration needs a model in evaluation mode: in training its decoder has "
                "every query twice"
            )
        queries, presence = super().forward(**kwargs)
        calibrated = stages.calibrate_queries(queries.transpose(0, 1), self.scclip.config)
        return calibrated.transpose(0, 1), presence


class TappedDecoder(decoder.TransformerDecoder):
    """The DETR decoder, whose queries and boxes of all layers the output shows, batch first."""

    def forward(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        out = super().forward(*args, **kwargs)
        for name, value in zip(("query_features", "decoder_reference_boxes"), out, strict=False):
            self.scclip.found[name] = value.transpose(1, 2)
        return out


class RepairedPixelDecoder(maskformer_segmentation.PixelDecoder):
    """The mask head's pyramid, from repaired tokens."""

    def forward(self, backbone_feats: list[Tensor]) -> Tensor:
        *finer, coarsest = backbone_feats
        return super().forward([*finer, stages.repair_map(coarsest, self.scclip.config)])


class CalibratedMaskPredictor(maskformer_segmentation.MaskPredictor):
    """Where queries (B, Q, C) meet pixel features (B, C, h, w)."""

    def forward(self, obj_queries: Tensor, pixel_embed: Tensor) -> Tensor:
        config = self.scclip.config
        if config.mask_repair and config.mask_grid == "pixels":
            pixel_embed = stages.repair_map(pixel_embed, config)
        logits = super().forward(obj_queries, pixel_embed)
        if not config.mask_threshold:
            return logits
        query_norms = self.mask_embed(obj_queries).norm(dim=-1)
        return stages.threshold_logits(
            logits, query_norms, pixel_embed.norm(dim=1), config.similarity_beta
        )


class CalibratedModel(sam3_image.Sam3Image):
    """The whole model: its dictionary has what was found."""

    def forward_grounding(self, *args, **kwargs) -> dict[str, Any]:
        try:
            out = super().forward_grounding(*args, **kwargs)
            image = out["prev_encoder_out"]["backbone_out"]
            found = {name: image.get(name) for name in _TRUNK_FOUND}
            return out | found | self.scclip.take("query_features", "decoder_reference_boxes")
        finally:
            self.scclip.clear()


def depths(model: sam3_image.Sam3Image) -> tuple[int, int]:
    """Blocks of the trunk and layers of the DETR decoder."""
    return len(model.backbone.vision_backbone.trunk.blocks), len(model.transformer.decoder.layers)


def replacements(
    model: sam3_image.Sam3Image, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    """Each module that a stage needs, the class it becomes, and attributes that it gets."""
    _check(model, config)
    for module, kind, attributes in _chosen(model, config):
        own = kind.__base__
        if type(module) is not own:
            raise ValueError(
                f"the calibration needs Meta's {own.__name__}, got {type(module).__name__}"
            )
        if "forward" in vars(module) or getattr(module, "compile_mode", None) is not None:
            raise ValueError(
                f"the model's {own.__name__} is compiled in a way that a class cannot "
                "replace; build it without compile_mode and call its compile()"
            )
        yield module, kind, attributes


def _chosen(
    model: sam3_image.Sam3Image, config: Sam3CalibrationConfig
) -> Iterator[tuple[nn.Module, type, dict[str, Any]]]:
    yield model, CalibratedModel, {}
    yield model.backbone, CalibratedBackbone, {}
    yield model.transformer.decoder, TappedDecoder, {}
    if config.calibrates_trunk:
        blocks = model.backbone.vision_backbone.trunk.blocks
        for index in config.tapped_layers:
            yield blocks[index], TappedBlock, {"scclip_index": index}
        yield blocks[-1], CalibratedLastBlock, {}
        if config.trunk_attention:
            yield blocks[-1].attn, BlendedAttention, {}
    if config.decoder_calibration:
        layers = model.transformer.decoder.layers
        for index in sorted({i % len(layers) for i in config.decoder_layers}):
            yield layers[index], CalibratedDecoderLayer, {}
    head = model.segmentation_head
    if config.mask_repair and config.mask_grid == "tokens":
        yield head.pixel_decoder, RepairedPixelDecoder, {}
    if config.mask_threshold or (config.mask_repair and config.mask_grid == "pixels"):
        yield head.mask_predictor, CalibratedMaskPredictor, {}


def _check(model: sam3_image.Sam3Image, config: Sam3CalibrationConfig) -> None:
    """ValueError for what Meta's modules can be built as and the stages have no place in."""
    last = model.backbone.vision_backbone.trunk.blocks[-1]
    if config.calibrates_trunk and (
        last.window_size > 0 or last.attn.cls_token or last.attn.use_rel_pos
    ):
        raise ValueError(
            "the trunk must be SAM3's, without class token or relative positions, its last block's "
            f"attention over all tokens; got window_size={last.window_size}, "
            f"cls_token={last.attn.cls_token}, use_rel_pos={last.attn.use_rel_pos}"
        )
    head = model.segmentation_head
    if (config.mask_repair or config.mask_threshold) and (head is None or head.aux_masks):
        raise ValueError(
            "mask_repair and mask_threshold need a segmentation_head with aux_masks=False, got "
            + ("none" if head is None else "aux_masks=True")
        )

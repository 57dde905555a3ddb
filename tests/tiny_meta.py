"""A small SAM3 of Meta's package with random weights: 64 tokens in its trunk, 40 object queries."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import torch
from sam3.model import decoder, encoder, geometry_encoders, model_misc, necks
from sam3.model.data_misc import FindStage
from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead
from sam3.model.position_encoding import PositionEmbeddingSine
from sam3.model.sam3_image import Sam3Image
from sam3.model.text_encoder_ve import VETextEncoder
from sam3.model.vitdet import ViT
from sam3.model.vl_combiner import SAM3VLBackbone
from torch import nn

from scclip_fast.sam3 import Sam3CalibrationConfig
from scclip_fast.sam3.config import STAGES

SIDE, PATCH, LAYERS, QUERIES, WIDTH = 64, 8, 6, 40, 32
GRID = SIDE // PATCH
NONE = replace(Sam3CalibrationConfig.for_depth(LAYERS), **dict.fromkeys(STAGES, False))
ALL = replace(NONE, decoder_layers=(-1, 2), **dict.fromkeys(STAGES, True))
TENSORS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logit_dec", "semantic_seg")


def _trunk() -> ViT:
    return ViT(
        img_size=SIDE,
        pretrain_img_size=32,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=2,
        mlp_ratio=1.5,
        global_att_blocks=(2, 5),
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=4,
        retain_cls_token=False,
        ln_pre=True,
        bias_patch_embed=False,
    )


def _attention(batch_first: bool = False) -> nn.Module:
    return model_misc.MultiheadAttentionWrapper(
        num_heads=4, dropout=0.0, embed_dim=WIDTH, batch_first=batch_first
    )


def _encoder_layer(image: bool) -> nn.Module:
    return encoder.TransformerEncoderLayer(
        activation="relu",
        d_model=WIDTH,
        dim_feedforward=48,
        dropout=0.0,
        pos_enc_at_attn=image,
        pos_enc_at_cross_attn_keys=not image,
        pos_enc_at_cross_attn_queries=False,
        pre_norm=True,
        self_attention=_attention(image),
        cross_attention=_attention(image),
    )


def _transformer() -> nn.Module:
    layer = decoder.TransformerDecoderLayer(
        activation="relu",
        d_model=WIDTH,
        dim_feedforward=48,
        dropout=0.0,
        cross_attention=_attention(),
        n_heads=4,
        use_text_cross_attention=True,
    )
    return model_misc.TransformerWrapper(
        encoder=encoder.TransformerEncoderFusion(
            layer=_encoder_layer(True),
            num_layers=2,
            d_model=WIDTH,
            num_feature_levels=1,
            frozen=False,
            add_pooled_text_to_img_feat=False,
            pool_text_with_mask=True,
            use_act_checkpoint=True,
        ),
        decoder=decoder.TransformerDecoder(
            layer=layer,
            num_layers=3,
            num_queries=QUERIES,
            return_intermediate=True,
            box_refine=True,
            num_o2m_queries=0,
            dac=True,
            boxRPB="log",
            d_model=WIDTH,
            frozen=False,
            interaction_layer=None,
            dac_use_selfatt_ln=True,
            presence_token=True,
            use_act_checkpoint=True,
        ),
        d_model=WIDTH,
    )


def _tokens(texts: list[str], context_length: int) -> torch.Tensor:
    """Token ids of texts: one for each character, and 0 for padding."""
    rows = [[ord(c) % 99 + 1 for c in text[:context_length]] for text in texts]
    return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def _image_model() -> Sam3Image:
    positions = PositionEmbeddingSine(num_pos_feats=WIDTH)
    neck = necks.Sam3DualViTDetNeck(
        position_encoding=positions, d_model=WIDTH, trunk=_trunk(), add_sam2_neck=True
    )
    text = VETextEncoder(
        d_model=WIDTH,
        tokenizer=_tokens,
        width=WIDTH,
        heads=2,
        layers=1,
        context_length=8,
        vocab_size=100,
    )
    geometry = geometry_encoders.SequenceGeometryEncoder(
        pos_enc=copy.deepcopy(positions),
        encode_boxes_as_points=False,
        points_direct_project=True,
        points_pool=True,
        points_pos_enc=True,
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=WIDTH,
        num_layers=1,
        layer=_encoder_layer(False),
        add_cls=True,
        add_post_encode_proj=True,
    )
    head = UniversalSegmentationHead(
        hidden_dim=WIDTH,
        upsampling_stages=3,
        act_ckpt=True,
        cross_attend_prompt=_attention(),
        pixel_decoder=PixelDecoder(hidden_dim=WIDTH, num_upsampling_stages=3),
    )
    mlp = model_misc.MLP(WIDTH, 48, WIDTH, 2, residual=True, out_norm=nn.LayerNorm(WIDTH))
    return Sam3Image(
        backbone=SAM3VLBackbone(visual=neck, text=text, scalp=1),
        transformer=_transformer(),
        input_geometry_encoder=geometry,
        segmentation_head=head,
        dot_prod_scoring=model_misc.DotProductScoring(WIDTH, WIDTH, prompt_mlp=mlp),
        use_instance_query=False,
    )


def tiny_meta() -> Sam3Image:
    """A frozen model in evaluation mode, with the same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _image_model()
        text = model.backbone.language_backbone.encoder
        with torch.no_grad():
            for empty in (text.positional_embedding, text.text_projection):
                nn.init.normal_(empty, std=0.1)  # uninitialised in the package
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def pixels(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all outputs of Meta's package are equal, bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in TENSORS)


def ground(model: Sam3Image, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The package's own sequence: the images (B, 3, H, W) first, then a text for each of them."""
    return prompt(model, model.backbone.forward_image(images), len(images))


def prompt(model: Sam3Image, encoded: dict, count: int) -> dict[str, torch.Tensor]:
    """Grounds a text in each of `count` images; `encoded` is the backbone's result for them."""
    texts = ["house", "tree", "car"][:count]
    index = torch.arange(count)
    stage = FindStage(index, index, *[None] * 5)
    encoded = encoded | model.backbone.forward_text(texts, device="cpu")
    with pinned():
        return model.forward_grounding(encoded, stage, None, model._get_dummy_prompt(count))


def pinned() -> AbstractContextManager:
    """Disables pinning of memory, which the package does and torch refuses without a GPU."""
    return mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)

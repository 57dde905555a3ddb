"""Every stage of the calibration in the SAM3 of Meta's package equals plain code."""

from dataclasses import replace
from functools import partial

import published_sam3
import pytest
import torch
import torch.nn.functional as F
from published_lof import lof_mask

from scclip_fast.sam3 import calibrate
from scclip_fast.sam3.config import STAGES

pytest.importorskip("sam3", reason="Meta's sam3 is not installed; CONTRIBUTING.md says how")

from tiny_meta import GRID, NONE, QUERIES, WIDTH, equal, ground, pixels, tiny_meta

CLOSE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture
def model():
    return tiny_meta()


def recorded(modules):
    """Lists to which hooks append the outputs of the modules, and the hooks."""
    outputs = [[] for _ in modules]
    return outputs, [
        module.register_forward_hook(lambda _, args, out, to=to: to.append(out))
        for module, to in zip(modules, outputs, strict=True)
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stages", published_sam3.TRUNKS)
@torch.no_grad()
def test_trunk(model, batch, stages):
    config = replace(NONE, residual_weight=0.4, **dict.fromkeys(stages, True))
    images, grid = pixels(batch), (GRID, GRID)
    neck = model.backbone.vision_backbone
    blocks = neck.trunk.blocks
    block_outputs, hooks = recorded(blocks[:-1])
    frozen = model.backbone.forward_image(images)
    for hook in hooks:
        hook.remove()

    def last(tokens, content):
        return published_sam3.last_block(blocks[-1], tokens, grid, content, config)

    plain = [
        published_sam3.calibrated(
            [out[i].flatten(0, 1) for (out,) in block_outputs], last, grid, config
        )
        for i in range(batch)
    ]
    expected = torch.stack([tokens for tokens, _ in plain])
    map_ = expected.mT.unflatten(2, grid)
    with calibrate(model, config):
        out = model.backbone.forward_image(images)
    assert torch.allclose(out["calibrated_features"], expected, **CLOSE)
    # The features of the detector, and those of the tracker and the interactive predictor.
    for convs, after, before in (
        (neck.convs, out, frozen),
        (neck.sam2_convs, out["sam2_backbone_out"], frozen["sam2_backbone_out"]),
    ):
        assert torch.allclose(after["backbone_fpn"][2], convs[2](map_), **CLOSE)
        assert not torch.allclose(after["backbone_fpn"][2], before["backbone_fpn"][2], **CLOSE)
    if config.trunk_repair:
        mask = torch.stack([mask for _, mask in plain]).view(batch, GRID, GRID)
        assert torch.equal(out["outlier_mask"], mask) and mask.any()
        assert out["lof_scores"].shape == mask.shape
    else:
        assert out["outlier_mask"] is None and out["lof_scores"] is None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layers", [(-1,), (0, 2)])
@torch.no_grad()
def test_queries(model, batch, layers):
    """Object queries are calibrated, and the presence token stays as it is."""
    config = replace(NONE, decoder_calibration=True, decoder_layers=layers, similarity_beta=0.1)
    images = pixels(batch)
    (outputs,), _ = recorded([model.transformer.decoder.layers[layers[0]]])
    frozen = ground(model, images)
    with calibrate(model, config):
        out = ground(model, images)
    (before, presence), (after, same) = outputs
    hidden = torch.cat([presence, before]).transpose(0, 1)
    expected = torch.stack([published_sam3.queries(image, config) for image in hidden])[:, 1:]
    assert torch.allclose(after.transpose(0, 1), expected, **CLOSE)
    assert torch.equal(presence, same) and not torch.allclose(after, before, **CLOSE)
    assert out["query_features"].shape == (3, batch, QUERIES, WIDTH)
    assert torch.equal(out["query_features"][-1], out["queries"])
    assert not torch.equal(out["pred_masks"], frozen["pred_masks"])


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_cross_attention(model, batch):
    config = replace(NONE, cross_attention=True, similarity_beta=0.1, residual_weight=0.4)
    images, calls = pixels(batch), []
    frozen = ground(model, images)
    attentions = [layer.cross_attn_image for layer in model.transformer.encoder.layers]
    for attention in attentions:
        attention.register_forward_hook(
            lambda _, __, given, out: calls.append((given, out[0])), with_kwargs=True
        )
    with calibrate(model, config):
        out = ground(model, images)
    assert len(calls) == len(attentions) == 2
    for attention, (given, attended) in zip(attentions, calls, strict=True):
        inner = [
            partial(F.linear, weight=weight, bias=bias)
            for weight, bias in zip(
                attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
            )
        ]
        keep = ~given["key_padding_mask"]
        expected = [
            published_sam3.cross_attended(
                tokens, prompt, kept, [*inner, attention.out_proj], attention.num_heads, config
            )
            for tokens, prompt, kept in zip(given["query"], given["key"], keep, strict=True)
        ]
        assert torch.allclose(attended, torch.stack(expected), **CLOSE)
    assert not torch.allclose(out["pred_masks"], frozen["pred_masks"], **CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stages", [("mask_repair",), ("mask_threshold",), STAGES[-2:]])
@torch.no_grad()
def test_mask_head(model, batch, stages):
    config = replace(NONE, similarity_beta=0.05, **dict.fromkeys(stages, True))
    images, head = pixels(batch), model.segmentation_head
    outputs, hooks = recorded([head.mask_predictor.mask_embed, head.instance_seg_head])
    frozen = ground(model, images)
    for hook in hooks:
        hook.remove()
    (queries,), (features,) = outputs
    with calibrate(model, config):
        out = ground(model, images)
    expected = [published_sam3.masks(q, p, config) for q, p in zip(queries, features, strict=True)]
    assert torch.allclose(out["pred_masks"], torch.stack(expected), **CLOSE)
    assert not torch.allclose(out["pred_masks"], frozen["pred_masks"], **CLOSE)
    assert torch.equal(out["semantic_seg"], frozen["semantic_seg"])
    if config.mask_threshold:
        assert 0.05 < (out["pred_masks"] == 0).float().mean() < 0.95


@torch.no_grad()
def test_mask_repair_on_the_tokens(model):
    on = dict(mask_repair=True, mask_threshold=True, similarity_beta=0.05)
    config, images = replace(NONE, mask_grid="tokens", **on), pixels(2)
    head = model.segmentation_head
    decoder, calls = head.pixel_decoder, []
    hook = decoder.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    ground(model, images)
    (queries, features), hooks = recorded([head.mask_predictor.mask_embed, head.instance_seg_head])
    with calibrate(model, config):
        out = ground(model, images)
    for each in (hook, *hooks):
        each.remove()
    (maps, _), (_, decoded) = calls
    repaired = []
    for tokens in maps[-1].flatten(2).mT:
        mask = lof_mask(tokens, 30, 0.05)
        repaired.append(published_sam3.repaired(tokens, mask, GRID, GRID).T.view(-1, GRID, GRID))
    assert torch.allclose(decoded, decoder([*maps[:-1], torch.stack(repaired)]), **CLOSE)
    assert not torch.allclose(decoded, decoder(maps), **CLOSE)
    pairs = zip(queries[0], features[0], strict=True)
    expected = torch.stack([published_sam3.masks(q, p, config) for q, p in pairs])
    assert torch.allclose(out["pred_masks"], expected, **CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", [NONE, replace(NONE, trunk_repair=True, residual_weight=0.0)])
@torch.no_grad()
def test_off_is_the_frozen_model(model, batch, config):
    images = pixels(batch)
    frozen = ground(model, images)
    with calibrate(model, config):
        out = ground(model, images)
    assert equal(out, frozen) and out["calibrated_features"] is None

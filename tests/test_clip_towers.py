"""Vision towers of timm and CoCa in open_clip: the library's own features, and every method."""

from collections import Counter
from functools import partial

import open_clip
import pytest
import timm.models.vision_transformer_hybrid as hybrid
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from timm.layers import HybridEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from tiny_clip import images, randomise, tiny_clip
from torch import nn

from scclip_fast.clip import METHODS, SCCLIP
from scclip_fast.clip.model import _tower_class
from scclip_fast.clip.openclip_tower import pooled_alone

SIDE, GRID = 64, 8
SMALL = dict(img_size=SIDE, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=12)
STEM = dict(channels=(8, 16, 32), stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=0)
MAPPED = dict(global_pool="map", num_classes=0)
#: A small trunk like that of each family.
TRUNKS = {
    "SigLIP": partial(VisionTransformer, **SMALL | MAPPED, class_token=False),
    "MobileCLIP-B": lambda: VisionTransformer(
        **SMALL | dict(patch_size=1, global_pool="token", no_embed_class=True),
        embed_layer=partial(HybridEmbed, backbone=hybrid.ConvStem(**STEM), proj=False),
    ),
    "registers, scale, norms": partial(
        VisionTransformer, **SMALL, reg_tokens=2, init_values=0.5, qk_norm=True, pre_norm=True
    ),
    "EVA01": partial(Eva, **SMALL, global_pool="token", init_values=0.5),
    "EVA02": partial(
        Eva,
        **SMALL,
        **dict(global_pool="token", qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
        **dict(scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(6, 6)),
    ),
    "EVA02-E": partial(Eva, **SMALL, global_pool="token", use_post_norm=True),
    "PE-Core": partial(
        Eva,
        **SMALL | MAPPED,
        **dict(attn_type="rope", use_pre_transformer_norm=True, use_rot_pos_emb=True),
        **dict(ref_feat_shape=(8, 8), rope_grid_offset=1.0, rope_grid_indexing="xy"),
        **dict(class_token=False, attn_pool_num_heads=2, attn_pool_mlp_ratio=2.0),
    ),
    "rotary alone": partial(
        Eva, **SMALL, use_abs_pos_emb=False, use_rot_pos_emb=True, ref_feat_shape=(6, 6)
    ),
}


class Clip(nn.Module):
    """The vision tower of an open_clip model."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual


def clip_of(family):
    """A frozen model in float64, where nothing is lost in rounding."""
    visual = open_clip.timm_model.TimmModel("test_vit", embed_dim=12, image_size=SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual.trunk = TRUNKS[family]()
        visual.head = nn.Linear(32, 12) if visual.trunk.num_classes == 0 else nn.Identity()
        randomise(visual)
        for parameter in visual.trunk.parameters():
            if parameter.dim() >= 2:
                parameter.data *= 10  # so that attention is no mean over all tokens
    return Clip(visual).double().eval().requires_grad_(False)


def spatial(trunk, pixels):
    """timm's outputs (B, h w, D) of all blocks, without class tokens and registers."""
    outputs = trunk.forward_intermediates(pixels, intermediates_only=True)
    return [output.flatten(2).mT for output in outputs]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", TRUNKS)
def test_outputs_are_timms(family):
    model, pixels = clip_of(family), images(2, SIDE, SIDE).double()
    encoder, trunk = SCCLIP(model, method="clip"), model.visual.trunk
    expected = spatial(trunk, pixels)
    layers, grid = encoder.layers(pixels)
    assert (grid, encoder.patch_size, len(layers)) == ((GRID, GRID), SIDE // GRID, 3)
    tower = encoder.tower.at(grid)
    for output, timms in zip(layers, expected, strict=False):
        assert_equal(tower.patches(output), timms)
    assert tower.class_token(layers[-1]).abs().sum().bool() == tower.has_class_token
    # Each patch through timm's own head, as the only token of its image.
    alone = trunk.norm(expected[-1]).flatten(0, 1)[:, None]
    pooled = alone[:, 0] if trunk.attn_pool is None else trunk.attn_pool(alone)
    dense = F.normalize(model.visual.head(trunk.head(trunk.fc_norm(pooled))), dim=-1)
    assert_equal(encoder(pixels).flatten(0, 2), dense)


@pytest.mark.parametrize("family", ["EVA02", "PE-Core", "rotary alone"])
def test_rotation_on_another_grid(family):
    """timm sets the size of a model; absolute positions are stretched by another rule there."""
    model, pixels = clip_of(family), images(1, 40, 96).double()
    if model.visual.trunk.pos_embed is not None:
        model.visual.trunk.pos_embed.zero_()
    tower = SCCLIP(model).tower
    outputs, grid = tower.block_outputs(pixels)
    model.visual.trunk.set_input_size(img_size=(40, 96))
    assert grid == (5, 12)
    for output, timms in zip(outputs, spatial(model.visual.trunk, pixels), strict=False):
        assert_equal(tower.patches(output), timms)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TRUNKS)
def test_every_method_runs(family, method):
    """The features of an image do not depend on the other images, and rows are not mixed up."""
    encoder = SCCLIP(clip_of(family), method=method)
    pixels = images(2, 56, 80).double()
    dense = encoder(pixels)
    assert dense.shape == (2, 7, 10, 12)
    assert_equal(dense.norm(dim=-1), torch.ones(2, 7, 10).double())
    assert_equal(encoder(pixels[1:]), dense[1:])
    if method != "clip":
        assert not torch.allclose(SCCLIP(encoder.model, method="clip")(pixels), dense, atol=1e-4)


def test_half_precision():
    model, pixels = clip_of("EVA02"), images(1, 48, SIDE)
    expected = SCCLIP(model)(pixels.double())
    found = SCCLIP(model.bfloat16())(pixels.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm(dim=-1).median() < 0.05


def test_coca_pools_each_patch_alone():
    model = tiny_clip(layers=3, attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    pool, tokens = model.visual.attn_pool, torch.randn(5, 1, 32)
    assert_equal(pooled_alone(pool, tokens[:, 0]), pool(tokens)[:, 0])
    pixels = images(2, 32, 40)
    for method in METHODS:
        assert SCCLIP(model, method=method)(pixels).shape == (2, 8, 10, 24)


REFUSED = {
    "convnext": (
        lambda: timm_model("test_convnext"),
        "timm's ConvNeXt: only its plain vision transformers",
    ),
    "blocks": (lambda: with_trunk(block_fn=OtherBlock), "blocks of timm's OtherBlock"),
    "gate": (lambda: with_trunk(gate=nn.Linear(32, 32)), "has gated attention: not supported"),
}


class OtherBlock(Block):
    pass


def timm_model(name):
    return Clip(open_clip.timm_model.TimmModel(name, embed_dim=8, image_size=32))


def with_trunk(gate=None, **changed):
    model = timm_model("test_vit")
    model.visual.trunk = VisionTransformer(**SMALL, **changed)
    model.visual.trunk.blocks[0].attn.gate = gate
    return model


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_towers_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        SCCLIP(make())


@pytest.mark.slow
def test_all_models_of_open_clip():
    """Every configuration runs, on the meta device, or is refused in one line with the reason."""
    tags = Counter(model for model, _ in open_clip.list_pretrained())
    runs, reasons = [], Counter()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        settings = config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        with torch.device("meta"):
            model = Clip(_build_vision_tower(*settings))
        try:
            tower = _tower_class(model)(model)
        except ValueError as error:
            reasons[str(error)] += 1
            continue
        side = model.visual.image_size
        size = side if isinstance(side, tuple) else (side, side)
        outputs, grid = tower.block_outputs(torch.empty(1, 3, *size, device="meta"))
        features = tower.unit_features(tower.patches(outputs[-1]))
        assert features.shape == (1, grid[0] * grid[1], config["embed_dim"]), name
        runs.append(name)
    assert len(runs) >= 95 and sum(tags[name] for name in runs) >= 143
    kinds = ("ConvNeXt", "FastVit", "SwinTransformer", "VisionTransformerRelPos", "ModifiedResNet")
    assert {kind for kind in kinds for reason in reasons if kind in reason} == set(kinds)
    assert len(reasons) == len(kinds) and not any("\n" in reason for reason in reasons)

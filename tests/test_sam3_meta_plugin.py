"""Installing, using and removing the calibration in the SAM3 of Meta's package."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scclip_fast.sam3 import calibrate, to_seed_dict
from scclip_fast.sam3.state import ForwardState

pytest.importorskip("sam3", reason="Meta's sam3 is not installed; CONTRIBUTING.md says how")

from sam3.model.sam3_image import Sam3Image, Sam3ImageOnVideoMultiGPU
from sam3.model.sam3_image_processor import Sam3Processor
from tiny_meta import (
    ALL,
    GRID,
    NONE,
    QUERIES,
    SIDE,
    WIDTH,
    equal,
    ground,
    pinned,
    pixels,
    prompt,
    tiny_meta,
)

CLOSE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture
def model():
    return tiny_meta()


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_removal_restores_the_model(model, batch):
    images = pixels(batch)
    frozen, state = ground(model, images), copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    for _ in range(2):
        handle = calibrate(model, ALL)
        assert isinstance(model, Sam3Image) and list(model.state_dict()) == list(state)
        assert not equal(ground(model, images), frozen)
        assert model.scclip == ForwardState(ALL)
        handle.remove()
        handle.remove()
        assert [type(module) for module in model.modules()] == kinds
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert equal(ground(model, images), frozen)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_images_are_found_once(model):
    """Prompts of one image share its features, which do not depend on the batch."""
    images = pixels(2)
    with calibrate(model, ALL):
        encoded = model.backbone.forward_image(images)
        out, again = prompt(model, encoded, 2), prompt(model, encoded, 2)
        single = model.backbone.forward_image(images[1:])
    assert equal(out, again) and torch.equal(out["outlier_mask"], encoded["outlier_mask"])
    assert torch.equal(encoded["outlier_mask"][1:], single["outlier_mask"])
    features = encoded["calibrated_features"]
    assert torch.allclose(features[1:], single["calibrated_features"], **CLOSE)
    assert out["calibrated_features"] is features


def test_processor(model):
    """The package's own processor, which runs in inference mode."""
    processor = Sam3Processor(model, SIDE, device="cpu", confidence_threshold=0.0)
    image = torch.randint(256, (3, 48, 80), dtype=torch.uint8)

    def masks():
        with pinned():
            state = processor.set_text_prompt("house", processor.set_image(image))
        return state["masks_logits"], state["backbone_out"].get("outlier_mask")

    frozen, _ = masks()
    with calibrate(model):
        calibrated, outliers = masks()
    assert calibrated.shape == frozen.shape == (QUERIES, 1, 48, 80)
    assert calibrated.isfinite().all() and not torch.equal(calibrated, frozen)
    assert outliers.shape == (1, GRID, GRID)


@torch.no_grad()
def test_inference_mode_autocast_and_double(model):
    images = pixels(1)
    with calibrate(model, ALL):
        single = ground(model, images)
        with torch.inference_mode():
            assert equal(ground(model, images), single)
        expected = single["calibrated_features"]
        with torch.autocast("cpu", torch.bfloat16):
            out = ground(model, images)
        double = model.double().backbone.forward_image(images.double())["calibrated_features"]
    assert out["pred_masks"].isfinite().all()
    assert (out["calibrated_features"].float() - expected).norm() < 0.05 * expected.norm()
    assert torch.allclose(double.float(), expected, atol=1e-4)


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_compile(model, before):
    """The trunk compiles to one graph, before installing, as the package does it, or after."""
    trunk, images = model.backbone.vision_backbone.trunk, pixels(1)
    how = dict(backend="aot_eager", fullgraph=True)
    frozen = trunk(images)[0]
    with calibrate(model, ALL):
        expected = trunk(images)[0]
    torch.compiler.reset()
    if before:
        trunk.forward = torch.compile(trunk.forward, **how)
        assert torch.allclose(trunk(images)[0], frozen, atol=1e-4)
    handle = calibrate(model, ALL)
    if not before:
        trunk.compile(**how)
    assert torch.allclose(trunk(images)[0], expected, atol=1e-4)
    handle.remove()
    assert torch.allclose(trunk(images)[0], frozen, atol=1e-4)


@torch.no_grad()
def test_nothing_is_held_after_an_error(model):
    def fail(*_):
        raise RuntimeError("mine")

    trunk = model.backbone.vision_backbone.trunk
    with calibrate(model, ALL):
        for module in (trunk.blocks[-2], trunk):
            hook = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="mine"):
                model.backbone.forward_image(pixels(1))
            hook.remove()
            assert model.scclip == ForwardState(ALL)


@torch.no_grad()
def test_seed_dictionary(model):
    images = pixels(2)
    with pytest.raises(TypeError, match="output must be that of a calibrated Sam3Model"):
        to_seed_dict(ground(model, images))
    with calibrate(model):
        out = ground(model, images)
    seed = to_seed_dict(out)
    image, token = seed.pop("outlier_indices").unbind(dim=1)
    assert out["outlier_mask"].flatten(1)[image, token].all()
    assert len(image) == out["outlier_mask"].sum() > 0
    assert {name: tuple(value.shape) for name, value in seed.items()} == dict(
        pred_logits=(3, 2, QUERIES, WIDTH),
        pred_boxes=(3, 2, QUERIES, 4),
        pred_masks=(2, QUERIES, 32, 32),
        semantic_seg=(2, 1, 32, 32),
        presence_logit=(2, 1),
        calibrated_features=(2, GRID * GRID, WIDTH),
    )
    assert 0 <= seed["pred_boxes"].min() and seed["pred_boxes"].max() <= 1


def windowed(model):
    model.backbone.vision_backbone.trunk.blocks[-1].window_size = 4


def compiled(model):
    decoder = model.segmentation_head.pixel_decoder
    decoder.forward = torch.compile(decoder.forward)


def relative(model):
    model.backbone.vision_backbone.trunk.blocks[-1].attn.use_rel_pos = True


def all_masks(model):
    model.segmentation_head.aux_masks = True


def headless(model):
    model.segmentation_head = None


def on_video(model):
    model.__class__ = Sam3ImageOnVideoMultiGPU


TOKENS = replace(ALL, mask_grid="tokens")
REFUSED = [
    (windowed, ALL, "attention over all tokens; got window_size=4"),
    (compiled, TOKENS, "PixelDecoder has a forward .* compile_mode"),
    (relative, ALL, "use_rel_pos=True"),
    (all_masks, ALL, "need a segmentation_head .* got aux_masks=True"),
    (headless, ALL, "need a segmentation_head .* got none"),
    (on_video, ALL, "needs SAM3's own Sam3Image, got .*Sam3ImageOnVideoMultiGPU"),
    (lambda model: None, replace(ALL, pre_adjust_idx=5), r"pre_adjust_idx must be in \[0, 4\]"),
]


@pytest.mark.parametrize("change, config, message", REFUSED)
def test_refused(model, change, config, message):
    change(model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        calibrate(model, config)
    assert [type(module) for module in model.modules()] == kinds


def test_other_parts_without_a_stage(model):
    windowed(model)
    compiled(model)
    calibrate(model, replace(NONE, mask_repair=True)).remove()
    headless(model)
    calibrate(model, NONE).remove()


def test_refused_later(model):
    images = pixels(1)
    with calibrate(model, ALL):
        with pytest.raises(ValueError, match="calibrated already; call remove"):
            calibrate(model)
        with pytest.raises(ValueError, match="samples must be finite"):
            model.backbone.forward_image(images * torch.nan)
        encoded = model.backbone.forward_image(images)
        model.train()
        with pytest.raises(ValueError, match="must be in evaluation mode, got one in training"):
            model.backbone.forward_image(images)
        with pytest.raises(ValueError, match="must be in evaluation mode, got one in training"):
            prompt(model, encoded, 1)


def test_transformers_is_not_needed():
    code = """
import sys
sys.modules["transformers"] = None
import torch
from scclip_fast.sam3 import calibrate
from tiny_meta import ground, tiny_meta
model = tiny_meta()
with calibrate(model):
    assert ground(model, torch.randn(1, 3, 64, 64))["outlier_mask"].any()
"""
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=here)

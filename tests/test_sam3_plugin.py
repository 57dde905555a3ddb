"""Installing, using and removing the calibration of transformers' SAM3."""

import copy
import json
import pickle

import pytest
import torch
from tiny_sam3 import ALL, NONE, inputs, tiny_sam3
from transformers import Sam3Model

from scclip_fast.sam3 import calibrate

TENSORS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


@pytest.fixture
def model():
    return tiny_sam3()


def same(first, second, **tolerance):
    return all(
        torch.allclose(getattr(first, n), getattr(second, n), **tolerance)
        if tolerance
        else torch.equal(getattr(first, n), getattr(second, n))
        for n in TENSORS
    )


@torch.no_grad()
def test_removal_restores_the_model(model):
    given = inputs(2)
    kinds = [type(module) for module in model.modules()]
    names = [set(module.__dict__) for module in model.modules()]
    frozen, state = model(**given), copy.deepcopy(model.state_dict())
    for _ in range(2):
        handle = calibrate(model, ALL)
        assert isinstance(model, Sam3Model) and list(model.state_dict()) == list(state)
        assert not same(model(**given), frozen)
        handle.remove()
        handle.remove()
        assert [type(module) for module in model.modules()] == kinds
        assert [set(module.__dict__) for module in model.modules()] == names
        assert same(model(**given), frozen)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


@torch.no_grad()
def test_context_manager_removes_after_an_error(model):
    with pytest.raises(RuntimeError, match="mine"), calibrate(model, ALL) as handle:
        assert handle.config == ALL
        raise RuntimeError("mine")
    assert type(model) is Sam3Model


@torch.no_grad()
def test_vision_embeds_are_calibrated_once(model):
    """Several prompts share one image; the output of each has the results of its trunk."""
    given = inputs(1)
    pixels = given.pop("pixel_values")
    calls = []
    with calibrate(model, ALL):
        whole = model(pixel_values=pixels, **given)
        embeds = model.get_vision_features(pixel_values=pixels)
        hook = model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
        again = model(vision_embeds=embeds, **given)
        other = inputs(1)
        other.pop("pixel_values")
        changed = model(vision_embeds=embeds, **other)
        hook.remove()
    assert not calls and same(whole, again) and not same(whole, changed)
    for out in (whole, again, changed):
        assert torch.equal(out.outlier_mask, embeds.outlier_mask)
        assert torch.equal(out.calibrated_features, embeds.last_hidden_state)


@torch.no_grad()
def test_batches_are_independent(model):
    given = inputs(3)
    with calibrate(model, ALL):
        together = model(**given)
        alone = [model(**{k: v[i : i + 1] for k, v in given.items()}) for i in range(3)]
    masks = torch.cat([out.pred_masks for out in alone])
    assert torch.allclose(together.pred_masks, masks, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_and_the_text_mask(attention):
    """Padding is not read: other tokens in its place change nothing."""
    model, given = tiny_sam3(attention), inputs(2)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, -2:] = 50
    read = {**other, "attention_mask": torch.ones_like(given["attention_mask"])}
    with calibrate(model, ALL):
        first = model(**given)
        assert same(first, model(**other), atol=1e-5) and not same(first, model(**read), atol=1e-5)
    assert model.config._attn_implementation == attention
    reference = tiny_sam3("eager")
    with calibrate(reference, ALL):
        assert same(first, reference(**given), atol=1e-4)


@torch.no_grad()
def test_box_prompts(model):
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]])
    with calibrate(model, ALL):
        given = inputs(1)
        assert not same(model(**given), model(**given, input_boxes=boxes))


def test_inference_mode_and_autocast(model):
    given = inputs(1)
    with calibrate(model, ALL):
        with torch.no_grad():
            expected = model(**given)
        with torch.inference_mode():
            assert same(model(**given), expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = model(**given)
    assert out.pred_masks.isfinite().all()
    error = (out.calibrated_features.float() - expected.calibrated_features).norm()
    assert error < 0.05 * expected.calibrated_features.norm()


@torch.no_grad()
def test_moved_after_installing(model):
    given = inputs(1)
    with calibrate(model, ALL):
        single = model(**given)
        model.to(torch.float64)
        given["pixel_values"] = given["pixel_values"].double()
        double = model(**given)
        assert double.calibrated_features.dtype == torch.float64
        features = double.calibrated_features.float()
        assert torch.allclose(features, single.calibrated_features, atol=1e-4)
        model.to(torch.bfloat16)
        given["pixel_values"] = given["pixel_values"].bfloat16()
        assert model(**given).pred_masks.isfinite().all()


@torch.no_grad()
def test_copies_and_checkpoints(model, tmp_path):
    given = inputs(1)
    frozen = model(**given)
    with calibrate(model, ALL):
        calibrated = model(**given)
        copied = copy.deepcopy(model)
        unpickled = pickle.loads(pickle.dumps(model))
        model.save_pretrained(tmp_path)
    assert same(model(**given), frozen)
    assert same(copied(**given), calibrated) and same(unpickled(**given), calibrated)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Sam3Model"]
    loaded = Sam3Model.from_pretrained(tmp_path).eval()
    assert same(loaded(**given), frozen, atol=1e-5)


@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False])
@torch.no_grad()
def test_compile(model, before):
    """`vision_encoder` and `mask_decoder` compile to one graph each, before or after installing."""
    given = inputs(1)
    frozen = model(**given)
    with calibrate(model, ALL):
        expected = model(**given)

    def compile_parts():
        torch.compiler.reset()
        for module in (model.vision_encoder, model.mask_decoder):
            module.compile(backend="aot_eager", fullgraph=True)

    if before:
        compile_parts()
        assert same(model(**given), frozen, atol=1e-4)
    handle = calibrate(model, ALL)
    if not before:
        compile_parts()
    assert same(model(**given), expected, atol=1e-4)
    handle.remove()
    assert same(model(**given), frozen, atol=1e-4)


@torch.no_grad()
def test_positional_arguments(model):
    given = inputs(2)
    call = (given["pixel_values"], None, given["input_ids"], given["attention_mask"])
    frozen = model(**given)
    with calibrate(model, NONE):
        assert same(model(*call), frozen)
    with calibrate(model, ALL):
        assert same(model(*call), model(**given))


@torch.no_grad()
def test_trunk_runs_once_a_call(model):
    calls = []
    with calibrate(model, ALL):
        hook = model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
        model(**inputs(1))
        hook.remove()
    assert len(calls) == 1

"""Outputs of a calibrated SAM3: transformers' own with more fields, and no tensor that is kept."""

import pytest
import torch
from tiny_sam3 import ALL, GRID, LAYERS, NONE, QUERIES, inputs, tiny_sam3
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from scclip_fast.sam3 import calibrate, to_seed_dict
from scclip_fast.sam3.state import ForwardState


@pytest.fixture
def model():
    return tiny_sam3()


@torch.no_grad()
def test_outputs_are_transformers_own(model):
    with calibrate(model, ALL):
        out = model(**inputs(2), output_hidden_states=True)
        as_tuple = model(**inputs(2), return_dict=False)
    assert isinstance(out, Sam3ImageSegmentationOutput) and isinstance(as_tuple, tuple)
    assert len(out.vision_hidden_states) == LAYERS + 1
    leaves, spec = tree_flatten(out)
    again = tree_unflatten(leaves, spec)
    assert type(again) is type(out) and torch.equal(again.outlier_mask, out.outlier_mask)
    image, token = out.outlier_indices.unbind(dim=1)
    assert out.outlier_mask.flatten(1)[image, token].all()
    assert len(image) == out.outlier_mask.sum()


def calls(model):
    """The outputs of every kind of call that transformers documents."""
    given = inputs(2)
    embeds = model.get_vision_features(given["pixel_values"])
    text = model.get_text_features(given["input_ids"], given["attention_mask"])
    mask = given["attention_mask"]
    boxes = dict(
        input_boxes=torch.rand(2, 3, 4), input_boxes_labels=torch.tensor([[1, 0, -10], [1, 1, 1]])
    )
    yield embeds
    yield model(**given, return_dict=False)
    yield model(given["pixel_values"], text_embeds=text, attention_mask=mask)
    yield model(vision_embeds=embeds, text_embeds=text, attention_mask=mask)
    yield model(vision_embeds=embeds, **boxes, text_embeds=text, attention_mask=mask)


@torch.no_grad()
def test_every_call_with_all_stages_off(model):
    with torch.random.fork_rng():
        frozen = list(calls(model))
    with calibrate(model, NONE):
        off = list(calls(model))
    for before, after in zip(frozen, off, strict=True):
        if not isinstance(before, tuple):
            assert isinstance(after, type(before))
            names = list(before)  # transformers' fields in their order, without added ones
            before, after = (
                {name: getattr(out, name) for name in names} for out in (before, after)
            )
        first, second = tree_flatten(before)[0], tree_flatten(after)[0]
        assert len(first) == len(second) > 4 and all(map(torch.equal, first, second))


@torch.no_grad()
def test_seed_dictionary(model):
    given = inputs(2)
    with pytest.raises(TypeError, match="output must be that of a calibrated Sam3Model"):
        to_seed_dict(model(**given))
    with calibrate(model):
        seed = to_seed_dict(model(**given))
    assert {k: tuple(v.shape) for k, v in seed.items() if k != "outlier_indices"} == dict(
        pred_logits=(3, 2, QUERIES, 32),
        pred_boxes=(3, 2, QUERIES, 4),
        pred_masks=(2, QUERIES, 32, 32),
        semantic_seg=(2, 1, 32, 32),
        presence_logit=(2, 1),
        calibrated_features=(2, GRID * GRID, 32),
    )
    assert seed["outlier_indices"].shape[1] == 2


@torch.no_grad()
def test_nothing_is_held_after_a_forward_pass(model):
    with calibrate(model, ALL):
        model(**inputs(1))
        assert model.scclip == ForwardState(ALL)


@torch.no_grad()
def test_nothing_is_held_after_an_error(model):
    def fail(*_):
        raise RuntimeError("mine")

    hook = model.mask_decoder.register_forward_hook(fail)
    with calibrate(model, ALL), pytest.raises(RuntimeError, match="mine"):
        model(**inputs(1))
    with calibrate(model, ALL):
        with pytest.raises(RuntimeError, match="mine"):
            model(**inputs(1))
        assert model.scclip == ForwardState(ALL)
    hook.remove()


@torch.no_grad()
def test_nothing_is_held_after_an_error_of_the_vision_encoder_alone(model):
    encoder, given = model.vision_encoder, inputs(1)["pixel_values"]

    def fail(*_):
        raise RuntimeError("mine")

    with calibrate(model, ALL):
        for module in (encoder.backbone.layers[-2], encoder.neck):
            hook = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="mine"):
                encoder(given)
            hook.remove()
            assert model.scclip == ForwardState(ALL)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_recorded_outputs(name):
    """Hidden states and attentions that transformers records equal those of the frozen model."""
    model, given = tiny_sam3("eager"), {**inputs(1), name: True}
    frozen = model(**given)
    with calibrate(model, NONE):
        off = model(**given)
    assert {*off} == {*frozen, "query_features"}
    for key in frozen:
        first, second = tree_flatten(off[key])[0], tree_flatten(frozen[key])[0]
        assert len(first) == len(second) and all(map(torch.equal, first, second))
    with calibrate(model, ALL):
        assert {*frozen} <= {*model(**given)}


@torch.no_grad()
def test_recording_leaves_nothing_behind(model):
    """transformers 5.0 leaves a forward on a recorded module, which would hide a new class's."""
    given = inputs(1)
    frozen = model(**given)
    with calibrate(model, ALL):
        expected = model(**given)
    for _ in range(2):
        model(**given, output_hidden_states=True)
        with calibrate(model, ALL):
            assert torch.equal(model(**given).pred_masks, expected.pred_masks)
            model(**given, output_hidden_states=True)
        assert torch.equal(model(**given).pred_masks, frozen.pred_masks)


def test_gradients(model):
    """Gradients of the pixels are the frozen model's with every stage off, finite with all on."""
    given = inputs(2)
    pixels = given["pixel_values"].requires_grad_()

    def gradient():
        return torch.autograd.grad(model(**given).pred_logits.sum(), pixels)[0]

    frozen = gradient()
    with calibrate(model, NONE):
        assert torch.equal(gradient(), frozen)
    with calibrate(model, ALL):
        assert gradient().isfinite().all() and not torch.allclose(gradient(), frozen)

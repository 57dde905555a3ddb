"""transformers' CLIP equals open_clip's with the same weights."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transformers
from copied_clip import alone, copied
from tiny_clip import PATCH, SIDE, VISION, images, tiny_clip
from torch import nn
from transformers import CLIPConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from scclip_fast.clip import METHODS, SCCLIP, SCCLIPConfig
from scclip_fast.clip.config import STAGES

EXACT = 1e-9  # features are float64 unit vectors: a larger difference is another formula
SIZES = [(32, 32), (48, 48), (24, 56), (33, 45), (1, 70)]  # the last two are resized


def assert_close(actual, expected, tolerance=EXACT):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def source():
    """A CLIP of open_clip with 4 blocks, float64."""
    return tiny_clip(layers=4, quick_gelu=True).double()


@pytest.fixture(scope="module")
def model(source):
    return copied(source)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_that_of_open_clip(source, model, method, size):
    x = images(2, *size).double()
    expected = SCCLIP(source, method=method).encode_dense(x)
    assert_close(SCCLIP(model, method=method).encode_dense(x), expected)


@pytest.mark.parametrize("on", list(product([False, True], repeat=5)), ids=str)
def test_switches(source, model, on):
    config = replace(SCCLIPConfig.for_depth(4), **dict(zip(STAGES, on, strict=True)))
    x = images(1, 28, 36).double()
    assert_close(SCCLIP(model, config)(x), SCCLIP(source, config)(x))


@pytest.mark.parametrize(("layers", "attention"), [(12, "kk"), (24, "qk")])
def test_presets_and_the_other_activation(layers, attention):
    source = tiny_clip(layers=layers).double()
    encoder = SCCLIP(copied(source, act="gelu"))
    assert encoder.config == SCCLIPConfig.for_depth(layers)
    assert encoder.patch_size == PATCH
    config = replace(encoder.config, self_attention=attention)
    x = images(2, 48, 40).double()
    assert_close(SCCLIP(encoder.model, config)(x), SCCLIP(source, config)(x))


@pytest.mark.parametrize("method", METHODS)
def test_float32(method):
    source = tiny_clip(layers=4, quick_gelu=True)
    x = images(2, 40, 34)
    expected = SCCLIP(source, method=method)(x)
    assert_close(SCCLIP(copied(source), method=method)(x), expected, 5e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_precisions(dtype, method):
    source = tiny_clip(layers=4, quick_gelu=True)
    x = images(2, 40, 34)
    expected = SCCLIP(source, method=method)(x)
    dense = SCCLIP(copied(source).to(dtype), method=method)(x)
    assert dense.dtype == dtype and dense.shape == expected.shape
    cosine = F.cosine_similarity(dense.float(), expected, dim=-1)
    # The median, because an outlier or threshold that rounding decides moves a few patches visibly.
    assert cosine.median() > (0.9999 if dtype == torch.float16 else 0.999)


@pytest.mark.parametrize(
    ("attention", "tolerance"),
    [("sdpa", EXACT), ("eager", 1e-6)],  # the softmax of "eager" is float32
)
def test_plain_clip_is_transformers_own(source, attention, tolerance):
    model = copied(source)
    model.set_attn_implementation(attention)
    x = images(2, SIDE, SIDE).double()
    hidden = model.vision_model(x).last_hidden_state[:, 1:]
    projected = model.visual_projection(model.vision_model.post_layernorm(hidden))
    dense = SCCLIP(model, method="clip")(x).flatten(1, 2)
    assert_close(dense, F.normalize(projected, dim=-1), tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_vision_models_alone(model, method):
    """Features of a model without the projection are those that the projection would take."""
    x = images(2, 24, 40).double()
    expected = SCCLIP(model, method=method)(x)
    projected = alone(model, CLIPVisionModelWithProjection)
    assert torch.equal(SCCLIP(projected, method=method)(x), expected)
    dense = SCCLIP(alone(model, CLIPVisionModel), method=method)(x)
    assert dense.shape == (2, 6, 10, VISION["width"])
    torch.testing.assert_close(dense.norm(dim=-1), torch.ones(2, 6, 10).double())
    assert_close(F.normalize(model.visual_projection(dense), dim=-1), expected)


def test_the_model_stays_as_it_was(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    encoder = SCCLIP(model)
    encoder(images(1, 40, 28).double())
    assert {f"model.{name}" for name in state} == set(encoder.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_weights_are_those_of_the_moment(source, model):
    encoder, x = SCCLIP(copy.deepcopy(model)), images(1, 24, 24).double()
    before, copied_before = encoder(x), copy.deepcopy(encoder)
    changed = {name: 1.1 * value for name, value in model.state_dict().items()}
    encoder.load_state_dict({f"model.{k}": v for k, v in changed.items()}, assign=True)
    other = copy.deepcopy(model)
    other.load_state_dict(changed)
    assert torch.equal(encoder(x), SCCLIP(other)(x))
    assert torch.equal(copied_before(x), before)


class Adapted(nn.Linear):
    """A layer that adds something to the output of the model's layer, as adapters do."""

    def forward(self, x):
        return super().forward(x) + x


@pytest.mark.parametrize("place", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_adapted_layers_are_called(model, place):
    adapted, x = copy.deepcopy(model), images(1, 24, 24).double()
    for layer in adapted.vision_model.encoder.layers:
        getattr(layer.self_attn, place).__class__ = Adapted
    expected = copy.deepcopy(model)
    for layer in expected.vision_model.encoder.layers:
        getattr(layer.self_attn, place).weight.diagonal().add_(1)
    config = replace(SCCLIPConfig.for_depth(4), self_attention="qk")
    assert_close(SCCLIP(adapted, config)(x), SCCLIP(expected, config)(x))
    assert not torch.allclose(SCCLIP(adapted, config)(x), SCCLIP(model, config)(x), atol=1e-3)


def test_compile_and_export():
    torch._dynamo.reset()
    encoder, x = SCCLIP(copied(tiny_clip(layers=3, quick_gelu=True))), images(2, 24, 36)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), encoder(x))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(encoder, (x,), dynamic_shapes=({0: batch},))
    more = images(5, 24, 36)
    torch.testing.assert_close(program.module()(more), encoder(more))


def others():
    """Models of transformers that are no CLIP or lack its vision transformer."""
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    small |= dict(image_size=8, patch_size=4)
    yield transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**small))
    yield transformers.ChineseCLIPVisionModel(transformers.ChineseCLIPVisionConfig(**small))
    yield transformers.CLIPSegVisionModel(transformers.CLIPSegVisionConfig(**small))
    config = CLIPConfig(vision_config=small)
    yield transformers.CLIPForImageClassification(config)
    text = dict(small, vocab_size=8)
    yield transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text))


def test_models_that_are_refused(model):
    for other in others():
        with pytest.raises(ValueError, match=f"transformers' CLIPModel.*{type(other).__name__}"):
            SCCLIP(other)
    with pytest.raises(ValueError, match=r"got torch\.nn.*DataParallel; of a wrapped"):
        SCCLIP(nn.DataParallel(model))
    with pytest.raises(ValueError, match="at least 2 blocks"):
        SCCLIP(copied(tiny_clip(layers=1)))

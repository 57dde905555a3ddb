"""Segmenter runs transformers' CLIP, and needs only one of the two libraries."""

import importlib
import re
import sys

import pytest
import torch
from copied_clip import alone, copied, their_tokenizer
from tiny_clip import images, photo, tiny_clip, tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

import scclip_fast
from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter

CLASSES = ["Sky", "person, an old woman's hat", "red car, " + 55 * "very " + "long name"]
SETTINGS = dict(short_side=48, slide_crop=32, slide_stride=16)
TEMPLATES = ["a photo of a {}.", lambda name: f"the {name} in a scene."]


@pytest.fixture(scope="module")
def encoders():
    """The same model in both libraries, in float64: rounding does not decide which are similar."""
    source = tiny_clip(layers=4, quick_gelu=True).double()
    return SCCLIP(source), SCCLIP(copied(source))


@pytest.fixture(scope="module")
def encoder(encoders):
    return encoders[1]


@pytest.mark.parametrize("templates", [None, TEMPLATES], ids=["openai", "own"])
def test_segmenter(encoders, templates):
    """The classes have synonyms, and a batch has long and short texts."""
    classes = CLASSES if templates else CLASSES[:2]
    settings = dict(SETTINGS, templates=templates)
    expected = Segmenter(encoders[0], tokenizer(), classes, **settings)
    found = Segmenter(encoders[1], their_tokenizer(), classes, **settings)
    torch.testing.assert_close(found.text_features, expected.text_features, rtol=0, atol=1e-6)
    image = photo(40, 52)
    probabilities = expected.probabilities(image)
    torch.testing.assert_close(found.probabilities(image), probabilities, rtol=0, atol=1e-5)


def test_a_processor_brings_its_means(encoder):
    theirs = CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    processor = CLIPProcessor(theirs, their_tokenizer())
    found = Segmenter(encoder, processor, CLASSES, templates=TEMPLATES)
    plain = Segmenter(encoder, their_tokenizer(), CLASSES, templates=TEMPLATES)
    torch.testing.assert_close(found.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(found.std.flatten(), torch.tensor([0.2, 0.3, 0.4]))
    assert torch.equal(found.text_features, plain.text_features)
    assert plain.mean[0] == pytest.approx(0.48145466)


@pytest.mark.parametrize("kind", [CLIPVisionModelWithProjection, CLIPVisionModel])
def test_segmenter_without_text(encoder, kind):
    with pytest.raises(ValueError, match=f"CLIPModel, got a {kind.__name__}"):
        Segmenter(SCCLIP(alone(encoder.model, kind)), their_tokenizer(), CLASSES)


@pytest.fixture
def import_without(monkeypatch):
    """Imports the package's clip and segment anew, as if one library were not installed."""

    def take_out():
        names = [name for name in sys.modules if re.match(r"scclip_fast\.(clip|segment)\b", name)]
        return {name: sys.modules.pop(name) for name in names}

    def import_without(library):
        monkeypatch.setitem(sys.modules, library, None)
        names = ("clip", "segment")
        return [importlib.import_module(f"scclip_fast.{name}") for name in names]

    for name in ("clip", "segment"):
        monkeypatch.setattr(scclip_fast, name, None)
    installed = take_out()
    yield import_without
    take_out()
    sys.modules.update(installed)


def test_transformers_without_open_clip(encoder, import_without):
    clip, segment = import_without("open_clip")
    anew, x = clip.SCCLIP(encoder.model), images(1, 24, 16).double()
    assert type(anew) is not SCCLIP
    assert torch.equal(anew(x), encoder(x))
    assert segment.Segmenter(anew, their_tokenizer(), CLASSES, templates=TEMPLATES)
    with pytest.raises(ModuleNotFoundError, match=r"scclip_fast\[clip\]"):
        segment.Segmenter(anew, their_tokenizer(), CLASSES)
    with pytest.raises(ModuleNotFoundError, match="open_clip"):
        clip.create_model("scenes")
    with pytest.raises(AttributeError, match="no attribute 'create'"):
        clip.create  # noqa: B018


def test_open_clip_without_transformers(import_without):
    clip, segment = import_without("transformers")
    encoder, tokenizer = clip.create_model("scenes")
    assert encoder(torch.rand(1, 3, 32, 48)).shape[1:3] == (2, 3)
    assert segment.Segmenter(encoder, tokenizer, CLASSES[:2])

"""Prompts and names that a model cannot encode as meant are errors; so are other tokenizers."""

import open_clip
import pytest
import torch
from copied_clip import copied, their_tokenizer
from tiny_clip import TEXT, VISION, photo, tiny_clip, tokenizer
from transformers import CLIPImageProcessor, CLIPProcessor

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter

LONG = 74 * "very "  # 77 tokens together with "dog", the start and the end


def with_context(length):
    """A tiny CLIP whose context has that many tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(24, VISION | dict(layers=3), TEXT | dict(context_length=length))
    return SCCLIP(model.eval())


@pytest.fixture(scope="module")
def ours():
    return SCCLIP(tiny_clip(layers=3))


@pytest.fixture(scope="module")
def theirs():
    return SCCLIP(copied(tiny_clip(layers=3)))


@pytest.fixture(params=["ours", "theirs", "processor"])
def make(request, ours, theirs):
    """Makes a Segmenter of a model and a tokenizer of either library."""
    words = {
        "ours": tokenizer,
        "theirs": their_tokenizer,
        "processor": lambda: CLIPProcessor(CLIPImageProcessor(), their_tokenizer()),
    }[request.param]()
    encoder = ours if request.param == "ours" else theirs

    def make(classes, templates=("{}",)):
        return Segmenter(encoder, words, classes, templates=list(templates), slide_crop=None)

    return make


def test_the_longest_prompt(make):
    """77 tokens fit. With one more, the last word would be cut and such names would be equal."""
    assert not torch.equal(*make([f"{LONG}dog", f"{LONG}cat"]).text_features)
    with pytest.raises(ValueError, match=r"'very very .*…' is longer than the 77 tokens of"):
        make(["dog", f"{LONG}very dog"])
    with pytest.raises(ValueError, match=r"'a photo of a very .*…' is longer than the 77 tokens"):
        make([f"{LONG}dog"], ["{}", "a photo of a {}"])


@pytest.mark.parametrize("length", [16, 100])
def test_a_tokenizer_for_another_context(length):
    """open_clip's tokenizers take any length; the model's context length decides."""
    encoder = with_context(length)
    features = Segmenter(encoder, tokenizer(), ["dog", "cat"], templates=["a {}."]).text_features
    words = open_clip.SimpleTokenizer(context_length=length)
    expected = encoder.model.encode_text(words(["a dog.", "a cat."]), normalize=True)
    torch.testing.assert_close(features, expected.detach())
    name = (length - 2) * "very "
    with pytest.raises(ValueError, match=f"longer than the {length} tokens of the model's context"):
        Segmenter(encoder, tokenizer(), [f"{name}dog"], templates=["{}"])


def test_tokenizers_of_the_other_library(ours, theirs):
    with pytest.raises(TypeError, match="must be transformers', as the model is; got a Simple"):
        Segmenter(theirs, tokenizer(), ["dog"], templates=["{}"])
    processor = CLIPProcessor(CLIPImageProcessor(), their_tokenizer())
    for words in (their_tokenizer(), processor):
        with pytest.raises(TypeError, match="must be open_clip's, as the model is; got a CLIP"):
            Segmenter(ours, words, ["dog"], templates=["{}"])


def test_tokenizers_with_more_words_than_the_model():
    with torch.random.fork_rng(devices=[]):
        model = open_clip.CLIP(24, VISION | dict(layers=3), TEXT | dict(vocab_size=1000))
    other = copied(tiny_clip(layers=3))
    other.config.text_config.vocab_size = 1000
    for encoder, words in (
        (SCCLIP(model.eval()), tokenizer()),
        (SCCLIP(other), their_tokenizer()),
    ):
        with pytest.raises(ValueError, match="a token 49407 where the model's vocabulary has 1000"):
            Segmenter(encoder, words, ["dog"], templates=["{}"])


def test_names_that_the_tokenizer_cannot_tell_apart(make):
    """Tokenizers drop spaces between words. Twelve names take two batches of prompts."""
    between = ["a longer name", *(f"number {index}" for index in range(9))]
    with pytest.raises(ValueError, match="'old man' and 'old  man' have the same tokens"):
        make(["old man", *between, "old  man"], ["{}", "a {}."])
    assert len(make(["old man", *between, "old woman"]).text_features) == 12


TEMPLATES = {
    "a string": ("a photo of a {}.", "must be a list of strings or callables, got 'a photo"),
    "no place": (["a {}.", "a photo."], r"must have \{\} in the name's place, got 'a photo\.'"),
    "a number's place": (["a {}.", "a photo of a %s."], r"\{\} in the name's place, got .*%s"),
    "braces": (["a {{}}."], r"must have \{\} in the name's place"),
    "a word's place": (["a {name}."], r"must have \{\} in the name's place, got 'a \{name\}"),
    "two places": (["a {} {}."], r"must have \{\} in the name's place"),
    "half a place": (["a {."], r"must have \{\} in the name's place"),
    "no template": ([None], r"must be a list of strings or callables, got \[None\]"),
    "none": ([], "templates must not be empty"),
    "a callable without a place": ([lambda name: "a photo."], "have the same tokens"),
}


@pytest.mark.parametrize(("templates", "message"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_that_are_refused(ours, templates, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(ours, tokenizer(), ["dog", "cat"], templates=templates)


def test_shared_names(ours):
    """The published list of COCO-Object has "bed" as a class and as a name of the background."""
    classes = ["background, bed", "person", "bed"]
    with pytest.raises(ValueError, match="got bed more than once"):
        Segmenter(ours, tokenizer(), classes, templates=["{}"])
    segmenter = Segmenter(ours, tokenizer(), classes, templates=["{}"], shared_names=True)
    assert torch.equal(segmenter.text_features[1], segmenter.text_features[3])
    assert 2 not in segmenter(photo(40, 50))
    with pytest.raises(ValueError, match="got bed more than once"):
        Segmenter(ours, tokenizer(), ["bed", "bed"], shared_names=True)


@pytest.mark.parametrize("settings", [{}, dict(area_thd=0.0, background=0)], ids=str)
def test_equal_classes_go_to_the_first(ours, settings):
    names = [f"name {index}" for index in range(40)]
    segmenter = Segmenter(ours, tokenizer(), names, templates=["{}"], short_side=40, **settings)
    image = photo(60, 80)
    first = segmenter(image).min()
    assert first < 39
    segmenter.text_features[first:] = segmenter.text_features[first]
    assert segmenter(image).max() == first

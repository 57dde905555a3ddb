"""Segmenter works after half(), bfloat16(), double() and float(), and under autocast."""

import pytest
import torch
from coarse_products import coarse_products
from tiny_clip import photo, tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter

SETTINGS = dict(short_side=48, slide_crop=32, slide_stride=16)
# Largest error of a probability: the rounding of the dtype through 12 blocks, times logit_scale.
ERROR = {torch.float16: 0.01, torch.bfloat16: 0.05, torch.float64: 1e-5, torch.float32: 0}


@pytest.fixture
def make():
    def make(dtype=None, **settings):
        """Returns a Segmenter with a model and text features of this dtype."""
        model = tiny_clip() if dtype is None else tiny_clip().to(dtype)
        classes = ["sky", "person, man", "tree"]
        settings = SETTINGS | settings
        return Segmenter(SCCLIP(model), tokenizer(), classes, templates=["a {}."], **settings)

    return make


def assert_near(found, expected, dtype):
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= ERROR[dtype]


@pytest.mark.parametrize("settings", [{}, dict(slide_crop=None), dict(pamr_steps=2)], ids=str)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_dtypes(make, dtype, settings):
    image = photo(40, 56)
    expected = make(**settings).probabilities(image)
    segmenter = make(**settings).to(dtype)
    assert segmenter.text_features.dtype == dtype
    assert_near(segmenter.probabilities(image), expected, dtype)
    assert_near(make(dtype, **settings).probabilities(image), expected, dtype)
    assert segmenter(image).shape == (40, 56)


@pytest.mark.parametrize("order", [("half", "float"), ("bfloat16", "double"), ("double", "half")])
def test_in_any_order(make, order):
    image, segmenter = photo(40, 56), make()
    expected = segmenter.probabilities(image)
    for step in order:
        segmenter = getattr(segmenter, step)()
    coarsest = torch.bfloat16 if "bfloat16" in order else torch.float16
    assert_near(segmenter.probabilities(image), expected, coarsest)


def test_the_encoder_alone(make):
    """A caller may convert the model after making the segmenter."""
    image, segmenter = photo(40, 56), make()
    expected = segmenter.probabilities(image)
    segmenter.encoder.half()
    assert_near(segmenter.probabilities(image), expected, torch.float16)


def test_cosines_do_not_depend_on_autocast(make):
    segmenter = make()
    dense = torch.nn.functional.normalize(torch.randn(1, 8, 8, 24), dim=-1)
    segmenter.encoder.encode_dense = lambda images: dense.expand(len(images), -1, -1, -1)
    image = photo(40, 56)
    with coarse_products():
        expected = segmenter.probabilities(image)
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(segmenter.probabilities(image), expected)

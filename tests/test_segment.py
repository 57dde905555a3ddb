"""Segmenter agrees with the published rules, step by step, on a small model."""

import open_clip
import published_segment
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import photo, tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter
from scclip_fast.segment.pamr import pamr

CLASSES = ["sky", "person, man, old woman", "tree", "a red car, taxi"]
NAMES = ["sky", "person", "man", "old woman", "tree", "a red car", "taxi"]
OWNERS = [0, 1, 1, 1, 2, 3, 3]
TEMPLATES = ["a photo of a {}.", "the {} in a scene."]
# The published 336 pixels with windows of 224 every 112, scaled to a model of 32 pixels.
SMALL = dict(short_side=48, slide_crop=32, slide_stride=16)


@pytest.fixture(scope="module")
def encoder():
    """A model in float64, where rounding does not decide which tokens are similar."""
    return SCCLIP(tiny_clip(layers=3).double())


@pytest.fixture(scope="module")
def make(encoder):
    def make(classes=CLASSES, templates=TEMPLATES, **settings):
        return Segmenter(encoder, tokenizer(), classes, templates=templates, **(SMALL | settings))

    return make


def plain(encoder, image, resized, crop, stride):
    """Returns the published probabilities of an image (H, W, 3) that is resized to `resized`.

    Windows have `crop` pixels; None takes the whole image at once.
    """
    pixels = F.interpolate(published_segment.normalised(image), resized, mode="bilinear")
    text = published_segment.text_features(encoder, NAMES, TEMPLATES)
    if crop is None:
        cosines = (encoder(pixels) @ text.T).permute(0, 3, 1, 2)[0].detach()
    else:
        cosines = published_segment.maps(encoder, text, pixels, crop, stride)
    return published_segment.probabilities(
        F.interpolate(cosines[None], image.shape[:2], mode="bilinear")[0], OWNERS
    )


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "resized", "count"),
    [
        ((48, 64), (48, 64), 6),
        ((96, 131), (48, 66), 8),  # the last column of windows starts at 34, not at 48
        ((70, 50), (67, 48), 8),
        ((30, 20), (72, 48), 8),  # enlarged
    ],
    ids=str,
)
def test_windows_in_one_batch_are_the_windows_one_by_one(encoder, make, size, resized, count):
    image = photo(*size)
    assert len(published_segment.windows(resized, 32, 16)) == count
    assert_close(make().probabilities(image), plain(encoder, image, resized, 32, 16))


def test_images_smaller_than_a_window(encoder, make):
    for size in ((20, 28), (20, 48), (41, 21)):
        image = photo(*size)
        assert_close(
            make(short_side=None).probabilities(image), plain(encoder, image, size, 32, 16)
        )


def test_the_whole_image_at_once(encoder, make):
    image = photo(60, 100)
    segmenter = make(slide_crop=None)
    assert_close(segmenter.probabilities(image), plain(encoder, image, (48, 80), None, None))
    segmenter = make(slide_crop=None, short_side=None)
    assert_close(segmenter.probabilities(image), plain(encoder, image, (60, 100), None, None))


def test_extreme_aspect_ratios(make):
    for size in ((1, 700), (700, 1), (1, 1)):
        labels = make(short_side=4, slide_crop=None)(photo(*size))
        assert labels.shape == size


@pytest.mark.parametrize("size", [(48, 64), (131, 97), (20, 30)], ids=str)
def test_labels_are_the_most_probable_classes(make, size):
    image = photo(*size)
    labels, probabilities = make()(image), make().probabilities(image)
    assert labels.shape == size and labels.dtype == torch.int64
    assert probabilities.shape == (4, *size) and probabilities.dtype == torch.float32
    assert torch.equal(labels, probabilities.argmax(dim=0))
    assert len(labels.unique()) > 1
    assert labels.device.type == probabilities.device.type == "cpu"


def test_synonyms_by_their_best_after_the_softmax(encoder, make):
    assert make().classes == ["sky", "person", "tree", "a red car"]
    image = photo(48, 64)
    names = make(NAMES).probabilities(image)
    torch.testing.assert_close(names.sum(dim=0), torch.ones(48, 64))
    merged = torch.stack([names[0], names[1:4].amax(0), names[4], names[5:].amax(0)])
    torch.testing.assert_close(make().probabilities(image), merged)


def test_spaces_around_synonyms_do_not_matter(make):
    image = photo(48, 64)
    spaced = make([" sky ", "person,man,  old woman", "tree", "a red car ,taxi"])
    assert spaced.classes == make().classes
    assert torch.equal(spaced.probabilities(image), make().probabilities(image))


def test_logit_scale(encoder, make):
    text = published_segment.text_features(encoder, NAMES, TEMPLATES)
    image = photo(48, 64)
    cosines = published_segment.maps(encoder, text, published_segment.normalised(image), 32, 16)
    for scale in (1.0, 55.0):
        expected = published_segment.probabilities(cosines, OWNERS, scale)
        assert_close(make(logit_scale=scale).probabilities(image), expected)


@pytest.mark.parametrize("background", [0, 2])
def test_prob_thd(make, background):
    image = photo(60, 80)
    probabilities = make().probabilities(image)
    largest, label = probabilities.max(dim=0)
    threshold = largest.median().item()
    expected = torch.where(largest < threshold, background, label)
    assert not torch.equal(expected, label)
    segmenter = make(prob_thd=threshold, background=background)
    assert torch.equal(segmenter(image), expected)
    assert torch.equal(segmenter.probabilities(image), probabilities)


def plain_area(probabilities, threshold, background):
    """Sets classes to 0 that have at most the threshold's share of the foreground's pixels."""
    label = probabilities.argmax(dim=0)
    area = torch.stack([(label == c).sum() for c in range(len(probabilities))])
    area[background] = 0
    kept = [c == background or area[c] > threshold * area.sum() for c in range(len(area))]
    return probabilities * torch.tensor(kept)[:, None, None]


@pytest.mark.parametrize("place", [1, 2])
def test_area_thd(make, place):
    image = photo(60, 80)
    probabilities = make().probabilities(image)
    area = probabilities.argmax(dim=0).flatten().bincount(minlength=4)
    background = area.argsort()[-place].item()
    foreground = area.sum() - area[background]
    assert area[background] > 0 and foreground > 0
    # Thresholds between a class's share of the foreground and its share of the image: a rule that
    # took the share of the image would keep or remove another class.
    shares = [(area[c] / foreground + area[c] / area.sum()).item() / 2 for c in range(4)]
    kept = set()
    for threshold in (0.0, *(share for c, share in enumerate(shares) if c != background), 1.0):
        expected = plain_area(probabilities, threshold, background)
        segmenter = make(area_thd=threshold, background=background)
        assert torch.equal(segmenter.probabilities(image), expected)
        assert torch.equal(segmenter(image), expected.argmax(dim=0))
        kept.add(int(expected.flatten(1).any(dim=1).sum()))
    assert len(kept) > 1


def test_both_thresholds(make):
    """prob_thd applies to the probabilities that are left after small classes are removed."""
    image = photo(60, 80)
    taken = plain_area(make().probabilities(image), 0.3, 0)
    largest, label = taken.max(dim=0)
    threshold = largest.median().item()
    segmenter = make(area_thd=0.3, prob_thd=threshold, background=0)
    assert torch.equal(segmenter(image), torch.where(largest < threshold, 0, label))


def test_pamr_refines_the_cosines(encoder, make):
    text = published_segment.text_features(encoder, NAMES, TEMPLATES)
    image = photo(60, 80)
    pixels = published_segment.normalised(image)
    resized = F.interpolate(pixels, (48, 64), mode="bilinear")
    cosines = published_segment.maps(encoder, text, resized, 32, 16)[None]
    refined = pamr(pixels, F.interpolate(cosines, (60, 80), mode="bilinear"), 3)[0]
    found = make(pamr_steps=3).probabilities(image)
    assert_close(found, published_segment.probabilities(refined, OWNERS))
    assert not torch.allclose(found, make().probabilities(image), atol=1e-3)


@pytest.mark.parametrize("templates", [None, open_clip.SIMPLE_IMAGENET_TEMPLATES, TEMPLATES])
def test_text_features_are_open_clips(encoder, make, templates):
    segmenter = make(["cat", "dog, puppy"], templates)
    templates = templates or open_clip.OPENAI_IMAGENET_TEMPLATES
    expected = published_segment.text_features(encoder, ["cat", "dog", "puppy"], templates)
    assert torch.equal(segmenter.text_features, expected.float())


def test_templates_as_callables_are_those_as_strings(make):
    callables = [lambda name, text=text: text.format(name) for text in TEMPLATES]
    assert torch.equal(make(templates=callables).text_features, make().text_features)

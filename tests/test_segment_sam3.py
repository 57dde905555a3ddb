"""Sam3Segmenter on a small SAM3 with random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sam3 import ALL, LAYERS, NONE, tiny_processor, tiny_sam3
from transformers import Sam3Model, Sam3Processor

from scclip_fast.chunked import tiles
from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate
from scclip_fast.segment import ImageSegmenter, Sam3Segmenter, sam3

SIZE = (40, 60)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def make(classes, config=ALL):
    return Sam3Segmenter(tiny_sam3(), tiny_processor(), classes, config)


def test_instances_become_classes(photo, monkeypatch):
    """A class has its best instance; a pixel has its best class or the background."""
    top, left = torch.zeros(2, *SIZE, dtype=torch.bool)
    top[:20], left[:, :30] = True, True
    instances = iter(
        [
            dict(scores=torch.tensor([0.4, 0.6]), masks=torch.stack([top, top & left])),  # sky
            dict(scores=torch.tensor([]), masks=torch.zeros(0, *SIZE)),  # tree
            dict(scores=torch.tensor([0.55]), masks=left[None]),  # bush
        ]
    )
    monkeypatch.setattr(
        Sam3Processor, "post_process_instance_segmentation", lambda *_, **__: [next(instances)]
    )
    segmenter = Sam3Segmenter(tiny_sam3(), tiny_processor(), ["sky", "tree, bush"], ALL)
    [(labels, probabilities)] = segmenter.bands(Image.open(photo))
    assert segmenter.classes == ["background", "sky", "tree"]
    corners = [labels[0, 0], labels[0, -1], labels[-1, 0], labels[-1, -1]]
    assert [int(label) for label in corners] == [1, 0, 2, 0]
    assert torch.allclose(probabilities[:, 0, 0], torch.tensor([0.4, 0.6, 0.55]))
    assert torch.allclose(probabilities[:, 0, -1], torch.tensor([0.6, 0.4, 0.0]))


def test_the_protocol_is_that_of_the_other_segmenter(photo):
    segmenter = make(["sky", "tree"])
    assert isinstance(segmenter, ImageSegmenter)
    pixels = np.asarray(Image.open(photo))
    [(labels, probabilities)] = segmenter.bands(Image.open(photo))
    for image in (Image.open(photo), pixels, torch.from_numpy(pixels.copy())):
        assert torch.equal(segmenter(image), labels)
        assert torch.equal(segmenter.probabilities(image), probabilities)
    assert labels.dtype == torch.int64 and probabilities.dtype == torch.float32
    assert probabilities.shape == (3, *SIZE)
    with pytest.raises(TypeError, match="image must be a PIL image"):
        segmenter("photo.png")


def test_the_trunk_runs_once_a_photo_and_is_calibrated(photo):
    segmenter = make(["sky", "a, b"], Sam3CalibrationConfig.for_depth(LAYERS))
    trunk, prompts = [], []
    encoder = segmenter.model.vision_encoder
    encoder.register_forward_hook(lambda _, args, out: trunk.append((args[0], out)))
    segmenter.model.text_encoder.register_forward_hook(lambda *_: prompts.append(1))
    for each in (segmenter, segmenter.frozen()):
        list(each.bands(Image.open(photo)))
    assert type(segmenter.model) is Sam3Model and len(prompts) == 6
    (pixels, calibrated), (_, frozen) = trunk
    with torch.inference_mode():
        assert torch.equal(encoder(pixels).last_hidden_state, frozen.last_hidden_state)
        with calibrate(segmenter.model):
            expected = encoder(pixels)
    assert torch.equal(calibrated.last_hidden_state, expected.last_hidden_state)
    np.testing.assert_array_equal(segmenter.outliers, expected.outlier_mask[0])


@pytest.mark.parametrize("columns", [tiles.MAX_COLUMNS, 300])
def test_bars(photo, monkeypatch, columns):
    """The prompts have a bar, and so has each search, among 1024 pixels, in several steps."""
    bars = []

    def bar(steps, desc="prompts", **_):
        bars.append((desc, len(steps)))
        return steps

    monkeypatch.setattr(sam3, "tqdm", bar)
    monkeypatch.setattr(tiles, "MAX_COLUMNS", columns)
    config = replace(NONE, trunk_repair=True, mask_repair=True)
    segmenter = make(["sky", "tree, a"], config)
    list(segmenter.bands(Image.open(photo)))
    searches = [] if columns > 1024 else 3 * [("outliers of pixels", 4)]
    assert bars == [("prompts", 3), *searches]


WRONG = {
    "case": (["Brick", "brick"], "classes must differ, and not by case alone, got Brick, brick"),
    "a shared synonym": (["person, man", "worker, man"], "got man more than once"),
    "a repeated synonym": (["sky, Sky"], "got Sky, sky more than once"),
    "empty": (["sky", "tree,"], "classes must be names, none of them empty"),
    "none": ([], "classes must be names"),
    "one string": ("sky", "classes must be a list of names, got 'sky'"),
    "background": (["tree", "background"], "classes must not name the background"),
    "long": ([" ".join("x" * 100)], "is too long a prompt: 102 tokens of 32"),
}


@pytest.mark.parametrize(("classes", "message"), WRONG.values(), ids=WRONG)
def test_names_that_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        make(classes)

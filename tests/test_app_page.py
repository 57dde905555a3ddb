"""The results and the pictures of `scclip-fast app`, without a browser."""

import io
from dataclasses import replace

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from tiny_clip import tokenizer

import scclip_fast as sf
from scclip_fast.app import explore, page
from scclip_fast.app.explore import Explorer
from scclip_fast.cli.models import SWITCHES
from scclip_fast.clip import SCCLIP
from scclip_fast.plots import segmentation
from scclip_fast.plots.outliers import heat_map
from scclip_fast.segment import Segmenter

SIDE = 48  # 12 x 12 patches
CLASSES = ["sky", "tree, bush", "sand"]


@pytest.fixture(scope="module")
def model():
    return tiny_clip.tiny_clip()


@pytest.fixture(scope="module")
def explorer(model):
    return Explorer(SCCLIP(model), tokenizer(), SIDE)


@pytest.fixture
def photo():
    return Image.fromarray(tiny_clip.photo(50, 70).numpy())


@pytest.mark.parametrize("off", [(), ("repair", "multi_level")], ids=["all on", "two off"])
def test_every_variant_is_that_of_a_model_of_its_own(explorer, model, photo, off):
    config = replace(explorer.config, beta=0.2, alpha=0.8, **dict.fromkeys(off, False))
    result = explorer.explore(photo, CLASSES, config)
    expected = {"SC-CLIP": SCCLIP(model, config), "plain CLIP": SCCLIP(model, method="clip")}
    for stage in SWITCHES:
        name = f"{'with' if stage in off else 'without'} {stage.replace('_', ' ')}"
        expected[name] = SCCLIP(model, replace(config, **{stage: stage in off}))
    assert [variant.name for variant in result.variants] == list(expected)
    assert result.names == ["sky", "tree", "sand"]
    first = result.variants[0].labels
    whole = dict(slide_crop=None, short_side=SIDE)
    segmenter = Segmenter(SCCLIP(model), tokenizer(), CLASSES, **whole)
    for variant, segmenter.encoder in zip(result.variants, expected.values(), strict=True):
        np.testing.assert_array_equal(variant.labels, segmenter(photo).numpy())
        assert variant.changed == (variant.labels != first).mean()
        assert variant.colours.shape == (12, 17, 3)
    assert len({variant.labels.tobytes() for variant in result.variants}) > 1
    assert len({variant.colours.tobytes() for variant in result.variants}) == len(expected)


def test_outliers_are_those_that_are_repaired(explorer, model, photo):
    config = replace(explorer.config, outlier_n_neighbors=7, outlier_contamination=0.2)
    result = explorer.explore(photo, CLASSES, config)
    model_input = torch.nn.functional.interpolate(pixels(photo), (SIDE, 67), mode="bilinear")
    layers, grid = SCCLIP(model).layers(model_input)
    scores = sf.lof_scores(layers[-1][:, 1:], 7)
    torch.testing.assert_close(result.scores, scores[0].unflatten(0, grid))
    mask = sf.outlier_mask(scores, 0.2)[0].unflatten(0, grid)
    assert torch.equal(result.outliers, mask) and mask.sum() == 41  # a fifth of 12 x 17


def pixels(photo):
    """Returns pixels (1, 3, H, W), normalised as by Segmenter."""
    import open_clip

    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    values = (np.asarray(photo) / 255 - mean) / std
    return torch.from_numpy(values).float().permute(2, 0, 1)[None]


def test_sliders_and_other_classes_take_no_second_pass(model, photo, monkeypatch):
    explorer = Explorer(SCCLIP(model), tokenizer(), SIDE)
    passes, texts = [], []
    layers, text = explore.SCCLIP.layers, Segmenter.__init__
    monkeypatch.setattr(explore.SCCLIP, "layers", lambda *a: passes.append(1) or layers(*a))
    monkeypatch.setattr(Segmenter, "__init__", lambda *a, **k: texts.append(1) or text(*a, **k))
    config = explorer.config
    first = explorer.explore(photo, CLASSES, config)
    changed = explorer.explore(photo, CLASSES, replace(config, gamma=9.0, beta=0.1))
    assert (len(passes), len(texts)) == (1, 1)
    assert (first.variants[0].colours != changed.variants[0].colours).any()
    explorer.explore(photo, ["sky", "sea"], config)
    assert (len(passes), len(texts)) == (1, 2)
    explorer.explore(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), CLASSES, config)
    assert (len(passes), len(texts)) == (2, 2)


def test_page(explorer, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    respond, words = page.responder(explorer, tmp_path), "sky, tree|bush, sand"
    stages, sliders = ["repair", "pre_aggregate"], (30, 0.1, 0.4, 3, 0.5)
    classes, scores, sentence, variants = respond(
        str(tmp_path / "photo.png"), words, stages, *sliders
    )
    on = dict.fromkeys(SWITCHES, False) | {"repair": True, "pre_aggregate": True}
    config = replace(explorer.config, outlier_contamination=0.1, **on)
    result = explorer.explore(photo, CLASSES, config)
    labels = result.variants[0].labels.repeat(10, axis=0).repeat(10, axis=1)  # 70 to 700 pixels
    large = photo.resize((700, 500), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(classes, segmentation.draw(large, labels, result.names))
    assert sentence == "21 of 204 patches are outliers, outlined in cyan."
    np.testing.assert_array_equal(scores.axes[0].images[0].get_array(), result.scores)
    pictures = {caption: picture for picture, caption in variants}
    assert len(pictures) == 14
    for variant in result.variants:
        share = segmentation.percent(variant.changed) + " changed"
        share = "as set" if variant.name == "SC-CLIP" else share
        small = segmentation.blend(result.photo, variant.labels)
        small.thumbnail((240, 240), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(pictures[f"{variant.name}: classes, {share}"], small)
        features = np.asarray(pictures[f"{variant.name}: features"])
        np.testing.assert_array_equal(features[::14, ::14], variant.colours)  # 17 to 238 pixels


def test_heat_map_shows_scores_and_outlines():
    scores = torch.full((6, 9), 1.0)
    scores[2, 3], scores[4, 7] = 8, 3
    figure = heat_map(scores, scores == 8)
    figure.savefig(file := io.BytesIO())
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)

    def at(x, y):
        """Returns column and row of a point, in units of patches."""
        column, row = figure.axes[0].transData.transform((x, y))
        return round(column), pixels.shape[0] - round(row)

    centres = [pixels[at(x, y)[::-1]] for x, y in ((0, 0), (7, 4), (3, 2))]
    brightness = [int(colour.sum()) for colour in centres]
    assert brightness == sorted(brightness) and len(set(brightness)) == 3
    column, row = at(2.5, 2)  # the left border of the outlier
    assert (abs(pixels[row, column - 2 : column + 3] - [0, 255, 255]).sum(axis=1) < 60).any()
    column, row = at(6.5, 4)
    assert not (abs(pixels[row, column - 2 : column + 3] - [0, 255, 255]).sum(axis=1) < 60).any()

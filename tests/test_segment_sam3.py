"""Sam3Segmenter on small SAM3s of both packages with random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sam3_packages import PACKAGES, SIZE, Package, photo

from scclip_fast.chunked import tiles
from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate
from scclip_fast.segment import ImageSegmenter, Sam3Segmenter, sam3_prompts
from scclip_fast.segment.sam3_heads import prompts_in_memory

CLASSES = ["sky", "tree, bush", "car"]
CLOSE = 1e-5  # between batches of prompts, and of the bilinear weights


@pytest.fixture(params=PACKAGES)
def package(request):
    package = Package(request.param)
    with package.unpinned():
        yield package


HEADS = [("instance", "semantic"), ("semantic", "instance"), ("instance",), ("semantic",)]


@pytest.mark.parametrize("presence", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids="-".join)
def test_scores_are_those_of_the_equation(package, heads, presence):
    """Dropping the presence, a head or a synonym, or a sum for a maximum, fails here."""
    segmenter = package.segmenter(CLASSES, heads=heads, presence=presence, prob_thd=0.3)
    image = photo()
    expected = package.scores(segmenter.model, CLASSES, image, heads, presence)
    probabilities = segmenter.probabilities(image)
    assert segmenter.classes == ["background", "sky", "tree", "car"]
    assert probabilities.dtype == torch.float32 and probabilities.shape == (4, *SIZE)
    assert (probabilities[1:] - expected).abs().max() < CLOSE
    assert (probabilities[0] - (1 - expected.max(dim=0).values)).abs().max() < CLOSE


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_batches_of_prompts(package, step):
    """The size of the batches changes scores by rounding alone."""
    segmenter = package.segmenter(CLASSES, prompts_per_pass=step)
    sizes, image = [], photo()
    package.parts(segmenter.model)["prompts"].register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(_batch(kwargs)), with_kwargs=True
    )
    expected = package.segmenter(CLASSES).probabilities(image)
    assert (segmenter.probabilities(image) - expected).abs().max() < CLOSE
    assert sizes == {1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1], 100: [4]}[step]


def _batch(kwargs):
    """The number of prompts in a call of the DETR encoder; Meta's is sequence first."""
    meta = "prompt" in kwargs
    return kwargs["prompt"].shape[1] if meta else len(kwargs["text_features"])


def test_each_part_runs_as_rarely_as_it_can(package):
    """The text runs once a vocabulary, the trunk once an image."""
    model, counts = package.model(), dict(text=0, trunk=0, prompts=0)
    for name, part in package.parts(model).items():
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    segmenter = package.segmenter(CLASSES, model=model, prompts_per_pass=3)
    assert counts == dict(text=1, trunk=0, prompts=0)
    for _ in range(2):
        segmenter(photo())
    assert counts == dict(text=1, trunk=2, prompts=4)


def test_many_names_keep_their_order(package):
    """Text features are computed for some names at a time."""
    names = [first + second for first in "abcdefghi" for second in "abcdefghi"]
    features = package.segmenter(names).text_features
    assert len(features) == 81
    for index in (0, 63, 64, 80):
        [expected] = package.segmenter([names[index]]).text_features
        assert torch.allclose(features[index], expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, dict(prob_thd=0.0), dict(prob_thd=0.0, margin_thd=0.004), dict(prob_thd=0.25)]
)
def test_labels(package, settings):
    """The best class, or background by a threshold; pixels within rounding of either are left."""
    segmenter = package.segmenter(CLASSES, presence=False, **settings)
    scores = package.scores(segmenter.model, CLASSES, photo(), presence=False)
    first, second = scores.sort(dim=0, descending=True).values[:2]
    threshold, margin = settings.get("prob_thd", 0.5), settings.get("margin_thd", 0.0)
    background = (first < threshold) | (first - second < margin)
    expected = torch.where(background, 0, scores.argmax(dim=0) + 1)
    doubtful = [first - second, first - threshold, first - second - margin]
    clear = torch.stack(doubtful).abs().min(dim=0).values > CLOSE
    labels = segmenter(photo())
    assert labels.dtype == torch.int64 and clear.float().mean() > 0.9
    assert torch.equal(labels[clear], expected[clear])


def test_thresholds_split_the_pixels():
    """Each threshold of `test_labels` has pixels on both sides, so that it is tested there."""
    package = Package("transformers")
    scores = package.scores(package.model(), CLASSES, photo(), presence=False)
    first, second = scores.sort(dim=0, descending=True).values[:2]
    for below in (first < 0.5, first - second < 0.004):
        assert 0.02 < below.float().mean() < 0.98


@pytest.mark.parametrize("margin", [0.0, 1e-6])
def test_ties_go_to_the_class_named_first(package, margin):
    """Names of the same tokens have equal scores; their margin is 0."""
    names = ["1", "2"] if package.name == "transformers" else ["A", "¤"]
    for order in (names, names[::-1]):
        settings = dict(prob_thd=0.0, margin_thd=margin, prompts_per_pass=1)
        segmenter = package.segmenter(order, **settings)
        probabilities = segmenter.probabilities(photo())
        assert torch.equal(probabilities[1], probabilities[2])
        assert (segmenter(photo()) == (0 if margin else 1)).all()


@pytest.mark.parametrize("name", ["prob_thd", "margin_thd"])
def test_pixels_at_a_threshold_are_no_background(package, name):
    """The margin of a single class is its score. `<=` for `<` fails here."""
    segmenter = package.segmenter(["sky"], prob_thd=0.0)
    score = segmenter.probabilities(photo())[1]
    threshold = score.median().item()
    segmenter = package.segmenter(["sky"], **{"prob_thd": 0.0} | {name: threshold})
    labels = segmenter(photo())
    assert torch.equal(labels == 0, score < threshold) and (score == threshold).any()
    assert 0 < (labels == 0).sum() < labels.numel()


def test_the_protocol_is_that_of_the_other_segmenter(package):
    segmenter = package.segmenter(["sky", "tree"])
    assert isinstance(segmenter, ImageSegmenter)
    pixels = photo()
    labels, probabilities = segmenter(pixels), segmenter.probabilities(pixels)
    for image in (Image.fromarray(pixels), torch.from_numpy(pixels)):
        assert torch.equal(segmenter(image), labels)
        assert torch.equal(segmenter.probabilities(image), probabilities)
    with pytest.raises(TypeError, match="image must be a file, a PIL image"):
        segmenter(None)


def test_a_large_photo_comes_in_bands():
    segmenter = Package("transformers").segmenter(list("abcdefghijkl"))
    bands = [probabilities.shape for _, probabilities in segmenter.bands(photo((1000, 1500)))]
    assert len(bands) > 2 and sum(rows for _, rows, _ in bands) == 1000
    assert all(4 * classes * rows * width < 2**25 for classes, rows, width in bands)


def test_the_calibration_is_installed_for_the_call_alone(package):
    model = package.model()
    config = Sam3CalibrationConfig.for_depth(package.tiny.LAYERS)
    segmenter = package.segmenter(CLASSES, config, model)
    frozen, calibrated = segmenter.frozen().probabilities(photo()), segmenter.probabilities(photo())
    assert type(model) is type(package.model())
    plain = package.scores(model, CLASSES, photo())
    with calibrate(model, config):
        expected = package.scores(model, CLASSES, photo())
    assert (frozen[1:] - plain).abs().max() < CLOSE
    assert (calibrated[1:] - expected).abs().max() < CLOSE < (plain - expected).abs().max()
    assert segmenter.outliers.shape == (8, 8) and segmenter.outliers.dtype == bool
    assert 0 < segmenter.outliers.sum() < 8


@pytest.mark.parametrize("workspace", [tiles.WORKSPACE_BYTES, 2**21])
def test_bars(monkeypatch, workspace):
    """The prompts have a bar, and so has each search, among 1024 pixels, in several steps."""
    bars = []

    class Bar:
        def __init__(self, steps=(), total=None, desc=None, **_):
            self.steps = steps
            bars.append([desc, len(steps) if total is None else total])

        def __iter__(self):
            return iter(self.steps)

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def update(self, count):
            bars[0].append(count)

    monkeypatch.setattr(sam3_prompts, "tqdm", Bar)
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", workspace)
    package = Package("transformers")
    config = replace(package.tiny.NONE, trunk_repair=True, mask_repair=True)
    package.segmenter(["sky", "tree, a"], config, prompts_per_pass=2)(photo())
    prompts, *searches = bars
    assert prompts == ["prompts", 3, 2, 1]
    assert all(title == "outliers of pixels" and steps > 1 for title, steps in searches)
    assert len(searches) == (3 if workspace == 2**21 else 0)


def test_prompts_of_a_pass_fit_in_memory():
    """At full size a prompt in float32 takes 0.32 GB of 512 MiB."""

    def count(channels, side, dtype=torch.float32):
        return prompts_in_memory(torch.empty(1, channels, side, side, dtype=dtype), 200)

    assert count(256, 288) == 1 and count(256, 288, torch.bfloat16) == 3
    assert count(32, 32) == 32 and count(256, 1000) == 1


def test_transparent_photos_are_blended_with_white(package):
    segmenter = package.segmenter(["sky"])
    pixels = photo()
    alpha = np.full((*SIZE, 1), 255, np.uint8)
    alpha[:20] = 0
    white = pixels.copy()
    white[:20] = 255
    image = Image.fromarray(np.concatenate([pixels, alpha], axis=2))
    assert torch.equal(segmenter.probabilities(image), segmenter.probabilities(white))
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\), got \(40, 60, 4\)"):
        segmenter(np.asarray(image))


def test_a_segmenter_of_a_model_that_is_calibrated_already(package):
    model = package.model()
    with calibrate(model):
        segmenter = package.segmenter(["sky"], model=model)
        expected = package.scores(model, ["sky"], photo())
        assert (segmenter.probabilities(photo())[1:] - expected).abs().max() < CLOSE
        with pytest.raises(ValueError, match="calibrated already"):
            package.segmenter(["sky"], package.tiny.ALL, model)
    assert isinstance(segmenter, Sam3Segmenter)

"""The images and settings that Segmenter takes and refuses, and its memory."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import photo, tiny_clip, tokenizer

from scclip_fast.clip import SCCLIP, NotFiniteError
from scclip_fast.segment import Segmenter, base, cosines
from scclip_fast.segment import image as images

CLASSES = ["sky", "person, man", "tree"]


@pytest.fixture(scope="module")
def encoder():
    """A model in float64, where rounding does not decide which tokens are similar."""
    return SCCLIP(tiny_clip(layers=3).double())


@pytest.fixture(scope="module")
def make(encoder):
    def make(classes=CLASSES, **settings):
        settings = dict(short_side=48, slide_crop=32, slide_stride=16) | settings
        return Segmenter(encoder, tokenizer(), classes, **{"templates": ["a {}."], **settings})

    return make


@pytest.fixture
def image():
    return photo(60, 80)


def test_pictures_of_all_kinds(make, image):
    segmenter = make()
    expected = segmenter.probabilities(image)
    pil = Image.fromarray(image.numpy())
    alike = {
        "PIL": pil,
        "array": image.numpy(),
        "array with strides": np.asfortranarray(image.numpy()),
        "array backwards": image.numpy()[..., ::-1].copy()[..., ::-1],
        "tensor with strides": image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for kind, given in alike.items():
        assert torch.equal(segmenter.probabilities(given), expected), kind
    grey = Image.fromarray(image.numpy()[..., 0])
    same = image[..., :1].expand(60, 80, 3)
    assert torch.equal(segmenter(grey), segmenter(same))


def test_files_and_lists(make, image, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(image.numpy()).save(path)
    other = photo(40, 60).numpy()
    turned = Image.fromarray(other)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.png", exif=exif)
    segmenter = make()
    expected = segmenter(image), segmenter(np.rot90(other, -1).copy())
    for given in (
        [path, tmp_path / "turned.png"],
        (str(path), Image.open(tmp_path / "turned.png")),
    ):
        found = segmenter(given)
        assert isinstance(found, list) and all(map(torch.equal, found, expected))
    assert torch.equal(segmenter(path), expected[0]) and segmenter([]) == []
    with pytest.raises(ValueError, match=r"no\.png: No such file"):
        segmenter(tmp_path / "no.png")


def test_a_read_only_array(make, image):
    """numpy shows a PIL image as a read-only array, of which torch warns once a process."""
    shown = np.asarray(Image.fromarray(image.numpy()))
    assert not shown.flags.writeable
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        assert torch.equal(make()(shown), make()(image))
    finally:
        torch.set_warn_always(always)


def test_the_picture_stays_as_it_was(make, image):
    before = image.clone()
    make(pamr_steps=1)(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(slide_crop=None),
        dict(prob_thd=0.4, area_thd=0.1, background=0),
        dict(pamr_steps=2),
    ],
    ids=str,
)
def test_bands_do_not_change_the_answer(make, image, settings, monkeypatch):
    segmenter = make(**settings)
    whole, probabilities = segmenter(image), segmenter.probabilities(image)
    monkeypatch.setattr(images, "_BAND_BYTES", 4096)  # a few rows
    assert len(list(images.upsampled(torch.rand(4, 12, 16), (60, 80)))) > 5
    assert torch.equal(segmenter(image), whole)
    torch.testing.assert_close(segmenter.probabilities(image), probabilities)


def test_many_windows_take_several_batches(encoder, make, image, monkeypatch):
    segmenter = make()
    expected, batches = segmenter.probabilities(image), []

    def encode_dense(images):
        batches.append(len(images))
        return original(images)

    original = encoder.encode_dense
    monkeypatch.setattr(encoder, "encode_dense", encode_dense)
    assert torch.equal(segmenter.probabilities(image), expected)
    monkeypatch.setattr(cosines, "MAX_WINDOWS", 4)
    torch.testing.assert_close(segmenter.probabilities(image), expected, rtol=0, atol=1e-5)
    assert batches == [6, 4, 2]


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(slide_crop=None), dict(pamr_steps=1), dict(short_side=None)],
    ids=lambda settings: "-".join(settings),
)
def test_images_of_a_list_are_encoded_together(encoder, make, image, settings, monkeypatch):
    """Windows of one size share a batch, and each image has the bits that it has alone."""
    given = [image, photo(97, 48), photo(60, 80)]
    segmenter, batches = make(**settings), []
    alone = [segmenter(one) for one in given]
    probabilities = [segmenter.probabilities(one) for one in given]
    monkeypatch.setattr(base, "_IMAGES", 2)
    assert all(map(torch.equal, segmenter(given), alone))
    monkeypatch.undo()

    def encode_dense(images):
        batches.append(len(images))
        return original(images)

    original = encoder.encode_dense
    monkeypatch.setattr(encoder, "encode_dense", encode_dense)
    assert all(map(torch.equal, segmenter(given), alone))
    assert len(batches) < 3
    together = [torch.cat([band for _, band in bands], 1) for bands in segmenter.bands(given)]
    assert all(map(torch.equal, together, probabilities))


def test_one_class(make, image):
    assert torch.equal(make(["sky"])(image), torch.zeros(60, 80, dtype=torch.int64))


def test_short_precision(make, image):
    encoder = SCCLIP(tiny_clip(layers=3, dtype=torch.float16))
    settings = dict(templates=["a {}."], short_side=48, slide_crop=32, slide_stride=16)
    probabilities = Segmenter(encoder, tokenizer(), CLASSES, **settings).probabilities(image)
    assert probabilities.dtype == torch.float32
    error = (probabilities - make().probabilities(image)).abs()
    assert 0 < error.median() < 0.01


def test_moves_with_its_buffers(make):
    segmenter = make()
    assert {name for name, _ in segmenter.named_buffers(recurse=False)} == {
        "text_features",
        "owners",
        "mean",
        "std",
    }
    assert not [key for key in segmenter.state_dict() if not key.startswith("encoder.")]


def test_means_of_the_model_itself(encoder, make, image, monkeypatch):
    expected = make().probabilities(image)
    monkeypatch.setattr(encoder.model.visual, "image_mean", (0.5, 0.5, 0.5), raising=False)
    monkeypatch.setattr(encoder.model.visual, "image_std", (0.5, 0.5, 0.5), raising=False)
    segmenter = make()
    assert segmenter.mean.flatten().tolist() == segmenter.std.flatten().tolist() == [0.5] * 3
    assert not torch.allclose(segmenter.probabilities(image), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(classes="sky"), "classes must be a list of names, got 'sky'"),
        (dict(classes=[1, 2]), "classes must be a list of names"),
        (dict(classes=[]), "classes must be names, none of them empty"),
        (dict(classes=["sky", " "]), "classes must be names, none of them empty"),
        (dict(classes=["sky", "man,,woman"]), "classes must be names, none of them empty"),
        (
            dict(classes=["sky", "tree", "sky, air"]),
            "classes must differ, .* got sky more than once",
        ),
        (dict(classes=["person, man", "worker, man"]), "got man more than once"),
        (dict(classes=["Brick", "brick"]), "not by case alone, got Brick, brick more than once"),
        (dict(classes=["sky, sky"]), "got sky more than once"),
        (dict(prob_thd=0.3), "prob_thd and area_thd need background"),
        (dict(area_thd=0.1), "prob_thd and area_thd need background"),
        (dict(area_thd=0.0), "prob_thd and area_thd need background"),
        (
            dict(prob_thd=1.1, background=0),
            r"prob_thd must be a finite number .*, got 1.1",
        ),
        (
            dict(prob_thd=-0.1, background=0),
            r"prob_thd must be a finite number .*, got -0.1",
        ),
        (dict(area_thd=2, background=0), r"area_thd must be a finite number .*, got 2"),
        (
            dict(area_thd=-0.1, background=0),
            r"area_thd must be a finite number .*, got -0.1",
        ),
        (dict(background=3), r"background must be in \[0, 2\], got 3"),
        (dict(background=-1), r"background must be in \[0, 2\], got -1"),
        (dict(slide_crop=0), "slide_crop must be at least 1, got 0"),
        (dict(slide_stride=0), "slide_stride must be at least 1, got 0"),
        (dict(slide_stride=33), "slide_stride must be at most slide_crop=32, got 33"),
        (dict(short_side=0), "short_side must be at least 1, got 0"),
        (dict(pamr_steps=-1), "pamr_steps must be at least 0, got -1"),
        (dict(templates=[]), "templates must not be empty"),
        (dict(logit_scale=math.nan), "logit_scale must be a finite number in .*, got nan"),
        (dict(logit_scale=-1), "logit_scale must be above 0, got -1"),
        (dict(prob_thd=math.nan, background=0), "prob_thd must be a finite number in .*, got nan"),
        (dict(classes=None), "classes must be a list of names, got None"),
        (dict(classes=np.array("sky")), "classes must be a list of names, got array"),
        (dict(classes=np.array([["sky", "sea"]])), "classes must be a list of names, got array"),
    ],
    ids=str,
)
def test_settings_that_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(background="sand", prob_thd=0.3), "background must be an int, got str"),
        (dict(logit_scale="40"), "logit_scale must be a number, got str"),
        (dict(short_side=33.6), "short_side must be an int, got float"),
    ],
    ids=str,
)
def test_settings_of_another_type(make, settings, message):
    with pytest.raises(TypeError, match=message):
        make(**settings)


def test_an_array_of_names(make):
    assert make(classes=np.array(["sky", "sea"])).classes == ["sky", "sea"]


@pytest.mark.parametrize("broken", ["visual.proj", "text_projection"])
def test_weights_that_are_not_finite(broken):
    """The argmax of NaN would be the first class at every pixel."""
    encoder = SCCLIP(tiny_clip(layers=3))
    encoder.model.state_dict()[broken][0, 0] = math.nan
    what = "image" if broken == "visual.proj" else "text"
    with pytest.raises(NotFiniteError, match=f"the model's {what} features are not finite"):
        Segmenter(encoder, tokenizer(), CLASSES, templates=["a {}."])(photo(32, 32))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("photo.jpg", ValueError, "photo.jpg: No such file"),
        (None, TypeError, "got NoneType"),
        (np.zeros((4, 4, 3)), TypeError, "got torch.float64"),
        (torch.zeros(4, 4, 3), TypeError, "got torch.float32"),
        (np.zeros((4, 4), np.uint8), ValueError, r"must be \(H, W, 3\), got \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"got \(4, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError, r"got \(3, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got \(0, 4, 3\)"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value,
)
@pytest.mark.parametrize("call", [Segmenter.forward, Segmenter.probabilities])
def test_what_is_no_image(make, image, error, message, call):
    with pytest.raises(error, match=message):
        call(make(), image)

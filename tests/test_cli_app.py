"""What the page of `scclip-fast app` answers, without a browser, and the command's errors."""

import base64
import io
import re
import socket
import struct
import sys
import zlib
from dataclasses import replace
from html import escape, unescape

import numpy as np
import pytest
import torch
from cli_runs import run
from PIL import Image
from tiny_clip import images, tiny_clip, tokenizer

import scclip_fast as sf
from scclip_fast import cli
from scclip_fast.cli import app_page, app_result, overlay
from scclip_fast.cli.app_result import Explorer
from scclip_fast.cli.common import SWITCHES
from scclip_fast.clip import SCCLIP
from scclip_fast.segment import Segmenter

SIDE = 48  # 12 x 12 patches
CLASSES = ["sky", "tree, bush", "sand"]


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


@pytest.fixture(scope="module")
def explorer(model):
    return Explorer(SCCLIP(model), tokenizer(), SIDE)


@pytest.fixture
def photo():
    pixels = images(1, 50, 70)[0].permute(1, 2, 0)
    return Image.fromarray((60 * pixels + 128).clamp(0, 255).byte().numpy())


@pytest.fixture
def respond(explorer, tmp_path):
    """What the page shows for a file in its folder, and settings other than its first ones."""
    answer = app_page.responder(explorer, tmp_path)

    def respond(
        name="photo.png", classes="sky, tree|bush, sand", stages=tuple(SWITCHES), **changed
    ):
        settings = {name: getattr(explorer.config, name) for name in app_page._SLIDERS} | changed
        path = None if name is None else str(tmp_path / name)
        return answer(path, classes, list(stages), *settings.values())

    return respond


def pictures(html):
    """By their alternative text."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', html)
    return {alt: Image.open(io.BytesIO(base64.b64decode(data))) for alt, data in found}


def error(html):
    (text,) = re.fullmatch(r'<div class="sc-error" role="alert">(.*)</div>', html).groups()
    return text


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
    seen = torch.nn.functional.interpolate(pixels(photo), (SIDE, 67), mode="bilinear")
    layers, grid = SCCLIP(model).layers(seen)
    scores = sf.lof_scores(layers[-1][:, 1:], 7)
    torch.testing.assert_close(result.scores, scores[0].unflatten(0, grid))
    mask = sf.outlier_mask(scores, 0.2)[0].unflatten(0, grid)
    assert torch.equal(result.outliers, mask) and mask.sum() == 41  # a fifth of 12 x 17


def pixels(photo):
    """(1, 3, H, W), as Segmenter normalises."""
    import open_clip

    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    values = (np.asarray(photo) / 255 - mean) / std
    return torch.from_numpy(values).float().permute(2, 0, 1)[None]


def test_sliders_and_other_classes_take_no_second_pass(model, photo, monkeypatch):
    explorer = Explorer(SCCLIP(model), tokenizer(), SIDE)
    passes, texts = [], []
    layers, text = app_result.SCCLIP.layers, Segmenter.__init__
    monkeypatch.setattr(app_result.SCCLIP, "layers", lambda *a: passes.append(1) or layers(*a))
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


def test_page(respond, explorer, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    html = respond(outlier_contamination=0.1, stages=("repair", "pre_aggregate"))
    on = dict.fromkeys(SWITCHES, False) | {"repair": True, "pre_aggregate": True}
    config = replace(explorer.config, outlier_contamination=0.1, **on)
    result = explorer.explore(photo, CLASSES, config)
    labels = result.variants[0].labels.repeat(10, axis=0).repeat(10, axis=1)  # 70 to 700 pixels
    large = overlay.blend(photo.resize((700, 500), Image.Resampling.BICUBIC), labels)
    segmentation, heat_map, *small = pictures(html).items()
    np.testing.assert_array_equal(segmentation[1], large)
    shares = [(result.names[i], overlay.percent(s)) for i, s in overlay.ranked(labels).items()]
    assert re.findall(r"</i>(\w+) <span>([^<]+)</span>", unescape(html)) == shares
    assert segmentation[0] == "segmentation: " + ", ".join(name for name, _ in shares)
    assert "21 of 204 patches are outliers" in heat_map[0]
    assert [alt for alt, _ in small][:2] == ["SC-CLIP: classes", "SC-CLIP: features"]
    assert len(small) == 14
    for variant in result.variants:
        share = overlay.percent(variant.changed) + " changed"
        share = "as set" if variant.name == "SC-CLIP" else escape(share)
        assert f"<b>{variant.name}</b><span>{share}</span>" in html
        np.testing.assert_array_equal(dict(small)[f"{variant.name}: features"], variant.colours)


def test_heat_map_shows_scores_and_outlines():
    scores = torch.full((6, 9), 1.0)
    scores[2, 3], scores[4, 7] = 8, 3
    outliers = scores == 8
    picture = app_page.app_html.heat_map(scores, outliers)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    patch = pixels.shape[0] / 6
    centre = [pixels[int((y + 0.5) * patch), int((x + 0.5) * patch)] for y, x in
              ((0, 0), (4, 7), (2, 3))]  # fmt: skip
    brightness = [int(colour.sum()) for colour in centre]
    assert brightness == sorted(brightness) and len(set(brightness)) == 3
    y, x = int(2.5 * patch), round(3 * patch)  # the left border of the outlier
    assert (abs(pixels[y, x - 2 : x + 3] - [0, 255, 255]).sum(axis=1) < 60).any()
    y, x = int(4.5 * patch), round(7 * patch)
    assert not (abs(pixels[y, x - 2 : x + 3] - [0, 255, 255]).sum(axis=1) < 60).any()


def noise(*size, mode="RGB"):
    rng = np.random.default_rng(0)
    shape = size[::-1] + {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


ODD = {
    "grey": noise(40, 30, mode="L"),
    "alpha": noise(40, 30, mode="RGBA"),
    "one pixel": noise(1, 1),
    "plain": Image.new("RGB", (40, 30), "teal"),
    "strip": noise(12, 2),
    "palette": noise(40, 30).convert("P"),
}


@pytest.mark.parametrize("image", ODD.values(), ids=ODD.keys())
def test_odd_photos(respond, explorer, image, tmp_path):
    image.save(tmp_path / "photo.png")
    html = respond()
    seen = explorer.explore(image.convert("RGB"), CLASSES, explorer.config)
    assert html == app_page.app_html.page(seen)
    assert "sc-error" not in html and len(pictures(html)) >= 15


def test_photos_are_turned_upright_and_made_smaller(respond, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    noise(1536, 512).save(tmp_path / "turned.jpg", exif=exif)
    segmentation = next(iter(pictures(respond("turned.jpg")).values()))
    assert segmentation.size == (341, 1024)


def test_too_few_patches(respond, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    html = respond(outlier_n_neighbors=204)
    assert "Of 12 × 17 patches, none has that many neighbours" in html
    assert len(pictures(html)) == 15


def png(width, height):
    """The beginning of a PNG file of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


FILES = {
    "text": (b"hello", "cannot read the photo x.png: not an image, or a damaged one"),
    "empty": (b"", "not an image, or a damaged one"),
    "cut": (png(40, 30), "cannot read the photo x.png: "),
    "bomb": (png(60_000, 60_000), "exceeds limit of"),
    "large": (png(10_000, 8_000), "10,000 × 8,000 pixels; at most 50 million fit"),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES.keys())
def test_files_that_are_no_photos(respond, content, expected, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    text = error(respond("x.png"))
    assert expected in text
    assert str(tmp_path) not in text


BAD = {
    "no photo": (dict(name=None), "Drop a photo first."),
    "no classes": (dict(classes=" ,\n"), "Type at least one class"),
    "no synonym": (dict(classes="sky, tree|"), "The list of classes has an empty name"),
    "twice": (dict(classes="sky, tree, sky"), "The list of classes names sky more than once"),
    "many": (dict(classes=",".join(map(str, range(257)))), "has 257 classes"),
    "contamination": (
        dict(outlier_contamination=0.7),
        "contamination must be in (0, 0.5], got 0.7",
    ),
    "k": (dict(outlier_n_neighbors=0), "outlier_n_neighbors must be at least 1, got 0"),
    "nan": (dict(beta=float("nan")), "beta must be a finite number"),
    "elsewhere": (dict(name="../x.png"), "x.png is none of the photos that came through this page"),
}


@pytest.mark.parametrize(("changed", "expected"), BAD.values(), ids=BAD.keys())
def test_errors_are_messages(respond, changed, expected, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path.parent / "x.png")
    assert expected in error(respond(**changed))


def test_unexpected_errors_are_in_the_terminal(
    respond, explorer, photo, tmp_path, monkeypatch, capsys
):
    photo.save(tmp_path / "photo.png")
    for problem, expected in (
        (RuntimeError("secret"), "Something went wrong; the terminal says what."),
        (torch.OutOfMemoryError("CUDA"), "Out of memory; try a smaller photo or fewer classes."),
    ):
        monkeypatch.setattr(
            explorer, "explore", lambda *_, problem=problem: (_ for _ in ()).throw(problem)
        )
        assert error(respond()) == expected
    assert capsys.readouterr().err.count("RuntimeError: secret") == 1


def test_names_are_no_html(respond, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    html = respond(classes='<img src=x onerror="alert(1)">')
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; <span>100.0 %" in html


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Gradio's socket
def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, stderr = run("app", "--device", "cpu", "--port", port)
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"cannot listen at 127.0.0.1:{port}: in use by another" in stderr


ERRORS = {
    "port": (("--port", "70000"), "--port must be at most 65535, got 70000"),
    "no port": (("--port", "0"), "--port: must be a whole number above 0"),
    "upload": (("--max-upload", "0"), "--max-upload: must be a whole number above 0"),
    "model": (("--model", "ViT-X"), "unknown model 'ViT-X'"),
    "device": (("--device", "tpu"), "--device must be cpu, cuda"),
}


@pytest.mark.parametrize(("words", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_is_one_line(words, message):
    code, _, stderr = run("app", *words)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("scclip-fast app: error: ")
    assert message in stderr


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "scclip_fast.cli.app_page")
    monkeypatch.delattr(cli, "app_page")
    code, _, stderr = run("app")
    assert (code, stderr.count("\n")) == (2, 1)
    assert 'needs the package gradio: pip install "scclip_fast[app]"' in stderr

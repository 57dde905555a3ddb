"""`scclip-fast app` on odd photos, on bad input, and without an optional package."""

import socket
import struct
import sys
import zlib

import gradio
import numpy as np
import pytest
import tiny_clip
import torch
from cli_runs import run
from PIL import Image

from scclip_fast import app
from scclip_fast.app import page, pictures
from scclip_fast.app.explore import Explorer
from scclip_fast.cli.models import SWITCHES
from scclip_fast.clip import SCCLIP
from scclip_fast.segment.image import to_rgb

SIDE = 48  # 12 x 12 patches
CLASSES = ["sky", "tree, bush", "sand"]


@pytest.fixture(scope="module")
def explorer():
    return Explorer(SCCLIP(tiny_clip.tiny_clip()), tiny_clip.tokenizer(), SIDE)


@pytest.fixture
def photo():
    return Image.fromarray(tiny_clip.photo(50, 70).numpy())


@pytest.fixture
def respond(explorer, tmp_path):
    """Calls the page's function for a file in its folder; the settings default to the page's."""
    answer = page.responder(explorer, tmp_path)

    def respond(
        name="photo.png", classes="sky, tree|bush, sand", stages=tuple(SWITCHES), **changed
    ):
        settings = {name: getattr(explorer.config, name) for name in page._SLIDERS} | changed
        path = None if name is None else str(tmp_path / name)
        return answer(path, classes, list(stages), *settings.values())

    return respond


def error(respond, *arguments, **named):
    """Returns the message of the error that the page shows."""
    with pytest.raises(gradio.Error) as raised:
        respond(*arguments, **named)
    return raised.value.message


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
    classes, _, sentence, variants = respond()
    expected = explorer.explore(to_rgb(image), CLASSES, explorer.config)
    np.testing.assert_array_equal(classes, pictures.classes(expected))
    assert sentence == pictures.outliers(expected)[1] and len(variants) == 14
    for (picture, caption), (other, same) in zip(
        variants, pictures.variants(expected), strict=True
    ):
        assert caption == same and np.array_equal(picture, other)


def test_photos_are_turned_upright_and_made_smaller(respond, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    noise(1536, 512).save(tmp_path / "turned.jpg", exif=exif)
    _, _, _, variants = respond("turned.jpg")
    assert variants[0][0].size == (80, 240)  # of 341 x 1024


def test_too_few_patches(respond, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    _, scores, sentence, variants = respond(outlier_n_neighbors=204)
    assert sentence == "There are no outliers: 12 × 17 patches are too few for so many neighbours."
    assert scores is None and len(variants) == 14


def png(width, height):
    """Returns the beginning of a PNG file of that size."""
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
    "large": (png(10_000, 8_000), "10,000 × 8,000 pixels; at most 50 million are taken"),
}


@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES.keys())
def test_files_that_are_no_photos(respond, content, expected, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    text = error(respond, "x.png")
    assert expected in text
    assert str(tmp_path) not in text


BAD = {
    "no photo": (dict(name=None), "Drop a photo first."),
    "no classes": (dict(classes=" ,\n"), "Type at least one class"),
    "no synonym": (dict(classes="sky, tree|"), "The list of classes has an empty name"),
    "twice": (dict(classes="sky, tree, sky"), "The list of classes names sky more than once"),
    "many": (dict(classes="|".join(map(str, range(257)))), "257 names are too many here"),
    "contamination": (
        dict(outlier_contamination=0.7),
        "contamination must be in (0, 0.5], got 0.7",
    ),
    "k": (dict(outlier_n_neighbors=0), "outlier_n_neighbors must be at least 1, got 0"),
    "nan": (dict(beta=float("nan")), "beta must be a finite number"),
    "elsewhere": (dict(name="../x.png"), "x.png is not a photo that came through this page"),
}


@pytest.mark.parametrize(("changed", "expected"), BAD.values(), ids=BAD.keys())
def test_errors_are_messages(respond, changed, expected, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path.parent / "x.png")
    assert expected in error(respond, **changed)


def test_unexpected_errors_are_in_the_terminal(
    respond, explorer, photo, tmp_path, monkeypatch, capsys
):
    photo.save(tmp_path / "photo.png")
    for problem, expected in (
        (RuntimeError("secret"), "Something went wrong; the terminal has the details."),
        (torch.OutOfMemoryError("CUDA"), "Out of memory; try a smaller photo or fewer classes."),
    ):
        monkeypatch.setattr(
            explorer, "explore", lambda *_, problem=problem: (_ for _ in ()).throw(problem)
        )
        assert error(respond) == expected
    assert capsys.readouterr().err.count("RuntimeError: secret") == 1


def test_names_are_no_html(respond, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    name = '<img src=x onerror="alert(1)">'
    text = error(respond, classes=f"{name}, {name}")
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; more than once" in text


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
    "address": (("--host", "::1"), "--host must be a name or an IPv4 address, got ::1"),
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
    monkeypatch.delitem(sys.modules, "scclip_fast.app.page")
    monkeypatch.delattr(app, "page")
    code, _, stderr = run("app")
    assert (code, stderr.count("\n")) == (2, 1)
    assert 'needs the package gradio: pip install "scclip_fast[app]"' in stderr

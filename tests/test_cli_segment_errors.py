"""Errors of `scclip-fast segment` are one line and exit code 2."""

import subprocess
import sys
from functools import partial
from shutil import copytree
from unittest.mock import Mock

import pytest
import torch
from cli_runs import save_tiny, segment, written
from huggingface_hub import constants as hub
from PIL import Image
from safetensors.torch import load_file, save_file

from scclip_fast import cli, plots
from scclip_fast.cli.files import read_photo
from scclip_fast.cli.options import CommandError
from scclip_fast.segment import Segmenter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """Runs `scclip-fast segment` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return partial(segment, model=tiny, classes="sky, tree")


@pytest.fixture
def photo(tmp_path):
    """The file photo.png in the folder where the command runs."""
    path = tmp_path / "photo.png"
    Image.effect_noise((60, 40), 50).save(path)
    return path


@pytest.mark.parametrize("error", [RuntimeError("of a decoder"), IndexError("of another")])
def test_what_decoders_raise(photo, error, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error))
    with pytest.raises(CommandError, match=r"cannot read the photo .*: of a"):
        read_photo(photo)


def test_a_damaged_image_does_not_stop_the_others(command, photo, tmp_path):
    (tmp_path / "damaged.png").write_bytes(photo.read_bytes()[:1000])
    code, stdout, stderr = command("damaged.png", photo.name)
    assert code == 2
    first, last = stderr.splitlines()
    assert first.startswith("cannot read the photo damaged.png: ")
    assert last == "scclip-fast segment: error: 1 image could not be read, see above"
    assert stdout.startswith("1 image segmented")
    assert written(tmp_path / "segments") == ["photo_labels.png", "photo_overlay.png"]


HINTS = {
    "": "a smaller --short-side, --precision bf16, or fewer classes",
    "--slide-crop 0": "a smaller --short-side, windows (--slide-crop 224), --precision bf16, or",
    "--short-side 0 --pamr-steps 1": "--pamr-steps 0, --short-side 336, --precision bf16, or",
}


@pytest.mark.parametrize("options", HINTS)
def test_memory_runs_out(command, photo, tmp_path, monkeypatch, options):
    Image.new("RGB", (60, 40)).save(tmp_path / "second.png")
    bands, calls = Segmenter.bands, []

    def fails_later(segmenter, image):
        calls.append(image)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA")
        return bands(segmenter, image)

    monkeypatch.setattr(Segmenter, "bands", fails_later)
    code, _, stderr = command(photo.name, "second.png", *options.split())
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"out of memory; try {HINTS[options]}" in stderr
    assert written(tmp_path / "segments") == ["photo_labels.png", "photo_overlay.png"]


def test_weights_out_of_reach(command, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    url = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    code, _, stderr = command(photo.name, model="ViT-B-16-quickgelu")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "cannot download ViT-B-16-quickgelu openai" in stderr
    assert "--model also takes the folder of a download, or scenes" in stderr
    assert written(tmp_path / "segments") == []


def test_weights_that_are_not_finite(command, photo, tiny, tmp_path):
    folder = copytree(tiny.removeprefix("local-dir:"), tmp_path / "model")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, folder / "open_clip_model.safetensors")
    code, _, stderr = command(photo.name, "--json", model=f"local-dir:{folder}")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "the model's image features are not finite" in stderr
    assert written(tmp_path / "segments") == []


ERRORS = {
    "no image": ((), {}, "name an IMAGE"),
    "absent": (("no.jpg",), {}, "there is no file or folder no.jpg"),
    "long name": ((300 * "x",), {}, ": File name too long"),
    "a class too long": (
        ("photo.png",),
        dict(classes="sky, " + 20 * "very " + "long"),
        "is longer than the 16 tokens of the model's context",
    ),
    "classes but for case": (
        ("photo.png",),
        dict(classes="Brick, brick"),
        "Brick, brick more than",
    ),
    "nameless": (("",), {}, "an IMAGE has an empty name"),
    "no classes": (("photo.png",), dict(classes=None), "name what to look for: --classes"),
    "no names": (("photo.png",), dict(classes=" ,, "), "--classes names no class"),
    "empty name": (("photo.png",), dict(classes="sky,|,tree"), "--classes has an empty name"),
    "empty synonym": (("photo.png",), dict(classes="sky|,tree"), "--classes has an empty name"),
    "twice": (("photo.png",), dict(classes="sky, tree,sky "), "--classes names sky more than once"),
    "65537": (("photo.png",), dict(classes=",".join(map(str, range(65537)))), "at most 65536"),
    "both": (("photo.png", "--classes-file", "x"), {}, "not allowed with"),
    "no file": (
        ("photo.png", "--classes-file", "no.txt"),
        dict(classes=None),
        "cannot read no.txt: No such file",
    ),
    "background": (("photo.png", "--background", "sea"), {}, "--background must be one of the"),
    "threshold": (("photo.png", "--prob-thd", "0.1"), {}, "need --background NAME"),
    "area": (("photo.png", "--area-thd", "0.1"), {}, "need --background NAME"),
    "alone": (("photo.png", "--background", "sky"), {}, "--background needs --prob-thd or"),
    "share": (("photo.png", "--prob-thd", "2"), {}, "--prob-thd: must be in [0, 1], got '2'"),
    "nan": (("photo.png", "--prob-thd", "nan"), {}, "--prob-thd: must be in [0, 1], got 'nan'"),
    "scale": (("photo.png", "--logit-scale", "-1"), {}, "--logit-scale: must be a number above 0"),
    "stride": (("photo.png", "--slide-stride", "300"), {}, "must be at most --slide-crop 224"),
    "crop": (("photo.png", "--slide-crop", "big"), {}, "--slide-crop: must be a whole number, 0"),
    "method": (("photo.png", "--method", "magic"), {}, "--method: invalid choice: 'magic'"),
    "device": (("photo.png", "--device", "tpu"), {}, "--device must be cpu, cuda"),
    "model": (("photo.png",), dict(model="ViT-X"), "unknown model 'ViT-X'"),
    "no tag": (
        ("photo.png", "--pretrained", ""),
        dict(model="ViT-B-32"),
        "--pretrained must name weights",
    ),
    "random": (
        ("photo.png", "--pretrained", "random"),
        dict(model="ViT-B-32"),
        "--pretrained random is for `scclip-fast lof`",
    ),
    "no folder": (("photo.png",), dict(model="./no"), "--model: there is no folder ./no"),
    "empty folder": (("photo.png",), dict(model="."), "the folder . holds no model: it has no"),
    "folder": (("photo.png", "--out", "photo.png"), {}, "cannot write into photo.png"),
}


@pytest.mark.parametrize(("words", "named", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error_is_one_line(command, photo, words, named, message):
    code, _, stderr = command(*words, **named)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("scclip-fast segment: error: ")
    assert message in stderr


def test_missing_extra(command, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for package, name in ((plots, "fonts"), (plots, "segmentation"), (cli, "segment_images")):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    code, _, stderr = command(photo.name)
    assert (code, stderr.count("\n")) == (2, 1)
    assert 'needs the package matplotlib: pip install "scclip_fast[demo]"' in stderr


def test_help_loads_no_model_library():
    code = "import sys, scclip_fast.cli; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "scclip_fast.cli.segment" in loaded.stdout.splitlines()
    heavy = {"open_clip", "matplotlib", "PIL", "torchmetrics", "sklearn", "gradio"}
    assert not heavy & set(loaded.stdout.splitlines())

"""`scclip-fast segment` with a small SAM3 of random weights."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from cli_runs import run, written
from PIL import Image
from tiny_sam3 import ALL, GRID, LAYERS, NONE, save_tiny_sam3, tiny_processor, tiny_sam3

from scclip_fast.cli import segment, segment_sam3
from scclip_fast.plots import segmentation as overlay
from scclip_fast.sam3 import Sam3CalibrationConfig, calibrate
from scclip_fast.sam3.config import STAGES, TRUNK_STAGES
from scclip_fast.segment import Sam3Segmenter

SIZE = (40, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam3")
    return save_tiny_sam3(path)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def command(folder, photo, tmp_path):
    """Runs `scclip-fast segment` on the photo, with results in the folder out."""

    def command(*words):
        words = ("--model", folder, "--classes", "sky, tree|bush", "--device", "cpu", *words)
        return run("segment", photo, "--out", tmp_path / "out", *words)

    return command


def stored(path):
    """Returns the settings that a picture was made with."""
    with Image.open(path) as image:
        return json.loads(image.info["scclip_fast"])


def test_files_of_an_image(command, folder, tmp_path):
    out = tmp_path / "out"
    code, _, stderr = command("--json")
    assert code == 0 and "prompt" not in stderr  # stderr is no terminal, so there are no bars
    assert written(out) == ["photo.json", "photo_labels.png", "photo_overlay.png"]
    report = json.loads((out / "photo.json").read_text())
    assert [c["name"] for c in report["classes"]] == ["background", "sky", "tree"]
    assert sum(c["share"] for c in report["classes"]) == pytest.approx(1)
    assert Image.open(out / "photo_labels.png").size == SIZE[::-1]
    settings = stored(out / "photo_labels.png")
    assert settings == report["settings"] and settings.pop("image")
    assert settings == dict(
        classes=["sky", "tree, bush"],
        model=str(folder),
        precision="fp32",
        sam3_preset="depth",
        sam3_stages=list(TRUNK_STAGES),
        heads="both",
        preview=None,
        prob_thd=0.5,
        margin_thd=0.0,
    )


def test_stages_and_presets(folder):
    def config(**changed):
        options = dict(sam3_preset="depth", sam3_stages=None, device="cpu", precision="fp32")
        prompts = dict(heads="both", preview=None, prompts_per_pass=None)
        prompts |= dict(prob_thd=None, margin_thd=0.0)
        args = Namespace(model=str(folder), **prompts | options | changed)
        return segment._segmenter(args, ["sky"]).config

    assert config() == Sam3CalibrationConfig.for_depth(LAYERS)
    assert config(sam3_stages="none") == NONE
    assert config(sam3_stages=", ".join(reversed(STAGES))) == ALL
    only = config(sam3_stages="mask_repair")
    assert [name for name in STAGES if getattr(only, name)] == ["mask_repair"]


def test_help_names_every_stage():
    text = " ".join(run("segment", "--help")[1].split())
    listed = text.partition("with commas between them: trunk_repair")[2].partition("; or none")[0]
    default, others = ("trunk_repair" + listed).split(", which are the default; ")
    assert tuple(default.split(", ")) == TRUNK_STAGES
    assert (*TRUNK_STAGES, *others.split(", ")) == STAGES


def test_another_choice_of_stages_is_noticed(command, tmp_path):
    assert command("--sam3-stages", "mask_threshold, trunk_repair")[0] == 0
    labels = tmp_path / "out" / "photo_labels.png"
    assert stored(labels)["sam3_stages"] == ["trunk_repair", "mask_threshold"]
    again = command("--sam3-stages", "trunk_repair,mask_threshold")
    assert again[0] == 0 and again[2].startswith("1 of 1 done already")
    assert "made with another sam3_stages; --force" in command("--sam3-stages", "none")[2]
    assert "made with another sam3_stages; --force" in command()[2]
    assert stored(labels)["sam3_stages"] == ["trunk_repair", "mask_threshold"]
    assert command("--sam3-stages", "none", "--force")[0] == 0
    assert stored(labels)["sam3_stages"] == []


def test_compare(command, photo, tmp_path, monkeypatch):
    """--compare draws the masks of the frozen and the calibrated model, which differ here."""
    model, processor = tiny_sam3(), tiny_processor()
    segmenter = Sam3Segmenter(model, processor, ["sky"], ALL, prob_thd=0.22)
    monkeypatch.setattr(segment, "_segmenter", lambda *_: segmenter)
    assert command("--compare")[0] == 0
    out = tmp_path / "out"
    assert written(out) == ["photo_compare.png", "photo_labels.png", "photo_overlay.png"]
    frozen = Sam3Segmenter(model, processor, ["sky"], prob_thd=0.22)
    before = frozen(Image.open(photo)).numpy().astype(np.uint8)
    with calibrate(model, ALL), torch.inference_mode():
        after = frozen(Image.open(photo)).numpy().astype(np.uint8)
        inputs = processor(images=Image.open(photo), text="sky", return_tensors="pt")
        outliers = model(**inputs).outlier_mask[0].numpy()
    assert (before != after).any() and before.any() and after.any()
    np.testing.assert_array_equal(np.asarray(Image.open(out / "photo_labels.png")), after)
    expected = overlay.compare(Image.open(photo), outliers, before, after, ["background", "sky"])
    picture = Image.open(out / "photo_compare.png")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert outliers.shape == (GRID, GRID) and stored(out / "photo_compare.png")["sam3_stages"]


def test_heads_and_batches(command, folder, photo, tmp_path, monkeypatch):
    """The options reach the segmenter, and the JSON has the segmenter's probabilities."""
    made, segmenter = [], segment_sam3.segmenter

    def kept(*args):
        made.append(segmenter(*args))
        return made[-1]

    monkeypatch.setattr(segment_sam3, "segmenter", kept)
    words = ("--json", "--heads", "semantic", "--prompts-per-pass", "2", "--sam3-stages", "none")
    assert command(*words, "--prob-thd", "0.9", "--margin-thd", "0.1")[0] == 0
    assert (made[0].prob_thd, made[0].margin_thd) == (0.9, 0.1)
    assert (made[0].heads, made[0].prompts_per_pass) == (("semantic",), 2)
    assert made[0].preview is None and made[0].presence
    report = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert report["settings"]["heads"] == "semantic" and "left_out" not in report
    chosen = dict(heads=("semantic",))
    expected = Sam3Segmenter(tiny_sam3(), tiny_processor(), ["sky", "tree, bush"], NONE, **chosen)
    mean = expected.probabilities(Image.open(photo))[0].mean().item()
    assert report["classes"][0]["share"] == 1
    assert report["classes"][0]["mean_probability"] == pytest.approx(mean, abs=1e-5)


def test_preview(command, tmp_path):
    """The report names the classes that were left out."""
    assert command("--json", "--preview", "0.5")[0] == 0
    report = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert report["settings"]["preview"] == 0.5
    assert len(report["left_out"]) == 1 and report["left_out"][0] in ("sky", "tree")
    assert "made with another preview" in command("--json", "--preview", "1")[2]

"""`scclip-fast eval --compare`, and `eval` with a SAM3, on tiny models with random weights."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cli_runs
import numpy as np
import pytest
import torch
from test_datasets import LAYOUTS, write_dataset
from tiny_clip import tiny_clip, tokenizer
from tiny_sam3 import NONE, save_tiny_sam3, tiny_processor, tiny_sam3
from transformers import Sam3Model

from scclip_fast.clip import SCCLIP, SCCLIPConfig
from scclip_fast.clip.shared_layers import SharedLayers
from scclip_fast.clip.tower import Tower
from scclip_fast.evaluate import PROTOCOLS, Sam3Labels, SharedTrunk, compare_clip, compare_sam3
from scclip_fast.evaluate.metric import areas, miou_difference, summary
from scclip_fast.sam3 import Sam3CalibrationConfig
from scclip_fast.segment import Sam3Segmenter, Segmenter

ROOT = Path(__file__).resolve().parents[1]
CLIP = ["scclip", "maskclip", "scclip/no-repair/no-multi-level"]
SAM3 = ["none", "trunk_repair+trunk_fusion", "trunk_repair+trunk_fusion+mask_threshold"]
SLEEP = 0.2  # seconds
WINDOWS = ["--slide-crop", "112", "--slide-stride", "56", "--limit", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The --model of the small CLIP of this package, and of a tiny SAM3."""
    return {"clip": "scenes", "sam3": save_tiny_sam3(tmp_path_factory.mktemp("sam3"))}


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    """Runs `scclip-fast eval` in `tmp_path`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(kind, *words):
        return cli_runs.run("eval", *words, "--model", models[kind], "--device", "cpu")

    return command


def seconds():
    """The seconds of each setting."""
    contents = json.loads(Path("eval.json").read_text())
    return [values["seconds"] for values in contents["settings"].values()]


def numbers(path):
    """The numbers of each setting, or of the only one, without times and differences."""
    contents = json.loads(Path(path).read_text())
    each = contents.get("settings", {None: contents})
    return {
        name: {key: values[key] for key in ("mIoU", "mAcc", "aAcc", "miou_ci95", "classes")}
        for name, values in each.items()
    }


@pytest.mark.parametrize(
    ("kind", "settings", "options"), [("clip", CLIP, WINDOWS), ("sam3", SAM3, ["--limit", "2"])]
)
def test_a_comparison_equals_single_runs(command, kind, settings, options):
    code, stdout, _ = command(kind, "scenes", *options, "--compare", ",".join(settings))
    assert code == 0
    found = numbers("eval.json")
    assert list(found) == settings
    assert len({json.dumps(each) for each in found.values()}) == 3  # the settings differ
    for name in settings:
        method, *off = name.split("/")
        stages = ["--sam3-stages", name.replace("+", ",")]
        single = stages if kind == "sam3" else ["--method", method, *(f"--{part}" for part in off)]
        assert command(kind, "scenes", *options, *single, "--force", "--out", "one.json")[0] == 0
        assert numbers("one.json") == {None: found[name]}
        assert f"{name} " in stdout and f"{100 * found[name]['mIoU']:.2f}" in stdout
        row = next(line for line in stdout.splitlines() if f"  {name} " in line)
        assert f"{100 * found[name]['aAcc']:.2f}" in row
    by_class = list(zip(*(found[name]["classes"] for name in settings), strict=True))
    for row in by_class:
        ious = ["-" if each["IoU"] is None else f"{100 * each['IoU']:.2f}" for each in row]
        assert [*row[0]["name"].split(), *ious] in list(map(str.split, stdout.splitlines()))


def test_settings_of_a_clip_share_its_blocks(command, monkeypatch):
    batches = []
    original = Tower.block_outputs

    def block_outputs(tower, images):
        batches.append(len(images))
        time.sleep(SLEEP)
        return original(tower, images)

    monkeypatch.setattr(Tower, "block_outputs", block_outputs)
    assert command("clip", "scenes", *WINDOWS, "--compare", ",".join(CLIP))[0] == 0
    assert batches == [9, 9]  # the windows of each image, once
    assert min(seconds()) > 2 * SLEEP  # of each setting alone
    monkeypatch.setattr("scclip_fast.clip.shared_layers._KEPT_BYTES", 0)
    monkeypatch.setattr(SharedLayers, "forget", lambda encoder: setattr(encoder, "kept", []))
    assert command("clip", "scenes", *WINDOWS, "--compare", "clip,sclip", "--force")[0] == 0
    assert batches == [9, 9, 9, 9]  # one batch is kept, however large


def test_settings_of_a_sam3_share_its_trunk(command, monkeypatch):
    """The first and the third setting agree about the trunk, and so do the others."""
    passes = []
    original = Sam3Model.get_vision_features

    def get_vision_features(model, *args, **kwargs):
        passes.append(1)
        time.sleep(SLEEP)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(Sam3Model, "get_vision_features", get_vision_features)
    names = [*SAM3[:2], "mask_repair", SAM3[2]]
    assert command("sam3", "scenes", "--limit", 2, "--compare", ",".join(names))[0] == 0
    assert len(passes) == 2 * 2
    assert list(numbers("eval.json")) == names
    assert min(seconds()) > 2 * SLEEP


def test_features_are_of_the_present_image():
    """Also where the next image is written into the memory of the last."""
    shared = SharedTrunk(tiny_sam3(), tiny_processor(), ["sky", "tree"], NONE, prob_thd=0)
    alone = Sam3Segmenter(tiny_sam3(), tiny_processor(), ["sky", "tree"], NONE, prob_thd=0)
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    first = shared.probabilities(photo)
    photo[:] = 255 - photo
    second = shared.probabilities(photo)
    assert not torch.equal(first, second) and torch.equal(second, alone.probabilities(photo))


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(command):
    compared = ["scenes", *WINDOWS[:4], "--compare", "clip,scclip"]
    assert command("clip", *compared, "--limit", 3, "--out", "whole.json")[0] == 0
    assert command("clip", *compared, "--limit", 1)[0] == 0
    record = Path("eval.json.rank0.jsonl")
    before = record.read_text()
    assert command("clip", *compared, "--limit", 3)[0] == 0
    assert record.read_text().startswith(before)
    assert numbers("eval.json") == numbers("whole.json")
    assert command("clip", *compared[:-1], "scclip,clip", "--limit", 3)[0] == 0
    assert record.read_text().startswith(before)
    other = json.loads(Path("eval.json").read_text())["settings"]
    whole = json.loads(Path("whole.json").read_text())["settings"]
    assert list(other) == ["scclip", "clip"] and list(whole) == ["clip", "scclip"]
    changes = (each["minus_first"]["mIoU"] for each in (other["clip"], whole["scclip"]))
    assert sum(changes) == 0 != other["clip"]["minus_first"]["mIoU"]
    code, _, stderr = command("clip", "scenes", "--compare", "clip,maskclip", "--limit", 3)
    assert code == 2 and "holds results of other settings (compare.maskclip" in stderr


@pytest.mark.slow
def test_two_processes(command, models, tmp_path):
    compared = ["scenes", "--limit", "3", "--compare", "clip,scclip", *WINDOWS[:4]]
    assert command("clip", *compared, "--out", "alone.json")[0] == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*compared, "--model", models["clip"], "--device", "cpu", "--out", "shared.json"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "scclip_fast.evaluate", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert numbers("shared.json") == numbers("alone.json")


ERRORS = {
    "method": ("clip", ["--compare", "clip,magic"], "'magic' is no method; choose from scclip"),
    "stage": ("clip", ["--compare", "scclip/no-x"], "'no-x' is none of no-repair, "),
    "baseline": ("clip", ["--compare", "clip/no-repair"], "only scclip has stages to leave out"),
    "twice": ("clip", ["--compare", "clip,sclip,clip"], "--compare names clip more than once"),
    "same": (
        "clip",
        ["--compare", "scclip/no-repair/no-multi-level,clip,scclip/no-multi-level/no-repair"],
        "scclip/no-repair/no-multi-level and scclip/no-multi-level/no-repair are the same",
    ),
    "same stages": (
        "sam3",
        ["--compare", "none,trunk_fusion+trunk_repair,trunk_repair+trunk_fusion"],
        "trunk_fusion+trunk_repair and trunk_repair+trunk_fusion are the same",
    ),
    "several images": ("clip", ["--compare", "clip", "--batch", "2"], "so that --batch has no use"),
    "empty": ("clip", ["--compare", "clip,,sclip"], "has an empty setting, got 'clip,,sclip'"),
    "one": ("clip", ["--compare", "clip", "--method", "clip"], "and --method one: give one of"),
    "proxy": ("clip", ["--compare", "clip,proxyclip"], "--method proxyclip needs --proxy"),
    "sam3 stage": ("sam3", ["--compare", "none,magic"], "'magic' is none of none, default, seed"),
    "seed": ("sam3", ["--compare", "seed"], "seed does not fit: pre_adjust_idx must be in"),
    "stages": ("sam3", ["--sam3-stages", "magic"], "--sam3-stages must be none or some of"),
    "both": ("sam3", ["--compare", "none", "--sam3-stages", "none"], "and --sam3-stages one"),
    "pamr": ("sam3", ["--pamr-steps", "1"], "--pamr-steps is for CLIP, not for"),
    "method of a sam3": ("sam3", ["--method", "clip"], "--method is for CLIP, not for"),
    "batch": ("sam3", ["--batch", "2"], "--batch is for CLIP, not for"),
    "heads": ("clip", ["--heads", "both"], "--heads is for SAM3, not for"),
    "prob": (
        "clip",
        ["--prob-thd", "0.3"],
        "--prob-thd is for the data set folder, not for scenes",
    ),
    "prob of a sam3": ("sam3", ["--prob-thd", "0.3"], "sets with a background, not scenes"),
    "margin": ("clip", ["--margin-thd", "0.3"], "--margin-thd is for SAM3, not for"),
    "margin of a sam3": ("sam3", ["--margin-thd", "0.3"], "sets with a background, not scenes"),
}


@pytest.mark.parametrize(("kind", "words", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(command, kind, words, message):
    code, stdout, stderr = command(kind, "scenes", "--limit", "1", *words)
    last = stderr.splitlines()[-1]
    assert (code, stdout) == (2, "") and last.startswith("scclip-fast eval: error: ")
    assert message in last


def test_comparisons_check_their_settings():
    encoder, config = SCCLIP(tiny_clip()), SCCLIPConfig.for_depth(12)
    plain = Segmenter(encoder, tokenizer(), ["sky", "tree"])
    shared = Segmenter(SharedLayers(encoder.model), tokenizer(), ["sky", "tree"])
    with pytest.raises(TypeError, match="must be a SharedLayers, got SCCLIP"):
        compare_clip(plain, {"a": ("clip", config)})
    with pytest.raises(ValueError, match=r"one of scclip, .* got 'magic'"):
        compare_clip(shared, {"a": ("clip", config), "b": ("magic", config)})
    with pytest.raises(ValueError, match=r"one of scclip, .* got 'proxyclip'"):
        compare_clip(shared, {"a": ("proxyclip", config)})
    with pytest.raises(ValueError, match="pre_adjust_idx must be in"):
        compare_clip(shared, {"a": ("scclip", SCCLIPConfig.for_depth(24))})
    with pytest.raises(ValueError, match="at least one setting"):
        compare_clip(shared, {})

    def labels(kind):
        make = partial(kind, tiny_sam3(), tiny_processor())
        return Sam3Labels(make, ["sky", "tree"], None)

    with pytest.raises(TypeError, match="must be a SharedTrunk, got Sam3Segmenter"):
        compare_sam3(labels(Sam3Segmenter), {"a": None})
    with pytest.raises(ValueError, match="pre_adjust_idx must be in"):
        compare_sam3(labels(SharedTrunk), {"a": None, "b": Sam3CalibrationConfig()})


@pytest.mark.parametrize("key", LAYOUTS)
def test_sam3_on_every_format(command, tmp_path, key):
    write_dataset(tmp_path, key)
    words = [
        key,
        "--root",
        tmp_path,
        "--limit",
        "1",
        "--heads",
        "semantic",
        "--sam3-stages",
        "none",
    ]
    code, stdout, _ = command("sam3", *words)
    assert code == 0 and "1 images" in stdout
    contents = json.loads((tmp_path / "eval.json").read_text())
    assert "transformers" in contents["versions"]
    protocol = PROTOCOLS[key]
    prob_thd = 0.0 if protocol.background is None else 0.5
    assert contents["protocol"] == {
        "background": protocol.background,
        "prob_thd": prob_thd,
        "margin_thd": 0.0,
    }
    assert [row["name"] for row in contents["classes"]] == [
        prompt.partition(",")[0] for prompt in protocol.class_names()
    ]


@pytest.mark.parametrize("option", ["--prob-thd", "--margin-thd"])
def test_thresholds_of_a_sam3(command, tmp_path, option):
    """A threshold of 1 makes all pixels background: those of the first class alone are right."""
    write_dataset(tmp_path, "voc21")
    words = ["voc21", "--root", tmp_path, "--heads", "semantic", "--sam3-stages", "none"]
    assert command("sam3", *words, option, "1")[0] == 0
    contents = json.loads((tmp_path / "eval.json").read_text())
    assert contents["protocol"][option[2:].replace("-", "_")] == 1
    assert [row["accuracy"] for row in contents["classes"] if row["accuracy"]] == [1]
    assert contents["classes"][0]["accuracy"] == 1


class Fixed:
    """Stands for a Sam3Segmenter that finds every class once, its background first."""

    def __init__(self, classes, prob_thd, margin_thd):
        self.classes, self.thresholds = classes, (prob_thd, margin_thd)

    def __call__(self, image):
        return torch.arange(len(self.classes) + 1)[None]


@pytest.mark.parametrize(
    ("prompts", "background", "classes", "thresholds", "owners"),
    [
        (["cat, kitten", "dog"], None, ["cat, kitten", "dog"], (0, 0), [0, 0, 1]),
        (["background", "dog", "cat"], 0, ["dog", "cat"], (0.4, 0.1), [0, 1, 2]),
        (["sky, Dog, wall", "dog"], 0, ["sky, wall", "dog"], (0.4, 0.1), [0, 0, 1]),
        (["dog", "Background, sky"], 1, ["dog", "sky"], (0.4, 0.1), [1, 0, 1]),
    ],
)
def test_backgrounds_of_data_sets(prompts, background, classes, thresholds, owners):
    labels = Sam3Labels(Fixed, prompts, background, prob_thd=0.4, margin_thd=0.1)
    assert (labels.segmenter.classes, labels.segmenter.thresholds) == (classes, thresholds)
    assert labels(None).tolist() == [owners]


def test_paired_differences():
    rng = np.random.default_rng(0)
    hard = rng.integers(1, 40, (60, 1, 1))  # what all methods find hard in an image
    by_image = [
        areas(np.diag(np.full(3, 200)) + each * (1 - np.eye(3, dtype=int))) for each in hard
    ]
    others = [
        areas(np.diag(np.full(3, 200)) + (each + 2) * (1 - np.eye(3, dtype=int))) for each in hard
    ]
    first, second = np.stack(by_image), np.stack(others)
    difference, (low, high) = miou_difference(first, second)
    expected = summary(first.sum(0))["mIoU"] - summary(second.sum(0))["mIoU"]
    assert difference == expected > 0
    assert low < difference < high
    unpaired = miou_difference(first, second[::-1])[1]
    assert high - low < 0.3 * (unpaired[1] - unpaired[0])
    assert miou_difference(first, first) == (0, (0, 0))
    assert miou_difference(first[:, :, :0], first[:, :, :0]) == (None, (None, None))

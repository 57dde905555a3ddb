"""`scclip-fast eval` on a tiny CLIP with random weights, in this process and with torchrun."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cli_runs
import numpy as np
import pytest
import torch
from cli_runs import written
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import photo

from scclip_fast.clip import create_model
from scclip_fast.evaluate import (
    PROTOCOLS,
    PublishedSegmenter,
    confidence_interval,
    confusion_matrix,
    summary,
)
from scclip_fast.evaluate.metric import areas
from scclip_fast.segment import Segmenter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The --model of a tiny CLIP with random weights."""
    return cli_runs.save_tiny(tmp_path_factory.mktemp("tiny"), image_size=224, patch_size=16)


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """Runs `scclip-fast eval` in `tmp_path`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*words, model=tiny):
        return cli_runs.run("eval", *words, "--model", model, "--device", "cpu")

    return command


@pytest.fixture
def voc(tmp_path):
    """A VOC 2012 of two images in `tmp_path`; the value is the path of the second."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (40, 32), "red").save(folder / "JPEGImages" / f"{name}.jpg")
        labels = Image.fromarray(np.full((32, 40), 3, np.uint8))
        labels.save(folder / "SegmentationClass" / f"{name}.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    return folder / "JPEGImages" / "b.jpg"


def results(path):
    """Reads results, without the time, which differs from run to run."""
    contents = json.loads(path.read_text())
    assert contents.pop("seconds") > 0
    return contents


def test_command(command, tmp_path):
    code, stdout, stderr = command("scenes", "--limit", 2)
    assert (code, stderr) == (0, "")
    contents = results(tmp_path / "eval.json")
    names = PROTOCOLS["scenes"].class_names()
    assert (contents["dataset"], contents["images"], contents["failures"]) == ("scenes", 2, [])
    assert [row["name"] for row in contents["classes"]] == contents["prompts"] == names
    assert contents["protocol"]["logit_scale"] == 40 and contents["protocol"]["slide_crop"] == 224
    assert contents["config"]["beta"] == 0.4 and contents["config"]["repair"] is True
    assert set(contents["versions"]) >= {"scclip_fast", "torch", "open_clip_torch"}
    heading, numbers = stdout.split("\n\n")[:2]
    assert "scenes, 2 images" in heading and "logit_scale 40" in heading and "beta 0.4" in heading
    assert len(numbers.splitlines()) == len(names) + 2
    assert f"mIoU {100 * contents['mIoU']:.2f} %" in stdout


def test_command_is_the_library(command, tiny, tmp_path):
    options = ["--slide-crop", 112, "--slide-stride", 56, "--pamr-steps", 1, "--no-repair"]
    options += ["--stitch"]
    assert command("scenes", "--limit", 2, *options)[0] == 0
    encoder, tokenizer = create_model(tiny)
    encoder.config = replace(encoder.config, repair=False)
    classes = PROTOCOLS["scenes"].class_names()
    windows = dict(slide_crop=112, slide_stride=56, stitch=True, pamr_steps=1, short_side=None)
    segmenter = Segmenter(encoder, tokenizer, classes, **windows)
    dataset = PROTOCOLS["scenes"].dataset(limit=2)
    confusions = [confusion_matrix(segmenter(image), labels, 42) for _, image, labels in dataset]
    contents = results(tmp_path / "eval.json")
    assert contents["mIoU"] == summary(areas(sum(confusions)))["mIoU"]
    assert contents["miou_ci95"] == list(confidence_interval(confusions))
    assert [k for k, v in contents["config"].items() if v is False] == ["repair"]


def test_the_command_segments_as_published(command, tiny, tmp_path):
    """Masks made of the published prediction give an accuracy of 1, and other masks do not."""
    folder = tmp_path / "ade"
    path, mask = folder / "images/validation/a.jpg", folder / "annotations/validation/a.png"
    for file in (path, mask):
        file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    Image.fromarray(photo(90, 70).numpy()).save(path)
    encoder, tokenizer = create_model(tiny)
    classes = PROTOCOLS["ade20k"].class_names()
    for kind in (PublishedSegmenter, Segmenter):
        with Image.open(path) as image:
            labels = kind(encoder, tokenizer, classes, pamr_steps=2)(image)
        Image.fromarray(labels.numpy().astype(np.uint8) + 1).save(mask)
        assert command("ade20k", "--root", folder, "--pamr-steps", 2, "--force")[0] == 0
        right = results(tmp_path / "eval.json")["aAcc"]
        assert (right == 1) == (kind is PublishedSegmenter)


@pytest.mark.parametrize("switch", ["repair", "pre-aggregate", "multi-level"])
def test_other_settings_need_force_or_another_output(command, tmp_path, switch):
    assert command("scenes", "--limit", 1)[0] == 0
    code, _, stderr = command("scenes", "--limit", 1, f"--no-{switch}")
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"other settings (config.{switch.replace('-', '_')}); --force discards them" in stderr
    assert results(tmp_path / "eval.json")["config"]["repair"] is True
    assert command("scenes", "--limit", 1, f"--no-{switch}", "--out", "other.json")[0] == 0
    assert command("scenes", "--limit", 1, f"--no-{switch}", "--force")[0] == 0
    assert results(tmp_path / "eval.json") == results(tmp_path / "other.json")


def test_other_weights_are_other_settings(command, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.removeprefix("local-dir:"), folder)
    model = f"local-dir:{folder}"
    assert command("scenes", "--limit", 1, model=model)[0] == 0
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, folder / "open_clip_model.safetensors")
    code, _, stderr = command("scenes", "--limit", 1, model=model)
    assert code == 2 and "(model.weights)" in stderr


def test_command_with_a_damaged_image(command, voc, tmp_path):
    voc.write_bytes(b"")
    code, stdout, stderr = command("voc21", "--root", tmp_path)
    assert code == 2
    skipped, error = stderr.splitlines()
    assert skipped.startswith(f"skipped b: {voc}: not an image")
    assert error == "scclip-fast eval: error: 1 image(s) could not be read, see above"
    assert ", 1 images\n" in stdout
    contents = results(tmp_path / "eval.json")
    assert contents["images"] == 1
    assert contents["failures"] == [{"name": "b", "error": skipped.removeprefix("skipped b: ")}]


def test_all(command, voc, tmp_path):
    code, _, stderr = command("all", "--root", tmp_path, "--limit", 1, "--out", "r.json")
    assert code == 2
    *skipped, error = stderr.splitlines()
    missing = [name for name in PROTOCOLS if name not in ("voc20", "voc21", "scenes")]
    assert [line.split(":")[0] for line in skipped] == [f"skipped {name}" for name in missing]
    assert error == f"scclip-fast eval: error: left out: {', '.join(missing)}"
    files = sorted(path.name for path in tmp_path.glob("*.json"))
    assert files == ["r_voc20.json", "r_voc21.json"]
    for name, threshold in (("voc20", 0), ("voc21", 0.15)):
        contents = results(tmp_path / f"r_{name}.json")
        assert contents["protocol"]["prob_thd"] == threshold and contents["images"] == 1


@pytest.mark.parametrize("values", [(0, 255), (255,)], ids=str)
@pytest.mark.parametrize("key", ["voc21", "all"])
def test_masks_without_a_class_are_not_scored(command, voc, tmp_path, key, values):
    for path in (voc.parents[1] / "SegmentationClass").iterdir():
        labels = np.resize(np.array(values, np.uint8), (32, 40))
        Image.fromarray(labels).save(path)
    code, stdout, stderr = command(key, "--root", tmp_path)
    assert (code, stdout) == (2, "") and not list(tmp_path.glob("eval*"))
    assert sum("no labels but 0 and 255" in line for line in stderr.splitlines()) == (
        2 if key == "all" else 1
    )
    assert "Traceback" not in stderr


def test_numbers_of_images_in_capitals_and_a_list_with_a_mark(command, voc, tmp_path):
    assert command("voc21", "--root", tmp_path, "--out", "plain.json")[0] == 0
    voc.rename(voc.with_suffix(".JPG"))
    path = voc.parents[1] / "ImageSets/Segmentation/val.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb \r\n")
    assert command("voc21", "--root", tmp_path)[0] == 0
    assert results(tmp_path / "eval.json")["images"] == 2
    assert results(tmp_path / "eval.json") == results(tmp_path / "plain.json")


def test_a_list_that_repeats_a_name(command, voc, tmp_path):
    (voc.parents[1] / "ImageSets/Segmentation/val.txt").write_text("a\nb\na\n")
    code, stdout, stderr = command("voc21", "--root", tmp_path)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "val.txt: names on several lines (a); leave one line each" in stderr


def test_the_folder_of_results_is_made(command, tmp_path):
    assert command("scenes", "--limit", 1, "--out", "new/er/x.json")[0] == 0
    assert results(tmp_path / "new" / "er" / "x.json")["images"] == 1


def test_files_of_others_are_kept(command, tmp_path):
    """A run leaves its record beside the results; a file without a record is not replaced."""
    path = tmp_path / "mine.json"
    path.write_text("{}")
    code, _, stderr = command("scenes", "--limit", 1, "--out", path)
    assert (code, stderr.count("\n"), path.read_text()) == (2, 1, "{}")
    assert f"{path} is there, and no run that goes on here made it; --force replaces" in stderr
    assert written(tmp_path) == ["mine.json"]
    assert command("scenes", "--limit", 1, "--out", path, "--force")[0] == 0
    assert command("scenes", "--limit", 1, "--out", path)[0] == 0
    assert results(path)["images"] == 1


def test_weights_that_are_not_finite(command, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.removeprefix("local-dir:"), folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, folder / "open_clip_model.safetensors")
    code, _, stderr = command("scenes", "--limit", 1, model=f"local-dir:{folder}")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "the model's image features are not finite" in stderr
    assert not (tmp_path / "eval.json").exists()


ERRORS = {
    "data set": (["voc07"], "there is no data set 'voc07'; choose from voc20, "),
    "no root": (["ade20k"], "ade20k needs --root"),
    "no folder": (["ade20k", "--root", "x"], "no ADE20K: none of x, x/ADEChallengeData2016, "),
    "no folders": (["all", "--root", "x"], "no data set in x can be evaluated, see above"),
    "method": (["scenes", "--method", "clip", "--no-multi-level"], "--no-multi-level is for"),
    "stride": (["scenes", "--slide-stride", "225"], "must be at most --slide-crop 224, got 225"),
    "limit": (["scenes", "--limit", "0"], "--limit: must be a whole number above 0"),
    "steps": (["scenes", "--pamr-steps", "-1"], "argument --pamr-steps"),
    "directory": (["scenes", "--out", Path(__file__).parent], ": it is a directory"),
    "no file": (["scenes", "--out", ""], "--out: must name a file, got ''"),
    "suffix": (["scenes", "--out", "x.csv"], "--out must end in .json, got x.csv"),
    "long name": (["scenes", "--out", 250 * "x"], "File name too long"),
}


@pytest.mark.parametrize(("words", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_error(command, words, message):
    code, _, stderr = command(*words)
    error = stderr.splitlines()[-1]
    assert code == 2 and len(stderr.splitlines()) == (9 if words[0] == "all" else 1)
    assert error.startswith("scclip-fast eval: error: ") and message in error


def test_out_of_memory_keeps_what_is_finished(command, tmp_path, monkeypatch):
    original, images = Segmenter.forward, []

    def forward(self, image):
        images.append(image)
        if len(images) == 2:
            raise torch.OutOfMemoryError("CUDA")
        return original(self, image)

    monkeypatch.setattr(Segmenter, "forward", forward)
    code, _, stderr = command("scenes", "--limit", 2)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "out of memory; try --precision fp16" in stderr
    assert command("scenes", "--limit", 2)[0] == 0
    assert len(images) == 3


def test_help_names_every_data_set(command):
    code, stdout, _ = command("--help")
    assert code == 0
    assert all(name in "".join(stdout.split()) for name in PROTOCOLS)  # lines break at hyphens


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_torchrun_on_two_processes(command, tmp_path, one_thread):
    assert command("scenes", "--limit", 5, "--out", "alone.json", model="scenes")[0] == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["scenes", "--limit", "5", "--out", "shared.json", "--model", "scenes"]
    words += ["--device", "cpu"]
    run = subprocess.run(
        [sys.executable, *torchrun, "-m", "scclip_fast.evaluate", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("mIoU ") == 1
    files = sorted(tmp_path.glob("shared.json.rank*.jsonl"))
    assert [len(file.read_bytes().splitlines()) - 1 for file in files] == [3, 2]
    assert results(tmp_path / "shared.json") == results(tmp_path / "alone.json")

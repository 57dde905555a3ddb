"""`scclip-fast segment` on a tiny CLIP with random weights, in this process."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cli_runs import save_tiny, segment, written
from PIL import Image

from scclip_fast.cli import files, segment_images
from scclip_fast.clip import create_model
from scclip_fast.plots import segmentation as overlay
from scclip_fast.plots.palette import palette
from scclip_fast.scenes.draw import CLASSES, scene
from scclip_fast.segment import Segmenter

ROOT = Path(__file__).resolve().parents[1]
NAMES = "sky, tree|bush, building"
ENTRIES = ["sky", "tree, bush", "building"]  # the same in the form of Segmenter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """Runs `scclip-fast segment` in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return partial(segment, model=tiny, classes=NAMES)


@pytest.fixture
def photo(tmp_path):
    """The file photo.png, 60 x 40, in the folder where the command runs."""
    return save_photo(tmp_path / "photo.png")


def save_photo(path, index=0):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(scene("validation", index, (40, 60)).image).save(path)
    return path


def test_files_of_an_image(command, photo, tiny, tmp_path):
    code, stdout, stderr = command(photo.name, "--json")
    assert (code, stderr) == (0, "")
    assert stdout == "1 image segmented. Results: segments\n"
    out = tmp_path / "segments"
    assert written(out) == ["photo.json", "photo_labels.png", "photo_overlay.png"]
    segmenter = Segmenter(*create_model(tiny), ENTRIES, short_side=32)
    image = Image.open(photo)
    labels = segmenter(image).numpy()
    assert len(np.unique(labels)) > 1
    mask = Image.open(out / "photo_labels.png")
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), labels)
    assert mask.getpalette()[:9] == palette()[:3].ravel().tolist()
    picture = np.asarray(Image.open(out / "photo_overlay.png"))
    expected = overlay.draw(image, labels.astype(np.uint8), segmenter.classes)
    np.testing.assert_array_equal(picture, np.asarray(expected))

    report = json.loads((out / "photo.json").read_text())
    assert (report["image"], report["width"], report["height"]) == ("photo.png", 60, 40)
    assert (report["settings"]["model"], report["settings"]["method"]) == (tiny, "scclip")
    assert [entry["name"] for entry in report["classes"]] == ["sky", "tree", "building"]
    probabilities = segmenter.probabilities(image).numpy()
    for index, entry in enumerate(report["classes"]):
        pixels = labels == index
        assert entry["share"] == pixels.mean()
        mean = probabilities[index][pixels].mean() if pixels.any() else None
        assert entry["mean_probability"] == (mean and pytest.approx(mean, rel=1e-5))


def test_more_classes_than_8_bits_hold(command, photo, tiny, tmp_path):
    names = [f"name {index}" for index in range(300)]
    assert command(photo.name, "--json", classes=",".join(names))[0] == 0
    mask = Image.open(tmp_path / "segments/photo_labels.png")
    assert mask.mode == "I;16"
    image = Image.open(photo)
    labels = Segmenter(*create_model(tiny), names, short_side=32)(image).numpy()
    assert labels.max() > 255
    np.testing.assert_array_equal(np.asarray(mask), labels)
    picture = np.asarray(Image.open(tmp_path / "segments/photo_overlay.png"))
    expected = overlay.draw(image, labels.astype(np.uint16), names)
    np.testing.assert_array_equal(picture, np.asarray(expected))
    classes = json.loads((tmp_path / "segments/photo.json").read_text())["classes"]
    assert [entry["share"] for entry in classes] == [(labels == i).mean() for i in range(300)]


def test_labels_do_not_depend_on_json(command, photo, tmp_path):
    options = ("--prob-thd", "0.36", "--background", "building")
    assert command(photo.name, "--out", "a", *options)[0] == 0
    assert command(photo.name, "--out", "b", *options, "--json")[0] == 0
    a, b = (np.asarray(Image.open(tmp_path / name / "photo_labels.png")) for name in "ab")
    np.testing.assert_array_equal(a, b)
    assert command(photo.name, "--out", "c", "--json")[0] == 0
    assert (a != np.asarray(Image.open(tmp_path / "c" / "photo_labels.png"))).any()


def test_batches_have_the_bits_of_single_images(command, photo, tmp_path, monkeypatch):
    for index in range(4):
        save_photo(tmp_path / "photos" / f"{index}.png", index)
    (tmp_path / "photos" / "2b.png").write_bytes(b"damaged")
    sizes = []

    def bands(segmenter, images):
        sizes.append(len(images))
        return original(segmenter, images)

    original = Segmenter.bands
    monkeypatch.setattr(Segmenter, "bands", bands)
    for out, batch in (("one", "1"), ("many", "3")):
        code, stdout, stderr = command("photos", "--json", "--out", out, "--batch", batch)
        assert code == 2 and stdout == f"4 images segmented. Results: {out}\n"
        assert [line.partition(":")[0] for line in stderr.splitlines()] == [
            "cannot read the photo photos/2b.png",
            "scclip-fast segment",
        ]
    assert sizes == [1, 1, 1, 0, 1, 3, 1]
    assert written(tmp_path / "one") == written(tmp_path / "many")
    for name in written(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.slow
def test_torchrun_on_two_processes(tiny, tmp_path):
    for index in range(3):
        save_photo(tmp_path / "photos" / f"{index}.png", index)
    words = ["segment", "photos", "--model", tiny, "--classes", NAMES, "--short-side", "32"]
    words += ["--device", "cpu", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, out in (([], "alone"), (torchrun, "shared")):
        done = subprocess.run(
            [sys.executable, *start, "-m", "scclip_fast.cli", *words, out],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"3 images segmented. Results: {out}\n"
    assert len(written(tmp_path / "alone")) == 6
    for name in written(tmp_path / "alone"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def test_options_reach_the_segmenter(command, photo, monkeypatch):
    passed = {}

    def segment(segmenter, jobs, font, batch, ranks):
        names = "logit_scale prob_thd area_thd background slide_crop slide_stride stitch short_side"
        passed.update({name: getattr(segmenter, name) for name in (*names.split(), "pamr_steps")})
        passed["method"] = segmenter.encoder.method
        return 0

    monkeypatch.setattr(segment_images, "segment", segment)
    command(photo.name)
    defaults = dict(
        logit_scale=40, prob_thd=0, area_thd=None, background=None, slide_crop=224,
        slide_stride=112, stitch=False, short_side=32, pamr_steps=0, method="scclip",
    )  # fmt: skip
    assert passed == defaults
    changed = dict(
        logit_scale=7.5, prob_thd=0.25, area_thd=0.125, background="tree", slide_crop=64,
        slide_stride=48, short_side=48, pamr_steps=2, method="maskclip",
    )  # fmt: skip
    command(photo.name, *(w for k, v in changed.items() for w in (f"--{k.replace('_', '-')}", v)))
    assert passed == changed | dict(background=1, stitch=False)
    command(photo.name, "--stitch")
    assert passed == defaults | dict(stitch=True)
    command(photo.name, "--slide-crop", "0", "--short-side", "0")
    assert passed["slide_crop"] is passed["short_side"] is None


def test_resumes(command, photo, tmp_path):
    out = tmp_path / "segments"
    command(photo.name)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    save_photo(tmp_path / "second.png", 1)
    code, stdout, stderr = command(photo.name, "second.png")
    assert (code, stderr) == (0, "1 of 2 done already; --force makes them again\n")
    assert stdout.startswith("1 image segmented")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(written(out)) == 4

    (out / "photo_overlay.png").unlink()  # as if the first run had been killed between the two
    assert command(photo.name, "--json")[1].startswith("1 image segmented")
    labels = out / "photo_labels.png"
    assert labels.stat().st_mtime_ns == before[labels]
    assert {"photo.json", "photo_overlay.png"} < set(written(out))


def test_nothing_to_do_needs_no_model(command, photo, monkeypatch):
    command(photo.name)
    monkeypatch.setattr("scclip_fast.clip.create_model", None)
    assert command(photo.name)[0] == 0


def test_other_results_are_not_replaced_without_force(command, photo, tmp_path):
    labels = tmp_path / "segments" / "photo_labels.png"
    command(photo.name)
    before = labels.read_bytes()
    code, _, stderr = command(photo.name, classes="sky, tree")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "photo_labels.png is there, made with another classes; --force replaces it" in stderr
    save_photo(photo, 1)
    assert "made with another image" in command(photo.name)[2]
    assert labels.read_bytes() == before
    assert command(photo.name, "--force")[::2] == (0, "")
    assert labels.read_bytes() != before
    labels.write_bytes(b"mine")
    assert "made by something else" in command(photo.name)[2]
    assert labels.read_bytes() == b"mine"


def test_same_stems_through_the_command(command, tmp_path):
    for index, folder in enumerate("ab"):
        save_photo(tmp_path / folder / "x.png", index)
    assert command("a", "b")[0] == 0
    assert command("a", "b")[2].startswith("2 of 2 done already")
    for folder in "ab":
        with Image.open(tmp_path / "segments" / f"{folder}_x.png_labels.png") as mask:
            digest = files._digest(tmp_path / folder / "x.png")
            assert json.loads(mask.info["scclip_fast"])["image"] == digest


def test_classes_file(command, photo, tmp_path):
    (tmp_path / "names.txt").write_text("sky\ntree, bush\n\nbuilding\n")
    command(photo.name)
    code, _, stderr = command(photo.name, "--classes-file", "names.txt", classes=None)
    assert (code, stderr) == (0, "1 of 1 done already; --force makes them again\n")


def test_example_of_the_scenes(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("scclip_fast.clip.sources.SCENES", tiny)
    code, _, stderr = command(classes=None, model="scenes")
    assert (code, stderr) == (0, "")
    with Image.open(tmp_path / "segments" / "example_labels.png") as mask:
        settings = json.loads(mask.info["scclip_fast"])
        labels = np.asarray(mask)
    assert (settings["model"], settings["pretrained"]) == ("scenes", None)
    assert settings["classes"] == list(CLASSES)
    segmenter = Segmenter(*create_model(tiny), CLASSES, short_side=32)
    np.testing.assert_array_equal(labels, segmenter(scene(*segment_images.EXAMPLE).image).numpy())


def test_compare(command, tiny, photo, tmp_path):
    """--compare draws the labels of plain CLIP beside those of the method."""
    assert command(photo.name, "--compare", "--method", "naclip")[0] == 0
    out = tmp_path / "segments"
    assert written(out) == ["photo_compare.png", "photo_labels.png", "photo_overlay.png"]
    with Image.open(out / "photo_labels.png") as mask:
        after = np.asarray(mask)
    encoder, tokenizer = create_model(tiny, method="clip")
    before = Segmenter(encoder, tokenizer, ENTRIES, short_side=32)(Image.open(photo)).numpy()
    assert (before != after).any()
    names = ["sky", "tree", "building"]
    expected = overlay.compare(Image.open(photo), None, before.astype(np.uint8), after, names)
    picture = np.asarray(Image.open(out / "photo_compare.png"))
    np.testing.assert_array_equal(picture, np.asarray(expected))
    message = "--compare shows plain CLIP beside another --method, got clip"
    assert message in command(photo.name, "--compare", "--method", "clip")[2]

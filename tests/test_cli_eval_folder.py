"""`scclip-fast eval folder`: a user's own images and masks, in the layout of CamVid."""

import json
from pathlib import Path

import cli_runs
import numpy as np
import pytest
from PIL import Image

from scclip_fast.clip import create_model
from scclip_fast.evaluate import OwnDataset, PublishedSegmenter, confusion_matrix, summary
from scclip_fast.evaluate.metric import areas
from scclip_fast.scenes.draw import CLASSES, scene

VOID = len(CLASSES)  # as in CamVid, where the last label is no class


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `scclip-fast eval folder` in a folder with three drawn scenes and their masks."""
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        drawn = scene("validation", index, (64, 96))
        labels = drawn.labels.copy()
        labels[:9] = VOID
        for folder, picture in (("test", drawn.image), ("testannot", labels)):
            (tmp_path / folder / "seq").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / folder / "seq" / f"{index}.png")
    Path("names.txt").write_text("\n".join(CLASSES) + "\n")

    def command(*words, ignore=VOID, **changed):
        given = dict(images="test", masks="testannot", names="names.txt", ignore=ignore) | changed
        named = [w for k, v in given.items() if v is not None for w in (f"--{k}", v)]
        model = ["--model", "scenes", "--device", "cpu", "--short-side", "64"]
        return cli_runs.run("eval", "folder", *model, *named, *words)

    return command


def results():
    return json.loads(Path("eval.json").read_text())


def test_equals_the_library(command):
    code, stdout, stderr = command()
    assert (code, stderr) == (0, "") and "folder, 3 images in test" in stdout
    encoder, tokenizer = create_model("scenes")
    segmenter = PublishedSegmenter(encoder, tokenizer, list(CLASSES), short_side=64)
    dataset = OwnDataset("test", "testannot", len(CLASSES), ignored=VOID)
    confusions = [confusion_matrix(segmenter(i), labels, len(CLASSES)) for _, i, labels in dataset]
    assert sum(map(np.sum, confusions)) == 3 * (64 - 9) * 96  # the rest does not count
    expected = summary(areas(sum(confusions)))
    found = results()
    assert (found["images"], found["mIoU"], found["aAcc"]) == (
        3,
        expected["mIoU"],
        expected["aAcc"],
    )


@pytest.mark.slow
def test_batches_and_resuming_change_nothing(command):
    assert command("--limit", 2, "--batch", 2)[0] == 0
    assert command("--batch", 3)[0] == 0
    together = results()
    assert command("--force")[0] == 0
    alone = results()
    assert together.pop("seconds") and alone.pop("seconds") and together == alone


def test_masks_of_colours(command):
    assert command()[0] == 0
    expected = results()["classes"]
    rng = np.random.default_rng(0)
    colors = rng.permutation(256)[: 3 * 43].reshape(43, 3).astype(np.uint8)
    Path("colors.txt").write_text("\n".join(f"{r} {g} {b} x{r}" for r, g, b in colors))
    for path in Path("testannot/seq").iterdir():
        Image.fromarray(colors[np.asarray(Image.open(path))]).save(path)
    assert command("--palette", "colors.txt", "--force")[0] == 0
    assert results()["classes"] == expected


def test_a_background(command):
    options = ["--background", "grass", "--prob-thd", "0.4"]
    assert command(*options)[0] == 0
    found = results()
    assert found["protocol"]["background"] == CLASSES.index("grass")
    assert found["protocol"]["prob_thd"] == 0.4
    assert command("--force")[0] == 0
    assert found["classes"] != results()["classes"]


def test_missing_files(command):
    Path("testannot/seq/1.png").unlink()
    code, _, stderr = command()
    line = (
        "scclip-fast eval: error: testannot: 1 of 3 labels of OwnDataset are missing (seq/1.png); "
        "every image needs a mask and every mask an image of the same name; --allow-missing goes "
        "on\n"
    )
    assert (code, stderr) == (2, line)
    code, stdout, stderr = command("--allow-missing")
    assert (code, stderr) == (0, "folder: 1 of 3 names are left out (seq/1)\n")
    assert "2 images" in stdout


ERRORS = {
    "no images": (dict(images=None), [], "folder needs --images"),
    "no names": (dict(names=None), [], "folder needs --names"),
    "root": ({}, ["--root", "."], "--root is not for the data set folder"),
    "folder": (dict(masks="no"), [], "there is no folder no"),
    "suffix": ({}, ["--suffix", "_mask.png"], "testannot: there is no mask, no *_mask.png"),
    "ignore": (dict(ignore="x"), [], "--ignore must be a whole number or none, got 'x'"),
    "a class": (dict(ignore=3), [], "--ignore: ignored must be no index of a class, 0 to 41"),
    "label": (dict(ignore="none"), [], "label 42, where OwnDataset has 0 to 41;"),
    "background": ({}, ["--background", "moon", "--prob-thd", "0.1"], "must be one of the classes"),
    "threshold": ({}, ["--prob-thd", "0.1"], "--prob-thd and --area-thd need --background NAME"),
    "alone": ({}, ["--background", "grass"], "--background needs --prob-thd or --area-thd"),
    "file": (dict(names="no.txt"), [], "no.txt: No such file"),
    "palette": ({}, ["--palette", "names.txt"], "'grass' has no colour; a line begins with R G B"),
}


@pytest.mark.parametrize(("changed", "words", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(command, changed, words, message):
    code, stdout, stderr = command(*words, **changed)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr


def test_options_of_folder_alone(command):
    code, _, stderr = cli_runs.run("eval", "scenes", "--model", "scenes", "--names", "names.txt")
    assert code == 2 and "--names is for the data set folder, not for scenes" in stderr

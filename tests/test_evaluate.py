"""The evaluation's numbers, and its loop with a segmenter that thresholds brightness."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from scclip_fast.evaluate import (
    PROTOCOLS,
    MissingResultsError,
    Ranks,
    RunRecord,
    SettingsChangedError,
    confidence_interval,
    confusion_matrix,
    report,
    run,
    summary,
    table,
)
from scclip_fast.evaluate.metric import areas

SETTINGS = {"model": "stub", "config": {"alpha": 0.5}}
CLASSES = [f"class {i}" for i in range(21)]
NAMES = [f"image_{i}" for i in range(5)]


@pytest.fixture
def voc(tmp_path):
    """A VOC 2012 of five images of different sizes, with some ignored pixels."""
    folder, rng = tmp_path / "VOC2012", np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        size = (10 + i, 12)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
        labels = rng.choice(np.array([0, 3, 5, 255], np.uint8), size)
        Image.fromarray(labels).save(folder / "SegmentationClass" / f"{name}.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(NAMES))
    return PROTOCOLS["voc21"].dataset(folder)


class Stub:
    """A segmenter that derives the class from the pixel's brightness, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return torch.from_numpy(np.asarray(image.convert("L")) // 64).long()


def evaluate(dataset, out, world_size=1, settings=SETTINGS):
    """Runs all processes in turn; returns the report and the number of images segmented."""
    record, segmenter = RunRecord(out, settings), Stub()
    for rank in range(world_size):
        run(segmenter, dataset, record, Ranks(rank, world_size))
    numbers = report(dataset, record, CLASSES)
    numbers.pop("seconds")
    return numbers, segmenter.calls


def test_numbers_by_hand():
    labels = np.array([[0, 0, 0, 1], [1, 1, 255, 2]], np.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 4, 4, 0]])
    confusion = confusion_matrix(prediction, labels, 5)
    expected = np.zeros((5, 5), int)
    expected[0, :2], expected[1, [1, 4]], expected[2, 0] = (2, 1), (2, 1), 1
    assert np.array_equal(confusion, expected)
    numbers = summary(areas(confusion))
    # Class 3 occurs nowhere. Class 4 is predicted at one pixel but is no label.
    assert numbers["IoU"] == [2 / 4, 2 / 4, 0, None, 0]
    assert numbers["Acc"] == [2 / 3, 2 / 3, 0, None, None]
    assert numbers["mIoU"] == 1 / 4
    assert numbers["mAcc"] == pytest.approx(4 / 9)
    assert numbers["aAcc"] == 4 / 7


def test_numbers_are_torchmetrics_over_the_data_set():
    rng = np.random.default_rng(1)
    jaccard = MulticlassJaccardIndex(9, ignore_index=255)
    total = np.zeros((9, 9), int)
    for size in ((20, 30), (7, 5), (40, 40)):
        labels = rng.choice(np.array([0, 1, 2, 5, 255], np.uint8), size)
        prediction = torch.from_numpy(np.where(rng.random(size) < 0.6, labels % 9, 6)).long()
        jaccard.update(prediction[None], torch.from_numpy(labels)[None].long())
        total += confusion_matrix(prediction, labels, 9)
    assert summary(areas(total))["mIoU"] == pytest.approx(jaccard.compute().item(), abs=1e-6)


def test_nothing_to_divide_by():
    numbers = summary(areas(np.zeros((2, 2), int)))
    assert numbers == dict(mIoU=None, mAcc=None, aAcc=None, IoU=[None] * 2, Acc=[None] * 2)
    assert np.isnan(confidence_interval(np.zeros((3, 2, 2), int))).all()
    with pytest.raises(ValueError, match="at least one"):
        confidence_interval([])


def test_prediction_of_another_size():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        confusion_matrix(torch.zeros(2, 3, dtype=torch.long), np.zeros((3, 2), np.uint8), 2)


def test_confidence_interval_is_that_of_a_loop():
    rng = np.random.default_rng(2)
    confusions = rng.integers(0, 50, (30, 4, 4)) * (rng.random((30, 4, 4)) < 0.5)
    confusions[:, 3] = confusions[:, :, 3] = 0  # a class that never occurs
    interval = confidence_interval(confusions, level=0.8, resamples=200, seed=3)
    draws = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), 200)
    means = []
    for counts in draws:
        drawn = np.repeat(confusions, counts, axis=0).sum(axis=0)[:3, :3]
        union = drawn.sum(axis=0) + drawn.sum(axis=1) - np.diagonal(drawn)
        means.append((np.diagonal(drawn) / union).mean())
    assert interval == pytest.approx((np.quantile(means, 0.1), np.quantile(means, 0.9)), rel=1e-12)
    narrow = confidence_interval(iter(confusions), level=0.2)
    mean = summary(areas(confusions.sum(axis=0)))["mIoU"]
    assert interval[0] < narrow[0] < mean < narrow[1] < interval[1]


@pytest.mark.parametrize("wrong", [dict(level=1), dict(level=0), dict(resamples=0)])
def test_confidence_interval_checks(wrong):
    with pytest.raises(ValueError, match="level must be in"):
        confidence_interval(np.ones((3, 2, 2), int), **wrong)


def test_report(voc, tmp_path):
    numbers, calls = evaluate(voc, tmp_path / "out.json")
    total = sum(confusion_matrix(Stub()(image), labels, 21) for _, image, labels in voc)
    expected = summary(areas(total))
    assert (calls, numbers["images"], numbers["failures"]) == (5, 5, [])
    for name in ("mIoU", "mAcc", "aAcc"):
        assert numbers[name] == expected[name]
    assert [tuple(row.values()) for row in numbers["classes"]] == list(
        zip(CLASSES, expected["IoU"], expected["Acc"], strict=True)
    )
    assert expected["IoU"].count(None) == 16  # 0 to 3 are predicted; 0, 3 and 5 are labels
    lower, upper = numbers["miou_ci95"]
    assert lower < numbers["mIoU"] < upper
    lines = table(numbers).splitlines()
    cells = [f"{100 * expected[name][3]:.2f}" for name in ("IoU", "Acc")]
    assert lines[4].split() == ["class", "3", *cells]
    assert lines[10].split() == ["class", "9", "-", "-"]


def test_report_has_one_confusion_matrix_in_memory(voc, tmp_path):
    """Those of COCO-Stuff take 1.2 GB together. With a list of them here the peak is 86 MB."""
    classes, record = [str(i) for i in range(300)], RunRecord(tmp_path / "out.json", SETTINGS)
    voc.names = [str(i) for i in range(100)]
    with record.appending(0) as append:
        for name in voc.names:
            numbers = {"cells": [[3, 4, 5], [3, 3, 9]], "seconds": 1}
            append({"name": name, "settings": {"a": numbers, "b": numbers}})
    tracemalloc.start()
    try:
        numbers = report(voc, record, classes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert numbers["settings"]["a"]["aAcc"] == 9 / 14
    assert peak < 50e6
    assert list(numbers["settings"]) == ["a", "b"]
    assert list(report(voc, record, classes, ["b", "a"])["settings"]) == ["b", "a"]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_shares_give_the_same_result(voc, tmp_path, world_size):
    alone, _ = evaluate(voc, tmp_path / "alone.json")
    shared, calls = evaluate(voc, tmp_path / "shared.json", world_size)
    assert shared == alone
    assert calls == 5
    files = sorted(tmp_path.glob("shared.json.rank*.jsonl"))
    finished = [len(file.read_bytes().splitlines()) - 1 for file in files]
    assert finished == [len(range(rank, 5, world_size)) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_goes_on_after_a_kill_with_any_number_of_processes(voc, tmp_path, world_size):
    out = tmp_path / "out.json"
    expected, _ = evaluate(voc, out, world_size=2)
    first, second = sorted(tmp_path.glob("out.json.rank*.jsonl"))
    first.write_bytes(first.read_bytes()[:-9])  # in the middle of the last line
    second.write_bytes(second.read_bytes()[:20])  # in the middle of the first
    numbers, calls = evaluate(voc, out, world_size)
    assert numbers == expected
    assert calls == 3  # one of the first process's three and both of the second's


def test_a_line_without_its_end_does_not_count(voc, tmp_path):
    out = tmp_path / "out.json"
    evaluate(voc, out)
    file = tmp_path / "out.json.rank0.jsonl"
    complete = file.read_bytes()
    file.write_bytes(complete[:-1])
    assert evaluate(voc, out)[1] == 1
    before, after = (
        [json.loads(line).get("cells") for line in content.splitlines()]
        for content in (complete, file.read_bytes())
    )
    assert before == after


def test_more_images_of_the_same_data_set(voc, tmp_path):
    out = tmp_path / "out.json"
    few = PROTOCOLS["voc21"].dataset(voc.folder, limit=2)
    first, calls = evaluate(few, out)
    assert (first["images"], calls) == (2, 2)
    assert evaluate(voc, out)[1] == 3
    assert evaluate(few, out) == (first, 0)


def test_changed_settings(voc, tmp_path):
    out = tmp_path / "out.json"
    evaluate(voc, out)
    changed = {"model": "stub", "config": {"alpha": 0.4}, "new": 1}
    with pytest.raises(SettingsChangedError, match=r"rank0\.jsonl .* \(config\.alpha, new\)"):
        evaluate(voc, out, settings=changed)
    RunRecord(out, changed).clear()
    assert evaluate(voc, out, settings=changed)[1] == 5


def test_a_damaged_image_is_left_out_until_it_is_mended(voc, tmp_path, capsys):
    out = tmp_path / "out.json"
    expected, _ = evaluate(voc, tmp_path / "whole.json")
    path = voc.paths(NAMES[1])[0]
    content = path.read_bytes()
    path.write_bytes(content[:100])
    for world_size in (2, 1):
        numbers, calls = evaluate(voc, out, world_size)
        error = capsys.readouterr().err
        assert error.startswith(f"skipped image_1: {path}: ") and error.count("\n") == 1
        assert (numbers["images"], calls) == (4, 4 if world_size == 2 else 0)
        assert [failure["name"] for failure in numbers["failures"]] == ["image_1"]
        assert numbers["failures"][0]["error"].startswith(str(path))
    path.write_bytes(content)
    assert evaluate(voc, out) == (expected, 1)


def test_no_image_can_be_read(voc, tmp_path):
    for name in NAMES:
        voc.paths(name)[0].unlink()
    numbers, _ = evaluate(voc, tmp_path / "out.json")
    assert (numbers["images"], len(numbers["failures"])) == (0, 5)
    assert table(numbers) == "no images, no numbers"


def test_results_on_another_disk(voc, tmp_path):
    record = RunRecord(tmp_path / "out.json", SETTINGS)
    run(Stub(), voc, record, Ranks(0, 2))
    with pytest.raises(MissingResultsError, match="no result of 2 images, image_1 for one"):
        report(voc, record, CLASSES)


def test_errors_of_the_segmenter_are_not_hidden(voc, tmp_path):
    record = RunRecord(tmp_path / "out.json", SETTINGS)
    stub = Stub()

    def segmenter(image):
        if stub.calls == 2:
            raise ZeroDivisionError
        return stub(image)

    with pytest.raises(ZeroDivisionError):
        run(segmenter, voc, record)
    assert list(record.read()) == NAMES[:2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_numbers_that_are_none(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunRecord(tmp_path / "out.json", {"beta": value})
    with RunRecord(tmp_path / "out.json", SETTINGS).appending(0) as append:
        with pytest.raises(ValueError, match="not JSON compliant"):
            append({"name": "a", "cells": [], "seconds": value})
        append({"name": "b", "cells": [], "seconds": 1})
    assert list(RunRecord(tmp_path / "out.json", SETTINGS).read()) == ["b"]

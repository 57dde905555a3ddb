"""The numbers of an evaluation, for JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from . import metric
from .datasets import Dataset
from .record import RunRecord, confusion


class MissingResultsError(RuntimeError):
    """An image has no entry, because the processes wrote to different disks."""


def report(
    dataset: Dataset, record: RunRecord, classes: list[str], settings: Sequence[str] = ()
) -> dict:
    """Computes the numbers of a finished evaluation.

    Args:
        dataset: the data set; results of images that it does not have are left out.
        record: the results.
        classes: the name of each class.
        settings: the names of the settings of a `Comparison`, in the order of the numbers; by
            default those of the record in its order.

    Returns:
        The numbers of images and failures, and those of `metric.summary`, in [0, 1]; None for a
        number without pixels to compute it from. Of a `Comparison`, "settings" has the numbers of
        each setting, with "minus_first": the difference of its mIoU from the first setting's, and
        the 95 % interval of this difference, a bootstrap over the images.

    Raises:
        MissingResultsError: an image has neither a result nor a failure, because the process that
            segmented it wrote to another disk.
    """
    entries = record.read()
    if missing := [name for name in dataset.names if name not in entries]:
        raise MissingResultsError(
            f"no result of {len(missing)} images, {missing[0]} for one: "
            f"{record.out.parent} is not one folder for all processes"
        )
    in_order = [entries[name] for name in dataset.names]
    results = [entry for entry in in_order if "error" not in entry]
    failures = [
        {"name": entry["name"], "error": entry["error"]} for entry in in_order if "error" in entry
    ]
    about = {"images": len(results), "failures": failures}
    if results:
        settings = settings or list(results[0].get("settings", ()))
    if not results or not settings:
        return about | _numbers(results, classes)
    numbers = {
        name: _numbers([entry["settings"][name] for entry in results], classes) for name in settings
    }
    by_image = {name: _areas(results, name, len(classes)) for name in settings}
    for name, areas in by_image.items():
        difference, interval = metric.miou_difference(areas, by_image[settings[0]])
        numbers[name]["minus_first"] = {"mIoU": difference, "ci95": list(interval)}
    return about | {"settings": numbers}


def _numbers(results: list[dict], classes: list[str]) -> dict:
    """Returns the numbers of the results of images by one setting."""
    numbers = {}
    if results:
        count = len(classes)  # the matrices of all images may not fit in memory
        numbers = metric.summary(sum(metric.areas(confusion(each, count)) for each in results))
        interval = metric.confidence_interval(confusion(each, count) for each in results)
        numbers["miou_ci95"] = [None if math.isnan(end) else end for end in interval]
        columns = (classes, numbers.pop("IoU"), numbers.pop("Acc"))
        numbers["classes"] = [
            {"name": name, "IoU": iou, "accuracy": accuracy}
            for name, iou, accuracy in zip(*columns, strict=True)
        ]
    return numbers | {"seconds": round(sum(result["seconds"] for result in results), 3)}


def _areas(results: list[dict], setting: str, count: int) -> np.ndarray:
    """Returns the areas (images, 3, C) of one setting, see `metric.areas`."""
    return np.stack([metric.areas(confusion(e["settings"][setting], count)) for e in results])


def table(report: dict) -> str:
    """Returns a table of the classes and their mean, or of the settings, in per cent."""
    if not report["images"]:
        return "no images, no numbers"
    if "settings" in report:
        return _settings_table(report)
    rows = [(row["name"], row["IoU"], row["accuracy"]) for row in report["classes"]]
    rows.append(("mean", report["mIoU"], report["mAcc"]))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'class':<{width}}     IoU  accuracy"]
    lines += [f"{name:<{width}}{_percent(iou):>8}{_percent(acc):>10}" for name, iou, acc in rows]
    lower, upper = report["miou_ci95"]
    lines.append(
        f"\nmIoU {_percent(report['mIoU'])} % (95 % interval {_percent(lower)} to "
        f"{_percent(upper)}), pixel accuracy {_percent(report['aAcc'])} %, "
        f"{report['images']} images"
    )
    return "\n".join(lines)


def _settings_table(report: dict) -> str:
    """Returns a table of the settings, and one of the classes with a column a setting."""
    settings, images = report["settings"], report["images"]
    change = f"minus {next(iter(settings))} (95 %)"
    rows = [("", "setting", "mIoU", "95 % interval", change, "accuracy", "s/image")]
    for number, (name, numbers) in enumerate(settings.items(), 1):
        difference = numbers["minus_first"]
        ends = " to ".join(map(_signed, difference["ci95"]))
        cells = (
            _percent(numbers["mIoU"]),
            " to ".join(map(_percent, numbers["miou_ci95"])),
            "" if number == 1 else f"{_signed(difference['mIoU'])} ({ends})",
            _percent(numbers["aAcc"]),
            f"{numbers['seconds'] / images:.3f}",
        )
        rows.append((str(number), name, *cells))
    classes = [("", "IoU of class", *(number for number, *_ in rows[1:]))]
    for row in zip(*(numbers["classes"] for numbers in settings.values()), strict=True):
        classes.append(("", row[0]["name"], *(_percent(each["IoU"]) for each in row)))
    return (
        f"{_columns(rows)}\n\n{_columns(classes)}\n\n{images} images; s/image is the time of a "
        "setting alone, and intervals are over images"
    )


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Joins the cells of rows. All columns but the second are aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def _signed(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"

"""The numbers of an evaluation, for JSON and as a table."""

from __future__ import annotations

import math

import numpy as np

from . import metric
from .datasets import Dataset
from .record import RunRecord, confusion


class MissingResultsError(RuntimeError):
    """An image has no entry, because the processes wrote to different disks."""


def report(dataset: Dataset, record: RunRecord, classes: list[str]) -> dict:
    """Computes the numbers of a finished evaluation.

    Args:
        dataset: the data set; results of images that it does not have are left out.
        record: the results.
        classes: the name of each class.

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
    if not results or "settings" not in results[0]:
        return about | _numbers(results, classes)
    settings = {
        name: _numbers([entry["settings"][name] for entry in results], classes)
        for name in results[0]["settings"]
    }
    by_image = {name: _areas(results, name, len(classes)) for name in settings}
    first = next(iter(by_image.values()))
    for name, areas in by_image.items():
        difference, interval = metric.miou_difference(areas, first)
        settings[name]["minus_first"] = {"mIoU": difference, "ci95": list(interval)}
    return about | {"settings": settings}


def _numbers(results: list[dict], classes: list[str]) -> dict:
    """Returns the numbers of the results of images by one setting."""
    numbers = {}
    if results:
        confusions = [confusion(result, len(classes)) for result in results]
        numbers = metric.summary(sum(map(metric.areas, confusions)))
        interval = metric.confidence_interval(confusions)
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
    settings = report["settings"]
    first, *_ = settings
    width = max(map(len, ["setting", *settings]))
    lines = [f"{'setting':<{width}}    mIoU  95 % interval    minus {first} (95 %)  s/image"]
    for name, numbers in settings.items():
        low, high = map(_percent, numbers["miou_ci95"])
        change = numbers["minus_first"]
        ends = " to ".join(_signed(end) for end in change["ci95"])
        beside = "" if name == first else f"{_signed(change['mIoU'])} ({ends})"
        lines.append(
            f"{name:<{width}}{_percent(numbers['mIoU']):>8}  {low + ' to ' + high:<17}"
            f"{beside:<{len(first) + 13}}  {numbers['seconds'] / report['images']:.3f}"
        )
    lines.append(
        f"\n{report['images']} images; the time of the work that settings share is the first's"
    )
    return "\n".join(lines)


def _signed(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"

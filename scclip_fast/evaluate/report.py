"""The numbers of an evaluation, for JSON and as a table."""

from __future__ import annotations

import math

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
        number without pixels to compute it from.

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
    count = len(classes)
    total = sum(metric.areas(confusion(entry, count)) for entry in results)
    numbers = {}
    if results:
        numbers = metric.summary(total)
        interval = metric.confidence_interval(confusion(entry, count) for entry in results)
        numbers["miou_ci95"] = [None if math.isnan(end) else end for end in interval]
        columns = (classes, numbers.pop("IoU"), numbers.pop("Acc"))
        numbers["classes"] = [
            {"name": name, "IoU": iou, "accuracy": accuracy}
            for name, iou, accuracy in zip(*columns, strict=True)
        ]
    return {
        "images": len(results),
        "failures": [
            {"name": entry["name"], "error": entry["error"]}
            for entry in in_order
            if "error" in entry
        ],
        **numbers,
        "seconds": round(sum(entry["seconds"] for entry in results), 3),
    }


def table(report: dict) -> str:
    """Returns a table of the classes and their mean, in per cent."""
    if not report["images"]:
        return "no images, no numbers"
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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"

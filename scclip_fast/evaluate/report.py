"""What an evaluation found, as JSON takes it and as a table."""

from __future__ import annotations

import math

from . import metric
from .datasets import FolderDataset, Scenes
from .progress import Progress, confusion


class MissingResultsError(RuntimeError):
    """Processes wrote to different disks."""


def report(dataset: FolderDataset | Scenes, progress: Progress, classes: list[str]) -> dict:
    """The numbers of a finished evaluation, in [0, 1]; None where nothing defines them.

    Args:
        dataset: whose images count, in its order; results of others are left out.
        progress: the results.
        classes: a name a class.

    Raises:
        MissingResultsError: an image has neither a result nor a failure, as the process that had
            it wrote to another disk.
    """
    records = progress.read()
    if missing := [name for name in dataset.names if name not in records]:
        raise MissingResultsError(
            f"no result of {len(missing)} images, {missing[0]} for one: "
            f"{progress.out.parent} is not one folder for all processes"
        )
    known = [records[name] for name in dataset.names]
    results = [record for record in known if "error" not in record]
    count = len(classes)
    total = sum(metric.areas(confusion(record, count)) for record in results)
    numbers = {}
    if results:
        numbers = metric.summary(total)
        interval = metric.confidence_interval(confusion(record, count) for record in results)
        numbers["miou_ci95"] = [None if math.isnan(end) else end for end in interval]
        columns = (classes, numbers.pop("IoU"), numbers.pop("Acc"))
        numbers["classes"] = [
            {"name": name, "IoU": iou, "accuracy": accuracy}
            for name, iou, accuracy in zip(*columns, strict=True)
        ]
    return {
        "images": len(results),
        "failures": [
            {"name": record["name"], "error": record["error"]}
            for record in known
            if "error" in record
        ],
        **numbers,
        "seconds": round(sum(record["seconds"] for record in results), 3),
    }


def table(report: dict) -> str:
    """The classes and their mean, in per cent."""
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

"""Finished images, a line each, so that what was interrupted goes on where it stopped.

Every process appends to its own file beside the output, and every process reads all of them: a
run may go on with another number of processes. The first line of a file holds the settings that
its results depend on; a line that was cut off does not count.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


class SettingsChangedError(ValueError):
    """The output belongs to results that other settings gave."""


class Progress:
    """The progress files of an output.

    Args:
        out: the output's path; the files are `out`.rank0.jsonl, `out`.rank1.jsonl, ...
        settings: all that results depend on, as JSON takes it.

    Raises:
        ValueError: a setting that is NaN or infinite, which JSON has no number for.
    """

    def __init__(self, out: Path, settings: dict) -> None:
        self.out = out
        self.settings = json.loads(json.dumps(settings, allow_nan=False))

    def clear(self) -> None:
        """Forget all results."""
        for path in self._paths():
            path.unlink()

    def read(self) -> dict[str, dict]:
        """What is known of each image, by its name: a record of a result, else of a failure.

        Raises:
            SettingsChangedError: a file holds results of other settings.
        """
        records = {}
        for path in self._paths():
            lines = _whole_lines(path)
            if not lines:
                continue
            self._check(path, _parsed(lines[0]).get("settings", {}))
            for record in filter(None, map(_parsed, lines[1:])):
                # A failure may have been mended since, by another process.
                if "error" not in record or "error" in records.get(record["name"], record):
                    records[record["name"]] = record
        return records

    @contextmanager
    def appending(self, rank: int) -> Iterator[Callable[[dict], None]]:
        """Gives a function that adds a record to the file of process `rank`."""
        path = self.out.with_name(f"{self.out.name}.rank{rank}.jsonl")
        lines = _whole_lines(path) if path.exists() else []
        with open(path, "ab") as file:
            file.truncate(sum(map(len, lines)))  # the rest was cut off

            def append(record: dict) -> None:
                file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
                file.flush()

            if not lines:
                append({"settings": self.settings})
            yield append

    def _paths(self) -> list[Path]:
        return sorted(self.out.parent.glob(f"{glob.escape(self.out.name)}.rank*.jsonl"))

    def _check(self, path: Path, found: dict) -> None:
        ours, theirs = _flat(self.settings), _flat(found)
        if ours != theirs:
            changed = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
            raise SettingsChangedError(
                f"{path} holds results of other settings ({', '.join(changed)})"
            )


def result(name: str, confusion: np.ndarray, seconds: float) -> dict:
    """A record of a finished image: `cells` are (label, prediction, pixels) where there are any."""
    rows, columns = np.nonzero(confusion)
    cells = np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
    return {"name": name, "cells": cells, "seconds": round(seconds, 4)}


def confusion(record: dict, num_classes: int) -> np.ndarray:
    """The confusion matrix (C, C) of such a record."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    if record["cells"]:
        rows, columns, counts = np.array(record["cells"]).T
        matrix[rows, columns] = counts
    return matrix


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parsed(line: bytes) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _flat(settings: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {prefix + key: value} if nested is None else nested
    return flat

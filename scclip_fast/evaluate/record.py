"""The record of a run: a line for each finished image, so that an interrupted run can go on.

Every process appends to its own file beside the output, and every process reads all of them, so a
run may go on with another number of processes. The first line of a file holds the settings that
its results depend on. A line that was cut off is ignored.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


class SettingsChangedError(ValueError):
    """The record holds results that other settings gave."""


class RunRecord:
    """The files that record the finished images of a run.

    Args:
        out: the output's path; the files are `out`.rank0.jsonl, `out`.rank1.jsonl, ...
        settings: everything that results depend on, in the types that JSON has.

    Raises:
        ValueError: a setting is NaN or infinite, for which JSON has no number.
    """

    def __init__(self, out: Path, settings: dict) -> None:
        self.out = out
        self.settings = json.loads(json.dumps(settings, allow_nan=False))

    @staticmethod
    def paths(out: Path) -> list[Path]:
        """Returns the files that record an output."""
        return sorted(out.parent.glob(f"{glob.escape(out.name)}.rank*.jsonl"))

    def clear(self) -> None:
        """Deletes all files of the record."""
        for path in self.paths(self.out):
            path.unlink()

    def read(self) -> dict[str, dict]:
        """Returns the entry of each image by its name: that of a result, else that of a failure.

        Raises:
            SettingsChangedError: a file holds results of other settings.
        """
        entries = {}
        for path in self.paths(self.out):
            lines = _whole_lines(path)
            if not lines:
                continue
            self._check(path, _parsed(lines[0]).get("settings", {}))
            for entry in filter(None, map(_parsed, lines[1:])):
                # An image that failed may have been mended since, and segmented by another process.
                if "error" not in entry or "error" in entries.get(entry["name"], entry):
                    entries[entry["name"]] = entry
        return entries

    @contextmanager
    def appending(self, rank: int) -> Iterator[Callable[[dict], None]]:
        """Opens the file of process `rank`; the context gives a function that adds an entry."""
        path = self.out.with_name(f"{self.out.name}.rank{rank}.jsonl")
        lines = _whole_lines(path) if path.exists() else []
        with open(path, "ab") as file:
            file.truncate(sum(map(len, lines)))  # removes a line that was cut off

            def append(entry: dict) -> None:
                file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
                file.flush()

            if not lines:
                append({"settings": self.settings})
            yield append

    def _check(self, path: Path, stored: dict) -> None:
        """Raises SettingsChangedError if the settings stored in a file differ."""
        new, old = _flat(self.settings), _flat(stored)
        if new != old:
            changed = sorted(key for key in new | old if new.get(key) != old.get(key))
            raise SettingsChangedError(
                f"{path} holds results of other settings ({', '.join(changed)})"
            )


def result(confusion: np.ndarray, seconds: float) -> dict:
    """Returns the result of a finished image for its entry.

    Its `cells` are (label, prediction, pixels) of the confusion matrix where pixels are not 0.
    """
    rows, columns = np.nonzero(confusion)
    cells = np.stack([rows, columns, confusion[rows, columns]], axis=1).tolist()
    return {"cells": cells, "seconds": round(seconds, 4)}


def confusion(entry: dict, num_classes: int) -> np.ndarray:
    """Returns the confusion matrix (C, C) of the result of a finished image."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    if entry["cells"]:
        rows, columns, counts = np.array(entry["cells"]).T
        matrix[rows, columns] = counts
    return matrix


def _whole_lines(path: Path) -> list[bytes]:
    """Returns the lines of a file that have their line end."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parsed(line: bytes) -> dict:
    """Returns a line of JSON as a dictionary; an empty one for a damaged line."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _flat(settings: dict, prefix: str = "") -> dict:
    """Joins the keys of nested dictionaries: {"a": {"b": 1}} gives {"a.b": 1}."""
    flat = {}
    for key, value in settings.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {prefix + key: value} if nested is None else nested
    return flat

"""The figures in the READMEs are those of the files in bench/results."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from shutil import copy

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FIGURES = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")

#: The result files with a table.
NAMES = ("by-hand", "clip", "cpu", "sam3", "h200", "scenes", "throughput")
FILES = [path for name in NAMES for path in RESULTS.glob(f"{name}-*")]
FILES = [path for path in FILES if path.suffix == ".json"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tables_are_as_printed(path):
    assert (table := output("report.py", path).strip()) and table in FIGURES


def output(script, path):
    """Returns what a script of bench/ prints for a result file."""
    command = [sys.executable, ROOT / "bench" / script, path]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_picture_is_as_drawn(tmp_path):
    (path,) = RESULTS.glob("h200-*.json")
    output("roofline.py", copy(path, tmp_path))
    drawn = (tmp_path / path.name).with_suffix(".svg").read_text(encoding="utf-8")
    assert drawn == path.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_first_readme_repeats_them():
    """The first README has the time, the ratio to the floor and the memory of rows of bench/'s."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| [\d.]+ ms \| [\d.]+ × \| [\d,]+ MB \|", text)
    assert len(rows) >= 7
    assert [row for row in rows if row not in FIGURES] == []


def test_new_results_name_their_commit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    harness, report = import_module("harness"), import_module("report")
    about = harness.provenance("cpu")
    assert torch.__version__.startswith(about["machine_info"]["torch"])
    commit = about["commit_info"]
    assert commit.keys() == {"id", "time", "dirty"}
    if (ROOT / ".git").exists():
        head = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(head, cwd=ROOT, capture_output=True, encoding="utf-8")
        assert commit["id"] == done.stdout.strip()
    commit["dirty"] = False
    assert report.revision(about) == f"commit {commit['id'][:7]}"
    commit["dirty"] = True
    assert report.revision(about) == f"commit {commit['id'][:7]} and changes beyond it"

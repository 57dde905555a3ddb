"""Figures of the READMEs are those of the files in bench/results."""

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

#: How the names of result files begin, and the script that prints them.
SCRIPTS = {"clip-": "report", "cpu-": "report", "sam3-": "report", "h200-": "roofline"}
FILES = {
    path: script for start, script in SCRIPTS.items() for path in RESULTS.glob(f"{start}*.json")
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tables_are_as_printed(path, tmp_path):
    command = [sys.executable, ROOT / "bench" / f"{FILES[path]}.py", copy(path, tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in FIGURES
    if FILES[path] == "roofline":
        drawn = (tmp_path / path.name).with_suffix(".svg").read_text(encoding="utf-8")
        assert drawn == path.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_first_readme_repeats_them():
    """Time, share of the floor and memory of each row."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| [\d.]+ ms \| [\d.]+ × \| [\d,]+ MB \|", text)
    assert len(rows) >= 7
    assert [row for row in rows if row not in FIGURES] == []


def test_new_results_name_their_commit(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    harness, report = import_module("harness"), import_module("report")
    found = harness.provenance("cpu")
    assert torch.__version__.startswith(found["machine_info"]["torch"])
    commit = found["commit_info"]
    assert commit.keys() == {"id", "time", "dirty"}
    if (ROOT / ".git").exists():
        head = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(head, cwd=ROOT, capture_output=True, encoding="utf-8")
        assert commit["id"] == done.stdout.strip()
    commit["dirty"] = False
    assert report.revision(found) == f"commit {commit['id'][:7]}"
    commit["dirty"] = True
    assert report.revision(found) == f"commit {commit['id'][:7]} and changes beyond it"

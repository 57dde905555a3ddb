"""Tests the plugin `collecting`: selection of benchmarks, and of GPU tests without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]


def output(*arguments):
    """The output of `pytest` with these arguments, in a process without a GPU."""
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    }
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def collected(text):
    """The files of the collected tests."""
    return {line.split("::")[0] for line in text.splitlines() if "::" in line}


@pytest.mark.slow
def test_benchmark_only_collects_the_benchmarks():
    text = output("--benchmark-only", "--collect-only", "-q")
    assert collected(text) == {f"bench/{path.name}" for path in ROOT.glob("bench/bench_*.py")}
    assert "[cpu-1x196x768-float32-scclip_fast torch]" in text and "[cuda" not in text


@pytest.mark.slow
def test_benchmark_runs_them(tmp_path):
    """The JSON file holds the commit and the versions that were measured."""
    path = tmp_path / "results.json"
    output("--benchmark", "-k", "test_repair and 1x196", f"--benchmark-json={path}")
    results = json.loads(path.read_text())
    providers = {entry["extra_info"]["provider"] for entry in results["benchmarks"]}
    assert providers == {"scclip_fast torch", "published"}
    assert (
        results["commit_info"].keys() == {"id", "time", "dirty"}
        and results["machine_info"]["torch"]
    )


@pytest.mark.slow
def test_benchmark_leaves_paths_alone():
    text = output("--benchmark", "--collect-only", "-q", "bench/bench_repair.py")
    assert collected(text) == {"bench/bench_repair.py"}


@pytest.mark.parametrize(
    "arguments, passed, deselected",
    [
        ((), 1, "3 tests"),
        pytest.param(("-n1",), 1, "3 tests", marks=pytest.mark.slow),
        (("-k", "test_gpu"), 0, "1 test"),
    ],
    ids=["one process", "a worker", "some of them"],
)
def test_cases_of_a_gpu_are_deselected(pytester, monkeypatch, arguments, passed, deselected):
    pytester.makepyfile("""
        import pytest
        both = ["cpu", *(pytest.param(i, marks=pytest.mark.gpu) for i in "ab")]
        @pytest.mark.parametrize("device", both)
        def test_both(device): assert device == "cpu"
        @pytest.mark.gpu
        def test_gpu(): assert False
        """)
    pytester.makeini("[pytest]\naddopts = -pcollecting\nmarkers = gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the worker, a process of its own
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    run = pytester.runpytest_inprocess(*arguments)
    assert run.ret == (0 if passed else pytest.ExitCode.NO_TESTS_COLLECTED)
    text = run.stdout.str()
    assert f"deselected {deselected}: there is no GPU" in text
    assert f"{passed} passed" in text or not passed
    assert "skipped" not in text

"""The fixture `race`, and the description of the machine in result files."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

# pytest's importlib mode does not put this folder on the path. No folder `kernels` is in it that
# could be taken for Hugging Face's package.
sys.path.append(str(Path(__file__).parent))

import harness


@pytest.fixture
def race(request, benchmark):
    yield partial(harness.race, request, benchmark)
    torch.compiler.reset()  # otherwise each shape counts towards the limit of recompilations


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keeps the processor and the versions, without the name of the host and without paths."""
    cpu = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    python = machine_info["python_version"]
    machine_info.clear()
    machine_info.update(cpu=cpu, torch_threads=torch.get_num_threads(), python_version=python)
    machine_info.update(harness.environment("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_benchmark_update_commit_info(config, commit_info):
    for key in commit_info.keys() - harness.COMMIT:
        del commit_info[key]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Drops the time of every round, and adds the benchmarks that did not fit in memory."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
    output_json["skipped"] = config.stash.get(harness.SKIPPED, [])

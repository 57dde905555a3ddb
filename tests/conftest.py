"""Turns on Triton's interpreter where there is no GPU, before anything imports the kernels."""

import os
import subprocess
import sys
import zlib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from scclip_fast.kernels.knn_details import table

    table.MOST_PROGRAMS = 8  # the interpreter runs them one after the other

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, where threads of one wait for those of another. The variable is for
    # the processes that tests start.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

POISON = -77_777_777
SHORT_POISON = 77  # in integers of 8 and 16 bits, and True in bool
ROOT = Path(__file__).resolve().parents[1]


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.write_sep("=", "kernels compiled ahead of time")
                terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def seed(request):
    """A seed of its own for every test, printed when the test fails."""
    value = zlib.crc32(request.node.nodeid.encode())
    sys.stdout.write(f"seed {value}\n")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def no_plans():
    """No plan of launches is left from a test that changed what a kernel's launcher depends on."""
    from scclip_fast.kernels import _plan

    _plan._calls.cache_clear()


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element no one writes shows."""

    def poison(empty):
        def filled(*args, **kwargs):
            out = empty(*args, **kwargs)
            integer = POISON if out.itemsize >= 4 else SHORT_POISON
            return out.fill_(torch.nan if out.is_floating_point() else integer)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def hide(names: tuple[str, ...], path: list[str], folder: Path) -> list[str]:
    """`path`, links to all else instead of a site-packages that holds distributions so named."""
    hidden: dict[Path, set[str]] = {}
    for found in distributions():
        if found.name in names:
            tops = {file.parts[0] for file in found.files}
            hidden.setdefault(Path(found.locate_file("")).resolve(), set()).update(tops)
    for number, (site, tops) in enumerate(hidden.items()):
        links = folder / str(number)
        links.mkdir(parents=True)
        for entry in site.iterdir():
            if entry.name not in tops:
                (links / entry.name).symlink_to(entry)
        path = [str(links) if Path(p).resolve() == site else p for p in path]
    return path


@pytest.fixture
def python(tmp_path):
    """Run code in a fresh interpreter that has our dependencies, less some; returns its output."""

    def run(
        code: str, *, cwd: Path, path: tuple[Path, ...] = (), without: tuple[str, ...] = ()
    ) -> list[str]:
        packages = [p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests")]
        packages = hide(without, packages, tmp_path / "packages")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *packages])}
        env.pop("PYTHONSAFEPATH", None)
        # -S: the site module would put the full site-packages and an installed scclip_fast back.
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run

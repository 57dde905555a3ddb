"""Without a GPU the kernels run in Triton's interpreter, asked for before they are imported."""

import os
import sys
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from scclip_fast.kernels import nearest

    nearest.PROGRAMS = 8  # which the interpreter runs one after the other

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and threads wait for each other
    torch.set_num_threads(1)

POISON = -77_777_777


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element no one writes shows."""

    def poison(empty):
        def filled(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else POISON)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))

"""A plugin of pytest that decides which tests a run collects: benchmarks, and tests of a GPU."""

import pytest
import torch

DESELECTED = pytest.StashKey[int]()


def pytest_addoption(parser):
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks, those of bench/ where no path is given, and no test",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config, args):
    """Puts bench/ in the place of `testpaths`, whose conftest would turn the interpreter on."""
    known = early_config.known_args_namespace
    if known.benchmark:
        args.append("--benchmark-only")
    elif not getattr(known, "benchmark_only", False):
        return
    if not known.file_or_dir and early_config.invocation_params.dir == early_config.rootpath:
        args.append("bench")
        known.file_or_dir.append("bench")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Comes after -k and -m, so that the count is of tests that were asked for."""
    if torch.cuda.is_available():
        return
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needy)
        config.stash[DESELECTED] = len(needy)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["needs_gpu"] = session.config.stash.get(DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    count = getattr(node, "workeroutput", {}).get("needs_gpu", 0)
    node.config.stash[DESELECTED] = max(count, node.config.stash.get(DESELECTED, 0))


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(DESELECTED, 0):
        tests = "1 test" if count == 1 else f"{count:,} tests"
        terminalreporter.write_line(f"deselected {tests}: there is no GPU")

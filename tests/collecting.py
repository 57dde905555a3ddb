"""A pytest plugin that selects benchmarks and deselects GPU tests where there is no GPU."""

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
    """Collects bench/ instead of `testpaths`, whose conftest would turn the interpreter on."""
    options = early_config.known_args_namespace
    if options.benchmark:
        args.append("--benchmark-only")
    elif not getattr(options, "benchmark_only", False):
        return
    if not options.file_or_dir and early_config.invocation_params.dir == early_config.rootpath:
        args.append("bench")
        options.file_or_dir.append("bench")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deselects GPU tests after -k and -m, so that only tests that were asked for are counted."""
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)
        config.stash[DESELECTED] = len(needs_gpu)


def pytest_sessionfinish(session):
    """Sends the count from a pytest-xdist worker to the process that prints the summary."""
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

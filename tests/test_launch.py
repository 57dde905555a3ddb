"""Launches without a GPU: what they take from its properties, and how often they are compiled.

Run as a program without Triton's interpreter, the file prints the variants of a launch whose second
run would take the wrong compiled kernel.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from scclip_fast.kernels import _launch, _run

L4 = dict(major=8, minor=9, shared_memory_per_block_optin=101376, multi_processor_count=58)


@pytest.fixture
def gpu(monkeypatch):
    """A device with the properties of an L4."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**L4))
    _launch.architecture.cache_clear()
    yield torch.device("cuda:0")
    _launch.architecture.cache_clear()


def test_nvidia(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    architecture = _launch.architecture(gpu)
    assert architecture == _launch.Architecture(89, 99 * 1024, 58)
    assert architecture.options is _launch.NVIDIA
    assert architecture.options.float32_products == "tf32x3"


def test_amd(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delitem(L4, "shared_memory_per_block_optin")
    monkeypatch.setitem(L4, "shared_memory_per_block", 65536)
    architecture = _launch.architecture(gpu)
    assert architecture == _launch.Architecture(0, 64 * 1024, 58)
    assert architecture.options is _launch.AMD
    assert architecture.options.float32_products == "ieee"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_gpu(device):
    device = torch.device(device)
    assert _launch.architecture(device) == _launch.WITHOUT_GPU
    assert _launch.architecture(device).multiprocessors == 132


@pytest.mark.parametrize(
    "capability, warps, stages", [(90, 4, 4), (80, 8, 2), (86, 8, 2), (100, 8, 2), (0, 8, 1)]
)
def test_options(capability, warps, stages):
    """Hopper takes the options as given, others two stages and eight warps, and AMD one stage."""
    launch = _launch.Launch(None, 1, num_warps=4, num_stages=4)
    gpu = _launch.Architecture(capability, 64 * 1024)
    assert launch.compile_options(gpu) == dict(num_warps=warps, num_stages=stages)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 127, 128, 129])
def test_sizes(n):
    assert _launch.cdiv(n, 4) == triton.cdiv(n, 4)
    assert _launch.power_of_two(n, 2, 128) == min(128, max(2, triton.next_power_of_2(n)))


class Compiled(triton.compiler.CompiledKernel):
    """Stands in for a compiled kernel, and counts its launches."""

    def __init__(self, arguments):
        self.arguments, self.module, self.launched = arguments, None, []

    def __getitem__(self, grid):
        return lambda *values: self.launched.append((grid, values))


class Kernel:
    """Stands in for a jit function: each call compiles."""

    arg_names = ("x_ptr", "N", "SCALE")

    def __init__(self):
        self.__name__, self.fn, self.calls = "_kernel", object(), []

    def __getitem__(self, grid):
        def compile_and_run(**arguments):
            self.calls.append(Compiled(arguments))
            return self.calls[-1]

        return compile_and_run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_run, "keeps_compiled", lambda device: True)
    monkeypatch.setattr(_run, "call", lambda kernel, programs, a: kernel[(programs,)](**a))
    _run._compiled.cache_clear()
    yield Kernel()
    _run._compiled.cache_clear()


def launched(kernel, x, n=5, programs=7, scale=1.0, **options):
    _launch.Launch(kernel, programs, SCALE=scale, N=n, x_ptr=x, **options).run()


def test_a_second_run_takes_the_compiled_kernel(kernel):
    first, second = torch.zeros(2, 16)
    launched(kernel, first)
    launched(kernel, second, programs=9)
    (compiled,) = kernel.calls
    ((grid, (x, n, scale)),) = compiled.launched
    assert grid == (9, 1, 1) and x is second and (n, scale) == (5, 1.0)


def test_what_triton_tells_apart_is_compiled_again(kernel, monkeypatch):
    x = torch.zeros(64)
    launched(kernel, x)
    others = [
        dict(x=x[1:]),  # not aligned to 16 bytes
        dict(x=x.half()),
        dict(x=x, n=16),
        dict(x=x, n=1),
        dict(x=x, scale=1),  # an integer 1, which equals 1.0
        dict(x=x, scale=True),
        dict(x=x, num_warps=8),
        dict(x=x, num_stages=2),
    ]
    for count, other in enumerate(others, start=2):
        launched(kernel, **other)
        assert len(kernel.calls) == count, other
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    launched(kernel, x)
    assert len(kernel.calls) == len(others) + 2
    assert all(not compiled.launched for compiled in kernel.calls)
    first, second = (_run.key_of(kernel, {}, {}, torch.device("cuda", i)) for i in (0, 1))
    assert first != second


def test_few_compiled_kernels_are_kept(kernel):
    x = torch.zeros(1)
    for n in range(_run.MOST_SPECIALISATIONS + 1):
        launched(kernel, x, n)
    assert _run._compiled.cache_info().currsize == _run.MOST_SPECIALISATIONS
    launched(kernel, x, 0)  # was forgotten
    assert len(kernel.calls) == _run.MOST_SPECIALISATIONS + 2


def test_threads(kernel):
    """Threads that run one launch at a time each launch it once, and each of its sizes apart."""
    x = torch.zeros(1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: launched(kernel, x, i % 3, programs=i + 1), range(600)))
    runs = [
        (compiled.arguments["N"], values[1])
        for compiled in kernel.calls
        for _, values in compiled.launched
    ]
    assert len(runs) + len(kernel.calls) == 600
    assert all(own == n for own, n in runs)


@triton.jit(do_not_specialize=["N"])
def _specialised_kernel(x_ptr, N, stride_xn, scale, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + rows * stride_xn, mask=rows < N, other=0)
    tl.store(x_ptr + rows * stride_xn, (x * scale).to(x.dtype), mask=rows < N)


def variants():
    """Yields launches of one kernel by name."""
    x = torch.zeros(4096)
    base = dict(x_ptr=x, N=8, stride_xn=2, scale=1.0, BLOCK=32)
    changes = dict(
        base={},
        offset=dict(x_ptr=x[1:]),
        aligned_offset=dict(x_ptr=x[4:]),
        half=dict(x_ptr=x.half()),
        stride_of_1=dict(stride_xn=1),
        stride_of_16=dict(stride_xn=16),
        stride_of_64_bits=dict(stride_xn=2**33),
        other_n=dict(N=16),
        n_of_64_bits=dict(N=2**33),
        other_scale=dict(scale=2.0),
        whole_scale=dict(scale=1),
        block=dict(BLOCK=64),
    )
    for name, change in changes.items():
        yield name, _launch.Launch(_specialised_kernel, 1, **base | change)


def wrong_variants() -> list[str]:
    """The variants whose second run does not take the kernel that Triton compiles for them."""
    wrong = []
    for _, launch in variants():
        launch.run()
    for name, launch in variants():
        options = launch.compile_options(_launch.WITHOUT_GPU)
        key = _run.key_of(launch.kernel, launch.arguments, options, torch.device("cpu"))
        own = launch.kernel.warmup(**launch.arguments, **options, grid=(1,))
        if [kernel.hash for kernel in _run._compiled(key)] != [own.hash]:
            wrong.append(name)
    return wrong


def test_second_runs_take_what_triton_compiles(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= dict(PYTHONPATH=str(Path(__file__).parents[1]), TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


if __name__ == "__main__":
    import idle_driver

    idle_driver.install()
    sys.stdout.write(json.dumps(wrong_variants()))

"""Compares implementations: checks the result, then measures memory and time.

A benchmark file maps names to plain functions by device, `PROVIDERS["cpu"]["cdist + topk"](x)`.
Shapes are (B, N, D): images, tokens of a square image, width.

On a machine with other work to do, run the suite with OMP_NUM_THREADS=1. Threads that wait for each
other wait for the core of the slowest: a product of half a millisecond has taken 40.
"""

from __future__ import annotations

import datetime
import math
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from shutil import which

import pytest
import torch
import torch.nn.functional as F
from cpuinfo import get_cpu_info
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

# tests/ has `measure` and the published algorithms. pytest finds them there, a script does not.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from measure import measure

Shape = tuple[int, int, int]

PACKAGES = ("torch", "triton", "scikit-learn")
COMMIT = ("id", "time", "dirty")  # dirty: whether files differed from the commit

ARGUMENTS = ("device", "shape", "dtype", "provider")
CPU_SHAPES = ((1, 196, 768), (64, 196, 768), (1, 5184, 1024))
SHAPES = {"cpu": CPU_SHAPES, "cuda": (*CPU_SHAPES, (1, 82944, 256))}

SECONDS = 1  # for the rounds of one provider
SLOW = 3  # seconds; a longer call is timed twice
ROUNDS = (3, 100)

# ||a - b|| / ||b||. That of float16 allows for formulations whose N x N matrices are float16.
RELATIVE_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2}
SCORE_ERROR = 1e-5
# Squared distances tie if they differ by less than this share of the squared norm of the centred
# token: float32 rounding.
TIE = 1e-6

SKIPPED = pytest.StashKey[list]()


def cases(
    providers: dict[str, dict[str, Callable]], *dtypes: str, shapes: tuple[Shape, ...] = ()
) -> list:
    """Lists parameters for `ARGUMENTS`: each provider on each shape.

    Args:
        providers: functions by device and name.
        dtypes: the dtypes on a GPU; on the CPU the dtype is float32.
        shapes: the shapes on both devices, by default `SHAPES`.
    """
    parameters = []
    for device, usual in SHAPES.items():
        marks = pytest.mark.gpu if device == "cuda" else ()
        used = dtypes if device == "cuda" else ("float32",)
        for shape, dtype, provider in product(shapes or usual, used, providers[device]):
            name = "-".join((device, "x".join(map(str, shape)), dtype, provider))
            parameters.append(pytest.param(device, shape, dtype, provider, id=name, marks=marks))
    return parameters


@cache
def tokens(device: str, shape: Shape, dtype: str, seed: int = 0) -> Tensor:
    """Draws tokens like those of an image: smooth regions, noise, a mean, a few noisier tokens."""
    b, n, d = shape
    generator = torch.Generator().manual_seed(seed)
    side = math.isqrt(n)
    coarse = torch.randn(b, d, max(2, side // 6), max(2, side // 6), generator=generator)
    regions = F.interpolate(coarse, (side, side), mode="bicubic").flatten(2).mT
    noise = torch.randn(b, n, d, generator=generator)
    noise[:, ::37] *= 3
    x = regions + 0.5 * noise + torch.randn(b, 1, d, generator=generator)
    return x.to(device, getattr(torch, dtype)).contiguous()


@cache
def heads(device: str, shape: Shape, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q, k and v (B, H, N, 64) with the strides that projections of (B, N, D) tokens have.

    v has a mean, as tokens do. White noise averages to almost nothing, so that each pair that
    rounding moves across the threshold of the similarities would be a large relative error.
    """
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, *shape, generator=generator).to(device, getattr(torch, dtype))
    packed = (q, k, tokens(device, shape, dtype, seed=2))
    q, k, v = (t.unflatten(2, (-1, 64)).transpose(1, 2) for t in packed)
    return q, k, v


def matrices(count: float, shape: Shape, dtype: str) -> int:
    """Returns the bytes of `count` N x N matrices for each image."""
    b, n, _ = shape
    return int(count * b * n * n * getattr(torch, dtype).itemsize)


def race(
    request: pytest.FixtureRequest,
    benchmark,
    call: Callable[[], object],
    check: Callable[[object], None] | None,
    extra_bytes: int = 0,
) -> None:
    """Checks the result of `call`, then measures its memory, then its time.

    Args:
        request: pytest's fixture of that name.
        benchmark: pytest-benchmark's fixture of that name.
        call: the function without arguments.
        check: raises for a wrong result; None where `call` is only a scale for the others.
        extra_bytes: memory that `call` is known to need; without so much the benchmark is skipped.
    """
    entry = {"op": request.function.__name__.removeprefix("test_")}
    entry.update((name, request.node.callspec.params[name]) for name in ARGUMENTS)
    device, compiles = entry["device"], entry["provider"].startswith("torch.compile")
    if compiles and device == "cpu" and not which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    if extra_bytes > (free := _free_bytes(device)):
        request.config.stash.setdefault(SKIPPED, []).append({**entry, "needs_bytes": extra_bytes})
        pytest.skip(f"needs {extra_bytes / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free")

    def finished():
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    run = measure(finished, device)
    if check is not None:
        check(run.result)
    # A first call may compile and fill caches, which does not matter if the call is slow.
    if run.seconds < SLOW or compiles:
        run = measure(finished, device)
    seconds, peak = run.seconds, run.peak_bytes
    del run
    benchmark.group = " ".join(map(str, (entry["op"], entry["shape"], entry["dtype"], device)))
    benchmark.extra_info.update(entry, peak_bytes=peak, **environment(device))
    rounds = 2 if seconds > SLOW else min(max(int(SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
    benchmark.pedantic(finished, rounds=rounds, warmup_rounds=int(seconds < 0.1))


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    tolerance = RELATIVE_ERROR[out.dtype]
    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}, allowed {tolerance:.0e}"


def assert_same_outliers(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Asserts that there are as many outliers, and that every token has the same score."""
    (outliers, scores), (expected_outliers, expected_scores) = result, expected
    assert len(outliers) == len(expected_outliers)
    error = (scores / expected_scores - 1).abs().max().item()
    assert error <= SCORE_ERROR, f"a score is off by {error:.1e}, allowed {SCORE_ERROR:.0e}"


def assert_same_neighbors(indices: Tensor, expected: Tensor, x: Tensor) -> None:
    """Asserts that the sets (B, N, k) are the same, but for tokens at tied distances."""
    indices, expected = indices.sort(dim=-1).values, expected.sort(dim=-1).values
    assert indices.shape == expected.shape and (indices.diff(dim=-1) > 0).all()
    image, row = (indices != expected).any(dim=-1).nonzero(as_tuple=True)
    centred = x.double() - x.double().mean(dim=1, keepdim=True)
    token = centred[image, row].unsqueeze(1)

    def distances(neighbors: Tensor) -> Tensor:
        others = centred[image.unsqueeze(1), neighbors[image, row]]
        return (others - token).square().sum(dim=-1).sort(dim=-1).values

    error = (distances(indices) - distances(expected)).abs() / token.square().sum(dim=-1)
    assert (error <= TIE).all(), f"{len(row)} sets differ, a distance by {error.max().item():.1e}"


def _free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in names:  # macOS reports all memory, of which half may be free
        return os.sysconf("SC_PHYS_PAGES") // 2 * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30  # Windows has no sysconf


def provenance(device: str) -> dict[str, object]:
    """Returns date, commit and machine for a result file, under the keys of pytest-benchmark."""
    commit = get_commit_info()
    return {
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit_info": {key: commit.get(key) for key in COMMIT},
        "machine_info": environment(device),
    }


@cache
def environment(device: str) -> dict[str, str | None]:
    """Returns the name of the device and the versions, for every entry of a result file."""
    name = torch.cuda.get_device_name() if device == "cuda" else get_cpu_info().get("brand_raw")
    return {"device_name": name} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

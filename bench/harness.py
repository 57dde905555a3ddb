"""A race: several providers of one answer; who has it right has its memory and then its time taken.

A benchmark file maps names to plain functions by device, `PROVIDERS["cpu"]["cdist + topk"](x)`.
Shapes are (B, N, D): images, tokens of a square image, width.

On a machine with other work to do, run the suite with OMP_NUM_THREADS=1: threads that wait for each
other wait for the core of the slowest, and a product of half a millisecond was seen to take 40.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from shutil import which

import pytest
import torch
import torch.nn.functional as F
from cpuinfo import get_cpu_info
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

from scclip_fast.measure import measure

Shape = tuple[int, int, int]

PACKAGES = ("torch", "triton", "scikit-learn")
COMMIT = ("id", "time", "dirty")  # dirty: the tree held changes that the commit has not

ARGUMENTS = ("device", "shape", "dtype", "provider")
CPU_SHAPES = ((1, 196, 768), (64, 196, 768), (1, 5184, 1024))
SHAPES = {"cpu": CPU_SHAPES, "cuda": (*CPU_SHAPES, (1, 82944, 256))}

SECONDS = 1  # for the rounds of one provider
SLOW = 3  # seconds; a longer call is timed twice
ROUNDS = (3, 100)

# ||a - b|| / ||b||. Float16 is what formulations lose that keep their N x N matrices in it.
RELATIVE_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2}
SCORE_ERROR = 1e-5
# Squared distances tie within this share of the squared norms about the mean: float32 rounding.
TIE = 1e-6

SKIPPED = pytest.StashKey[list]()


def cases(
    providers: dict[str, dict[str, Callable]], *dtypes: str, shapes: tuple[Shape, ...] = ()
) -> list:
    """Parameters `ARGUMENTS`: each provider on each shape, on a GPU in `dtypes`, else float32.

    Without `shapes`, those of tokens in `SHAPES`.
    """
    found = []
    for device, usual in SHAPES.items():
        marks = pytest.mark.gpu if device == "cuda" else ()
        used = dtypes if device == "cuda" else ("float32",)
        for shape, dtype, provider in product(shapes or usual, used, providers[device]):
            name = "-".join((device, "x".join(map(str, shape)), dtype, provider))
            found.append(pytest.param(device, shape, dtype, provider, id=name, marks=marks))
    return found


@cache
def tokens(device: str, shape: Shape, dtype: str, seed: int = 0) -> Tensor:
    """Smooth regions and noise about a common mean, and a few noisier tokens, as in an image."""
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
    """q, k and v (B, H, N, 64), strided as the projections of (B, N, D) tokens leave them.

    v has a mean, as tokens do: means of white noise would show each pair that rounding moves across
    the threshold of the similarities.
    """
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, *shape, generator=generator).to(device, getattr(torch, dtype))
    packed = (q, k, tokens(device, shape, dtype, seed=2))
    q, k, v = (t.unflatten(2, (-1, 64)).transpose(1, 2) for t in packed)
    return q, k, v


def matrices(count: float, shape: Shape, dtype: str) -> int:
    """Bytes of `count` N x N matrices for each image."""
    b, n, _ = shape
    return int(count * b * n * n * getattr(torch, dtype).itemsize)


def race(
    request: pytest.FixtureRequest,
    benchmark,
    call: Callable[[], object],
    check: Callable[[object], None] | None,
    extra_bytes: int = 0,
) -> None:
    """Check the answer of `call`, then measure its memory, then its time.

    Args:
        check: raises on a wrong answer; None for what is no answer, only a scale.
        extra_bytes: what `call` is known to hold; skipped where that does not fit in free memory.
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
    # A first call may compile and fill caches; only where that is nothing beside it does it count.
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
    limit = RELATIVE_ERROR[out.dtype]
    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error <= limit, f"relative error {error:.1e}, allowed {limit:.0e}"


def assert_same_outliers(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """As many outliers, and the same score for every token."""
    (outliers, scores), (expected_outliers, expected_scores) = found, expected
    assert len(outliers) == len(expected_outliers)
    error = (scores / expected_scores - 1).abs().max().item()
    assert error <= SCORE_ERROR, f"a score is off by {error:.1e}, allowed {SCORE_ERROR:.0e}"


def assert_same_neighbors(indices: Tensor, expected: Tensor, x: Tensor) -> None:
    """The same sets (B, N, k), but for tokens as far away as those they stand for."""
    found, expected = indices.sort(dim=-1).values, expected.sort(dim=-1).values
    assert found.shape == expected.shape and (found.diff(dim=-1) > 0).all()
    image, row = (found != expected).any(dim=-1).nonzero(as_tuple=True)
    centred = x.double() - x.double().mean(dim=1, keepdim=True)
    token = centred[image, row].unsqueeze(1)

    def distances(neighbors: Tensor) -> Tensor:
        others = centred[image.unsqueeze(1), neighbors[image, row]]
        return (others - token).square().sum(dim=-1).sort(dim=-1).values

    off = (distances(found) - distances(expected)).abs() / token.square().sum(dim=-1)
    assert (off <= TIE).all(), f"{len(row)} sets differ, a distance by {off.max().item():.1e}"


def _free_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    known = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES") if known else os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def provenance(device: str) -> dict[str, object]:
    """Date, commit and machine of a result file, under the keys that pytest-benchmark uses."""
    commit = get_commit_info()
    return {
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit_info": {key: commit.get(key) for key in COMMIT},
        "machine_info": environment(device),
    }


@cache
def environment(device: str) -> dict[str, str | None]:
    """The device's name and the versions, as every entry of a result carries them."""
    name = torch.cuda.get_device_name() if device == "cuda" else get_cpu_info().get("brand_raw")
    return {"device_name": name} | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Times of calls on a GPU, and rows of results with time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import harness  # noqa: F401 (puts tests/ on the path)
import torch
from measure import measure
from torch import Tensor

FLUSH_BYTES = 128 * 2**20
ROUNDS = 20
FEW = 3  # rounds of a call that takes over 50 ms


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Returns a replay of the call's CUDA graph, or the call itself where capture fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        return call
    return graph.replay


def milliseconds(call: Callable[[], object], flush: Tensor) -> float:
    """Returns the median time of a call, with `flush` written before each."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < (ROUNDS if not times or times[0] < 50 else FEW):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def replayed(call: Callable[[], object], flush: Tensor) -> float:
    """Returns the median time of replays of the call's CUDA graph."""
    return milliseconds(graph_of(call), flush)


def on_the_host(call: Callable[[], object], flush: Tensor) -> float:
    """Returns the median time until a call returns, on an idle GPU that it does not wait for."""
    times = []
    for _ in range(10 * ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def entry(
    op: str, shape: tuple, dtype: str, provider: str, call, check=None, clock=replayed
) -> dict:
    """Measures one row of the results.

    `check` returns further fields from the result of a call, `clock` its time.
    """
    row = dict(op=op, shape=shape, dtype=dtype, provider=provider)
    try:
        torch.cuda.empty_cache()
        call()
        run = measure(call, "cuda")
        if check is not None:
            row |= check(run.result)
        peak = run.peak_bytes
        del run
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        row |= dict(milliseconds=clock(call, flush), peak_bytes=peak)
    except Exception as error:
        torch.cuda.synchronize()
        row |= dict(failed=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row

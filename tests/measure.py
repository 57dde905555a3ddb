"""The time and the peak memory of a call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Measurement(NamedTuple):
    result: object
    seconds: float
    peak_bytes: int | None
    """The peak of memory during the call, less the memory held before; the result counts. None
    where the system does not report it.
    """


def measure(call: Callable[[], object], device: torch.device | str = "cpu") -> Measurement:
    """Runs `call` once and measures it.

    On a GPU the peak is that of torch's allocator. On the CPU it is the growth of the resident set,
    whose peak Linux lets a process reset; it includes the workspace of the matrix libraries.
    """
    device = torch.device(device)
    before: int | None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident("VmRSS") if _reset_peak() else None
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if before is None:
        peak = None
    elif device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = max(0, _resident("VmHWM") - before)
    return Measurement(result, seconds, peak)


def _reset_peak() -> bool:
    """Resets the peak of the resident set; returns False where the system has no such reset.

    Free memory first goes back to the system: a call that reuses it would not raise the peak.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return False
    return True


def _resident(field: str) -> int:
    """Returns VmRSS, the resident set, or VmHWM, its peak since the reset, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024

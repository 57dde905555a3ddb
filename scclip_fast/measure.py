"""Time and peak extra memory of a call, on CPU and GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Measurement(NamedTuple):
    result: object
    seconds: float
    peak_bytes: int | None
    """Most memory held at once beyond what was held before, the result included; None where the
    system can't tell.
    """


def measure(call: Callable[[], T], device: torch.device | str = "cpu") -> Measurement:
    """Run `call` once and measure it.

    On a GPU the peak is that of torch's allocator. On the CPU it is the growth of the resident set,
    which Linux lets a process reset; it holds the scratch of the matrix libraries too.
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
    """Give free memory back to the system, or a call would reuse it unseen, and restart VmHWM."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):  # not Linux with glibc
        return False
    return True


def _resident(field: str) -> int:
    """VmRSS, now, or VmHWM, the most since the reset, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024

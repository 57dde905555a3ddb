"""Python's time for the calls of the kernels, without a GPU: python bench/host_time.py

The driver of tests/idle_driver.py does nothing, so that a call ends where its last launch is handed
over. The tensors are small and on the CPU: the launches are those of any larger image. Columns:
launches of kernels, operations of torch that compute something, least time of 300 calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import harness  # noqa: F401 (puts tests/ on the path)
import idle_driver
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scclip_fast.kernels.aggregate import aggregate_triton
from scclip_fast.kernels.attention import attention_triton
from scclip_fast.kernels.knn import nearest_triton
from scclip_fast.kernels.lof import simplified_lof_triton
from scclip_fast.kernels.mean_similarity import mean_similarity_triton
from scclip_fast.kernels.outlier_mask import outlier_mask_triton
from scclip_fast.kernels.repair import repair_triton

TOKENS, CHANNELS, K = 35 * 35, 64, 30  # takes the launches of any image of up to 5760 tokens
CALLS = 300
WITHOUT_KERNEL = ("empty", "view", "slice", "select", "as_strided", "unbind", "squeeze", "expand")
WITHOUT_KERNEL += ("transpose", "permute", "detach", "alias")


class Operations(TorchDispatchMode):
    """Counts the operations of torch that run a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(word in func.overloadpacket.__name__ for word in WITHOUT_KERNEL)
        return func(*args, **(kwargs or {}))


def calls() -> dict[str, Callable[[], object]]:
    """Returns the calls by name, with the kernels' share of the public op of that name."""
    x = torch.randn(1, TOKENS, CHANNELS)
    half, floor, mask = x.half(), torch.zeros(1), torch.zeros(1, TOKENS, dtype=torch.bool)
    heads = half.unflatten(2, (4, 16)).transpose(1, 2)
    scores = torch.rand(1, TOKENS)

    def lof_scores() -> Tensor:
        distances, neighbors = nearest_triton(x, K, False)
        return simplified_lof_triton(distances[..., -1], neighbors)

    def blended_attention() -> Tensor:
        mu = mean_similarity_triton(half).clamp(max=1)
        aggregate_triton(half, half, mu, 3.0, 1e-30)
        return attention_triton(heads, heads, heads, heads, 0.5, 0.25)

    return {
        "nearest": partial(nearest_triton, x, K, False),
        "lof_scores": lof_scores,
        "outlier_mask": partial(outlier_mask_triton, scores, 0.05),
        "aggregate, float16": partial(aggregate_triton, half, half, floor, None, 1e-6),
        "aggregate, float32": partial(aggregate_triton, x, x, floor, None, 1e-6),
        "blended_attention, float16": blended_attention,
        "repair": partial(repair_triton, x, mask, (35, 35)),
    }


def microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def main() -> None:
    idle_driver.install()
    sys.stdout.write("| call | launches | operations of torch | time |\n|---|--:|--:|--:|\n")
    for name, call in calls().items():
        for _ in range(3):  # compiles, records a plan, repeats it
            call()
        before = idle_driver.Driver.launches
        with Operations() as operations:
            call()
        launches = idle_driver.Driver.launches - before
        row = f"| {name} | {launches} | {operations.count} | {microseconds(call):.0f} µs |\n"
        sys.stdout.write(row)


if __name__ == "__main__":
    main()

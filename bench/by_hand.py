"""The torch path on a CPU beside what a user writes by hand: python bench/by_hand.py --out JSON

A ratio is the time of the formulation by hand divided by that of scclip_fast. Both are timed in
turn in one process, and the shortest time of each counts, so that other work on the machine hits
both alike. Above 1, scclip_fast is faster. As in a process that ran a model, a large tensor was
freed before, after which the C library keeps freed memory for the next tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_aggregate
import bench_attention
import bench_knn
import bench_lof
import bench_repair
import harness
import torch
from torch import Tensor

import scclip_fast as sf
from scclip_fast import reference

SHAPES = (
    *((1, 196, 768), (8, 196, 768), (64, 196, 768), (1, 441, 768)),
    *((1, 1024, 768), (1, 2304, 1024), (1, 5184, 1024)),
)
SECONDS = 3  # for both sides of a ratio, as often as they fit
Call = Callable[[], object]


def lof_scores_by_hand(x: Tensor) -> Tensor:
    distances, indices = bench_knn.matmul_topk(x)
    return reference.simplified_lof(distances[..., -1], indices)


def pairs(shape: harness.Shape) -> dict[str, tuple[Call, Call]]:
    """The calls by hand and of scclip_fast, by op."""
    x, (q, k, v) = (make("cpu", shape, "float32") for make in (harness.tokens, harness.heads))
    values, side = v.transpose(1, 2).flatten(2), math.isqrt(shape[1])
    cut = x[:, : side * side], bench_repair.outliers("cpu", shape)[:, : side * side], (side, side)
    with_sklearn = {
        "lof, scikit-learn": (
            partial(bench_lof.sklearn_lof, x),
            partial(sf.lof_scores, x, variant="breunig"),
        ),
        "knn, scikit-learn": (partial(bench_knn.sklearn_neighbors, x), partial(sf.knn, x, 30)),
    }
    return {
        "lof_scores": (partial(lof_scores_by_hand, x), partial(sf.lof_scores, x)),
        "knn": (partial(bench_knn.matmul_topk, x), partial(sf.knn, x, bench_knn.K)),
        "aggregate": (
            partial(bench_aggregate.published, values, x),
            partial(sf.aggregate, values, x),
        ),
        "blended_attention": (
            partial(bench_attention.sdpa, q, k, v, x),
            partial(sf.blended_attention, q, k, v, x),
        ),
        "repair": (partial(bench_repair.published, *cut), partial(sf.repair, *cut)),
    } | (with_sklearn if shape[1] >= 5184 else {})


def race(by_hand: Call, ours: Call) -> dict[str, float]:
    """Milliseconds of both, and their ratio."""
    for call in (by_hand, ours):
        call()
    best = [math.inf, math.inf]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for side, call in enumerate((by_hand, ours)):
            start = time.perf_counter()
            call()
            best[side] = min(best[side], time.perf_counter() - start)
    by_hand_ms, ours_ms = (1e3 * seconds for seconds in best)
    return {"by_hand_ms": by_hand_ms, "ours_ms": ours_ms, "ratio": by_hand_ms / ours_ms}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.ones(30 * 2**20, dtype=torch.uint8)  # more than 32 MiB are always returned to the system
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for op, calls in pairs(shape).items():
                row = {"op": op, "shape": shape, "threads": threads} | race(*calls)
                rows.append(row)
                print(
                    f"{op:<20} {'x'.join(map(str, shape)):<12} {threads} threads: "
                    f"{row['by_hand_ms']:.2f} / {row['ours_ms']:.2f} ms = {row['ratio']:.2f}",
                    flush=True,
                )
    result = harness.provenance("cpu") | {"by_hand": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

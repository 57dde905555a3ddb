"""What the tests of several ops share: where and how ops run, shapes, kinds of features."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()

#: (device, backend): the reference is what they are compared with.
RUNS = [
    pytest.param("cpu", "torch", id="torch"),
    pytest.param(
        "cpu",
        "triton",
        id="interpreter",
        marks=pytest.mark.skipif(GPU, reason="the kernels run on the GPU, the interpreter is off"),
    ),
    pytest.param("cuda", "torch", id="torch-gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="triton-gpu", marks=pytest.mark.gpu),
]

TOKENS = (1, 2, 30, 31, 32, 33, 196, 201, 577)
WIDTHS = (1, 3, 64, 257, 768)
BATCHES = (1, 3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: The interpreter is slow: there every width meets each long N once, with batch and dtype in turn,
#: but for the longest with the widest.
LONG = [
    (BATCHES[(i + j) % 2] if d <= 64 else 1, n, d, DTYPES[(i + j) % 3])
    for i, n in enumerate((196, 201, 577))
    for j, d in enumerate(WIDTHS)
    if n * d < 577 * 300
]


def grid(run_id: str) -> list[tuple[int, int, int, torch.dtype]]:
    """(B, N, D, dtype): all of them, in the interpreter all short ones and some long."""
    full = list(product(BATCHES, TOKENS, WIDTHS, DTYPES))
    if run_id != "interpreter":
        return full + [
            (b, n, d, torch.float64) for b, n, d in product(BATCHES, (2, 33, 201), WIDTHS)
        ]
    return [case for case in full if case[1] <= 33] + LONG


def runs_and_shapes(least_tokens: int = 1) -> list:
    """Parameters (device, backend, B, N, D, dtype)."""
    params = []
    for run in RUNS:
        for b, n, d, dtype in grid(run.id):
            if n < least_tokens or (run.values[1] == "triton" and dtype == torch.float64):
                continue
            if n == 1 and b > 1:  # refused, see test_validation
                continue
            name = f"{run.id}-B{b}-N{n}-D{d}-{str(dtype).removeprefix('torch.')}"
            params.append(pytest.param(*run.values, b, n, d, dtype, id=name, marks=run.marks))
    return params


def clusters(b: int, n: int, d: int, centers: int = 5) -> Tensor:
    """Tokens around a few points, some far away, as the regions of an image and its outliers."""
    center = 4 * torch.randn(b, centers, d)
    tokens = center[:, torch.randint(centers, (n,))] + torch.randn(b, n, d)
    tokens[:, :: max(2, n // 9)] += 6 * torch.randn(b, 1, d)
    return tokens


def massive_channels(b: int, n: int, d: int) -> Tensor:
    """A few channels a hundred times the others and nearly constant, as ViT features have."""
    tokens = torch.randn(b, n, d)
    tokens[..., : min(3, d)] += 200 * (1 + 0.01 * torch.randn(b, n, min(3, d)))
    return tokens


FEATURES = {
    "random": torch.randn,
    "clusters": clusters,
    "massive_channels": massive_channels,
}

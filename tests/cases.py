"""Parameters that the tests of several ops share: devices, backends, shapes, kinds of features."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

#: (device, backend) of the implementations that are compared with the reference.
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
DOUBLES = (2, 33, 201)  # tokens in float64
WIDTHS = (1, 3, 64, 257, 768)
BATCHES = (1, 3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def in_turn(tokens: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list:
    """(B, N, D, dtype) of every N with every D, so that all pairs of values of two of them occur.

    A launcher or a tile depends on one of the four or on two: the dtype and a width, or the number
    of tokens and one of these. A batch of single tokens is refused, see test_validation.
    """
    return [
        (BATCHES[(i + (i + j) // 3) % 2] if n > 1 else 1, n, d, dtypes[(i + j) % len(dtypes)])
        for i, n in enumerate(tokens)
        for j, d in enumerate(WIDTHS)
    ]


def grid(run_id: str) -> list[tuple[int, int, int, torch.dtype]]:
    """(B, N, D, dtype): all combinations on a GPU, else all pairs; the interpreter skips some."""
    pairs = in_turn(TOKENS, DTYPES)
    if run_id == "interpreter":
        kept = [case for case in pairs if case[1] * case[2] < 577 * 100]
        alone = [n == 577 or (n > 33 and d > 64) for _, n, d, _ in kept]
        return [(1 if one else b, *case) for (b, *case), one in zip(kept, alone, strict=True)]
    if run_id == "torch":
        return pairs + in_turn(DOUBLES, (torch.float64,))
    full = list(product(BATCHES, TOKENS, WIDTHS, DTYPES))
    full += product(BATCHES, DOUBLES, WIDTHS, (torch.float64,))
    return [case for case in full if case[:2] != (3, 1)]


def runs_and_shapes(least_tokens: int = 1, interpreted=lambda b, n, d: True) -> list:
    """Parameters (device, backend, B, N, D, dtype). The interpreter runs those of `interpreted`."""
    params = []
    for run in RUNS:
        for b, n, d, dtype in grid(run.id):
            if n < least_tokens or (run.values[1] == "triton" and dtype == torch.float64):
                continue
            if run.id == "interpreter" and not interpreted(b, n, d):
                continue
            name = f"{run.id}-B{b}-N{n}-D{d}-{str(dtype).removeprefix('torch.')}"
            params.append(pytest.param(*run.values, b, n, d, dtype, id=name, marks=run.marks))
    return params


def runs_with(first: Iterable, second: Iterable) -> list:
    """Parameters (device, backend, a, b): all pairs. In the interpreter, a and b take turns."""
    first, second = list(first), list(second)
    return [
        pytest.param(*run.values, a, b, id=f"{run.id}-{a}-{b}", marks=run.marks)
        for run in RUNS
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
        if run.id != "interpreter" or i % len(second) == j % len(first)
    ]


def clusters(b: int, n: int, d: int, centers: int = 5) -> Tensor:
    """Tokens around a few points, as the regions of an image, and some far from these."""
    center = 4 * torch.randn(b, centers, d)
    tokens = center[:, torch.randint(centers, (n,))] + torch.randn(b, n, d)
    tokens[:, :: max(2, n // 9)] += 6 * torch.randn(b, 1, d)
    return tokens


def massive_channels(b: int, n: int, d: int) -> Tensor:
    """Tokens with a few nearly constant channels a hundred times the others, as ViTs have them."""
    tokens = torch.randn(b, n, d)
    tokens[..., : min(3, d)] += 200 * (1 + 0.01 * torch.randn(b, n, min(3, d)))
    return tokens


FEATURES = {
    "random": torch.randn,
    "clusters": clusters,
    "massive_channels": massive_channels,
}

"""The torch path never makes an N x N tensor, and its memory stays within its workspace.

`python tests/test_memory.py` measures the memory, in a process of its own.
"""

import json
import sys

import pytest
import torch
from measure import measure
from own_process import output_of

import scclip_fast as sf
from scclip_fast.chunked import tiles

MIB = 2**20
N = 6000  # N x N float32 is 137 MiB
WORKSPACE = 16 * MIB


def forward(n, d):
    x = torch.randn(1, n, d)
    tied = torch.randint(4, (1, n, 3)).float()
    q = torch.randn(1, 4, n, 8)
    maps = torch.randn(100, 24, 24)  # 69 MiB at 600 x 300 pixels
    return {
        "lof_scores-ties": lambda: sf.lof_scores(tied),  # all three passes of the search
        "knn-400": lambda: sf.knn(x, min(400, n - 1)),
        "lof_scores": lambda: sf.lof_scores(x),
        "lof_scores-breunig": lambda: sf.lof_scores(x, variant="breunig"),
        "knn": lambda: sf.knn(x, 30),
        "knn-queries": lambda: sf.knn(x, 30, x + 1),
        "knn-cosine": lambda: sf.knn(x, 30, x + 1, "cosine"),
        "knn-inner_product": lambda: sf.knn(x, 30, x + 1, "inner_product"),
        "aggregate": lambda: sf.aggregate(x, x),
        "content_attention": lambda: sf.content_attention(x, x, 3.0, ("mean", 1.2)),
        "blended_attention": lambda: sf.blended_attention(q, q, q, x),
        "upsampled_labels": lambda: sf.upsampled_labels(maps, (n // 10, 300)),
    }


def lists(name, n):
    """The bytes of n k distances and indices, where k is so large that they count."""
    return 12 * n * 400 if name == "knn-400" else 0


def backward(n, d):
    x = torch.randn(1, n, d, requires_grad=True)
    q = x.unsqueeze(1)
    return {
        "aggregate-backward": lambda: torch.autograd.grad(sf.aggregate(x, x).sum(), x),
        "blended_attention-backward": lambda: torch.autograd.grad(
            sf.blended_attention(q, q, q, x).sum(), x
        ),
    }


def peaks():
    """Yields each call's name and its peak in bytes, or None if the system has no such number."""
    tiles.WORKSPACE_BYTES = WORKSPACE
    for name, call in (forward(N, 16) | backward(N, 16)).items():
        call()
        yield name, measure(call).peak_bytes


@pytest.fixture(scope="module")
def measured():
    return output_of(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*forward(2, 1), *backward(2, 1)])
def test_peak_memory(name, measured):
    if measured[name] is None:
        pytest.skip("this system does not report the peak of a process's memory")
    # The memory of the matrix library comes on top.
    limit = WORKSPACE + lists(name, N) + 8 * MIB
    assert measured[name] < limit, f"{measured[name] / MIB:.1f} MiB"


def test_measure_sees_memory():
    held = measure(lambda: torch.ones(64 * MIB // 4))
    if held.peak_bytes is None:
        pytest.skip("this system does not report the peak of a process's memory")
    assert 60 * MIB < held.peak_bytes < 80 * MIB and held.seconds > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", forward(2, 1))
def test_peak_memory_on_the_gpu(name, backend):
    with torch.device("cuda"), sf.backend(backend):
        n = 20_000  # N x N float32 is 1.5 GiB
        call = forward(n, 64)[name]
        call()
        assert measure(call, "cuda").peak_bytes < 128 * MIB + lists(name, n)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(peaks())))

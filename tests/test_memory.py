"""The torch path never makes an N x N tensor, and holds to its workspace."""

import ctypes

import pytest
import torch

import scclip_fast as sf
from scclip_fast import chunked
from scclip_fast.measure import measure

MIB = 2**20
M_MMAP_THRESHOLD = -3
N = 6000  # N x N float32 is 137 MiB


@pytest.fixture(scope="module", autouse=True)
def returned_memory():
    """What is freed goes back to the system, so that the resident set is what tensors hold."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)


def calls(n, d):
    x = torch.randn(1, n, d)
    q = torch.randn(1, 4, n, 8)
    return {
        "lof_scores": lambda: sf.lof_scores(x),
        "lof_scores-breunig": lambda: sf.lof_scores(x, variant="breunig"),
        "knn": lambda: sf.knn(x, 30),
        "aggregate": lambda: sf.aggregate(x, x),
        "blended_attention": lambda: sf.blended_attention(q, q, q, x),
    }


@pytest.mark.parametrize("name", calls(2, 1))
def test_peak_memory(name, monkeypatch):
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 16 * MIB)
    call = calls(N, 16)[name]
    call()
    peak = min(measure(call).peak_bytes for _ in range(3))
    if peak is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    # Results, norms and running lists are O(N k), 1.4 MiB a float32 of 60 each, and the matrix
    # library has scratch.
    assert peak < 32 * MIB, f"{peak / MIB:.0f} MiB"


@pytest.mark.parametrize("name", ["aggregate", "blended_attention"])
def test_peak_memory_of_the_backward_pass(name, monkeypatch):
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 16 * MIB)
    x = torch.randn(1, N, 16, requires_grad=True)

    def call():
        if name == "aggregate":
            return torch.autograd.grad(sf.aggregate(x, x).sum(), x)
        q = x.unsqueeze(1)
        return torch.autograd.grad(sf.blended_attention(q, q, q, x).sum(), x)

    call()
    peak = min(measure(call).peak_bytes or 0 for _ in range(3))
    assert peak < 48 * MIB, f"{peak / MIB:.0f} MiB"


def test_measure_sees_memory():
    held = measure(lambda: torch.ones(64 * MIB // 4))
    if held.peak_bytes is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert 60 * MIB < held.peak_bytes < 80 * MIB and held.seconds > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", calls(2, 1))
def test_peak_memory_on_the_gpu(name, backend):
    with torch.device("cuda"), sf.backend(backend):
        call = calls(20_000, 64)[name]  # N x N float32 is 1.5 GiB
        call()
        assert measure(call, "cuda").peak_bytes < 128 * MIB

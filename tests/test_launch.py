"""What launches ask of a GPU, without one."""

from types import SimpleNamespace

import pytest
import torch

from scclip_fast.kernels import _launch

L4 = dict(major=8, minor=9, shared_memory_per_block_optin=101376, multi_processor_count=58)


@pytest.fixture
def gpu(monkeypatch):
    """A device with the properties of an L4."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**L4))
    _launch.architecture.cache_clear()
    _launch.multiprocessors.cache_clear()
    yield torch.device("cuda:0")
    _launch.architecture.cache_clear()
    _launch.multiprocessors.cache_clear()


def test_nvidia(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    found = _launch.architecture(gpu)
    assert found == _launch.Architecture(89, 99 * 1024)
    assert not found.hopper and found.dot_precision == "tf32x3"
    assert _launch.multiprocessors(gpu) == 58


def test_amd(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delitem(L4, "shared_memory_per_block_optin")
    monkeypatch.setitem(L4, "shared_memory_per_block", 65536)
    found = _launch.architecture(gpu)
    assert found == _launch.Architecture(0, 64 * 1024)
    assert not found.hopper and found.dot_precision == "ieee"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_gpu(device):
    device = torch.device(device)
    assert _launch.architecture(device) == _launch.ELSEWHERE
    assert _launch.multiprocessors(device) == 132


@pytest.mark.parametrize(
    "capability, warps, stages", [(90, 4, 4), (80, 8, 2), (86, 8, 2), (100, 8, 2), (0, 8, 1)]
)
def test_options(capability, warps, stages):
    """Hopper's are what was measured; others have two stages and eight warps, AMD one stage."""
    launch = _launch.Launch(None, 1, {}, {}, dict(num_warps=4, num_stages=4))
    gpu = _launch.Architecture(capability, 64 * 1024)
    assert launch.compile_options(gpu) == dict(num_warps=warps, num_stages=stages)

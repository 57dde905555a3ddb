"""The properties of a GPU that launches depend on, tested without a GPU."""

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
    yield torch.device("cuda:0")
    _launch.architecture.cache_clear()


def test_nvidia(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    architecture = _launch.architecture(gpu)
    assert architecture == _launch.Architecture(89, 99 * 1024, 58)
    assert architecture.options is _launch.NVIDIA
    assert architecture.options.float32_products == "tf32x3"


def test_amd(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.delitem(L4, "shared_memory_per_block_optin")
    monkeypatch.setitem(L4, "shared_memory_per_block", 65536)
    architecture = _launch.architecture(gpu)
    assert architecture == _launch.Architecture(0, 64 * 1024, 58)
    assert architecture.options is _launch.AMD
    assert architecture.options.float32_products == "ieee"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_gpu(device):
    device = torch.device(device)
    assert _launch.architecture(device) == _launch.WITHOUT_GPU
    assert _launch.architecture(device).multiprocessors == 132


@pytest.mark.parametrize(
    "capability, warps, stages", [(90, 4, 4), (80, 8, 2), (86, 8, 2), (100, 8, 2), (0, 8, 1)]
)
def test_options(capability, warps, stages):
    """Hopper takes the options as given, others two stages and eight warps, and AMD one stage."""
    launch = _launch.Launch(None, 1, num_warps=4, num_stages=4)
    gpu = _launch.Architecture(capability, 64 * 1024)
    assert launch.compile_options(gpu) == dict(num_warps=warps, num_stages=stages)

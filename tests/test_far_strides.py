"""Offsets beyond 2^31 elements: tokens that lie 2^25 elements apart, in memory that is not touched.

`k_ptrs += BLOCK_N * stride_kn` in 32 bits, as `attention` had it, fails here.
"""

import pytest
import torch
from cases import RUNS

from scclip_fast.kernels import aggregate
from scclip_fast.kernels.attention import attention_triton
from scclip_fast.kernels.repair import repair_triton
from scclip_fast.kernels.upsample import upsampled_labels_triton

pytestmark = pytest.mark.parametrize(
    "device",
    [pytest.param(r.values[0], id=r.id, marks=r.marks) for r in RUNS if r.values[1] == "triton"],
)
TOKENS = 70  # of which a step of 64 tokens moves a pointer by 2^31 elements


def far_and_near(device):
    """Tokens (1, TOKENS, 16) in 4.4 GiB of address space, and a dense copy."""
    memory = torch.empty(TOKENS * 2**25, dtype=torch.float16, device=device)
    far = memory.as_strided((1, TOKENS, 16), (0, 2**25, 1))
    return far, far.copy_(torch.randn(1, TOKENS, 16).abs()).clone()


def test_attention(device):
    def call(x):
        x = x[:, None]
        return attention_triton(x, x, x, x, 0.5, 0.25)

    far, near = far_and_near(device)
    assert torch.equal(call(far), call(near))


@pytest.mark.parametrize("workspace", [2**26, 2**12], ids=["panels", "stream"])
def test_aggregate(device, workspace, monkeypatch):
    monkeypatch.setattr(aggregate, "WORKSPACE_BYTES", workspace)

    def call(x):
        floor = torch.full((1,), 0.4, device=device)
        return aggregate.aggregate_triton(x, x, floor, None, 1e-6)[0]

    far, near = far_and_near(device)
    assert torch.equal(call(far), call(near))


def test_repair(device):
    mask = torch.zeros(1, TOKENS, dtype=torch.bool, device=device)
    mask[:, 5::9] = True
    far, near = far_and_near(device)
    assert torch.equal(repair_triton(far, mask, (7, 10)), repair_triton(near, mask, (7, 10)))


@pytest.mark.parametrize(
    "far_dim", [pytest.param(1, marks=pytest.mark.slow), 2, 3], ids=["classes", "rows", "columns"]
)
def test_upsampled_labels(device, far_dim):
    far, near = (x.unflatten(2, (4, 4)).movedim(1, far_dim) for x in far_and_near(device))
    found, expected = (upsampled_labels_triton(x, (90, 90), torch.uint8) for x in (far, near))
    assert all(map(torch.equal, found, expected))

import pytest
import torch
from tolerance import assert_close
from torch.autograd import gradcheck

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.ops.repair import _pooled


@pytest.fixture(params=["listed", "pooled"], autouse=True)
def rule(request, monkeypatch):
    """Both ways to the same answer; by itself the op takes the first on the CPU."""
    if request.param == "pooled":
        monkeypatch.setattr(reference, "repair", _pooled)


def published_repair(tokens, mask, height, width):
    """Token by token, as SC-CLIP says it: the mean of the 8 neighbours that are no outliers."""
    out = tokens.clone()
    for image in range(tokens.shape[0]):
        for i in mask[image].nonzero().flatten().tolist():
            row, column = divmod(i, width)
            around = [(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
            good = [
                r * width + c
                for r, c in around
                if 0 <= r < height and 0 <= c < width and not mask[image, r * width + c]
            ]
            if good:
                out[image, i] = tokens[image, good].mean(dim=0)
    return out


@pytest.mark.parametrize(
    "grid", [(1, 1), (1, 9), (9, 1), (2, 2), (14, 14), (7, 12), (24, 3)], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_equals_the_published_rule(grid, share, dtype):
    height, width = grid
    tokens = torch.randn(3, height * width, 5).to(dtype)
    mask = torch.rand(3, height * width) < share
    out = sf.repair(tokens, mask, grid)
    assert out.dtype == dtype
    assert_close(out, ref=published_repair(tokens.double(), mask, height, width))
    assert torch.equal(out[~mask], tokens[~mask])
    assert torch.equal(sf.repair(tokens[1], mask[1], grid), out[1])


@pytest.mark.gpu
def test_gpu():
    tokens, mask = torch.randn(2, 84, 16), torch.rand(2, 84) < 0.3
    out = sf.repair(tokens.cuda(), mask.cuda(), (7, 12))
    assert_close(out, ref=published_repair(tokens.double(), mask, 7, 12))


def test_a_broken_outlier_does_not_spread():
    tokens, mask = torch.randn(1, 12, 3), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 5] = mask[0, 6] = True
    expected = sf.repair(tokens, mask, (3, 4))
    tokens[0, 5], tokens[0, 6] = torch.nan, torch.inf
    assert torch.equal(sf.repair(tokens, mask, (3, 4)), expected)


def test_large_values_do_not_overflow():
    """Eight neighbours near the end of float16 sum beyond it."""
    tokens = torch.full((1, 9, 2), 60000.0, dtype=torch.float16)
    mask = (torch.arange(9) == 4)[None]
    assert torch.equal(sf.repair(tokens, mask, (3, 3)), tokens)


def test_strided_empty_and_unchanged():
    tokens = torch.randn(5, 3, 12).transpose(1, 2)
    mask = torch.rand(5, 12) < 0.3
    before = tokens.clone()
    out = sf.repair(tokens, mask, (3, 4))
    assert torch.equal(tokens, before)
    assert torch.equal(out, sf.repair(tokens.contiguous(), mask, (3, 4)))
    assert sf.repair(tokens[:0], mask[:0], (3, 4)).shape == (0, 12, 3)


def test_gradcheck():
    tokens = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 12) < 0.4
    assert gradcheck(lambda t: sf.repair(t, mask, (3, 4)), (tokens,))


def test_rows_of_tokens_in_memory():
    """Whichever rule runs: what channels come first in is slow to read."""
    from scclip_fast.ops.repair import _pooled

    tokens, mask = torch.randn(2, 48, 5), torch.rand(2, 48) < 0.2
    for out in (_pooled(tokens, mask, (6, 8)), sf.repair(tokens, mask, (6, 8))):
        assert out.is_contiguous()
        assert torch.allclose(out, sf.repair(tokens, mask, (6, 8)), atol=1e-6)

from functools import partial

import pytest
import torch
from cases import DTYPES, RUNS
from tolerance import assert_close
from torch.autograd import gradcheck

import scclip_fast as sf
from scclip_fast import reference
from scclip_fast.chunked.repair import pooled
from scclip_fast.reference import repair as listed

POOLED = pytest.param(("cpu", pooled), id="pooled")


@pytest.fixture(
    params=[*(pytest.param(run.values, id=run.id, marks=run.marks) for run in RUNS), POOLED]
)
def run(request, monkeypatch):
    """(device, backend). "pooled" runs on a CPU the form of the torch path that GPUs run."""
    device, backend = request.param
    if backend is pooled:
        monkeypatch.setattr(reference, "repair", pooled)
        backend = "torch"
    return device, backend


def published_repair(tokens, mask, height, width):
    """SC-CLIP's rule token by token: the mean of the 8 neighbours that are no outliers."""
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


def check(tokens, mask, grid, **options):
    """Asserts a contiguous result equal to the published rule, also for an image alone.

    Tokens that are no outliers keep their bits.
    """
    out = sf.repair(tokens, mask, grid, **options)
    assert out.dtype == tokens.dtype and out.device == tokens.device and out.is_contiguous()
    assert_close(out, ref=published_repair(tokens.double().cpu(), mask.cpu(), *grid))
    assert torch.equal(out[~mask], tokens[~mask])
    assert torch.equal(sf.repair(tokens[1], mask[1], grid, **options), out[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 2), (7, 12), (24, 3)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_equals_the_published_rule(run, grid, share, dtype):
    device, backend = run
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    n = grid[0] * grid[1]
    tokens = torch.randn(2, n, 5, device=device).to(dtype)
    check(tokens, torch.rand(2, n, device=device) < share, grid, backend=backend)


@pytest.mark.parametrize("d", [1, 17, 64, 1100])  # the last needs two blocks a token
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(run, d, dtype):
    """The kernel sums in the reference's order and rounds as often: the bits are the same."""
    device, backend = run
    tokens = torch.randn(2, 15, d, device=device).to(dtype)
    mask = torch.rand(2, 15, device=device) < 0.5
    check(tokens, mask, (3, 5), backend=backend)
    if backend == "triton":
        expected = listed(tokens.float(), mask, (3, 5)).to(dtype)
        assert torch.equal(sf.repair(tokens, mask, (3, 5), backend=backend), expected)


def test_sums_of_integers_are_exact(run):
    """Sums of integers are exact in any order, so that all backends have the reference's bits."""
    device, backend = run
    tokens = torch.randint(-99, 99, (2, 84, 5), device=device).float()
    mask = torch.rand(2, 84, device=device) < 0.5
    out = sf.repair(tokens, mask, (7, 12), backend=backend)
    assert torch.equal(out, listed(tokens, mask, (7, 12)))


@pytest.mark.parametrize("d", [5, 70])
def test_views(run, d):
    """Tokens with channels first, an offset, gaps between rows or one row, and such masks."""
    device, backend = run
    n, flags = 15, torch.rand(2, 40, device=device) < 0.4
    views = (
        torch.randn(2, d, n, device=device).mT,
        torch.randn(2, 2 * n + 1, d + 3, device=device)[:, 1::2, 3:],
        torch.randn(n, 2, 2 * d, device=device).transpose(0, 1)[..., ::2],
        torch.randn(1, 1, d, device=device).expand(2, n, d),
    )
    masks = flags[:, 1 : n + 1], flags[:, 1 : 2 * n : 2], flags[:1, :n].expand(2, n)
    for tokens in views:
        before = tokens.clone()
        for mask in masks:
            check(tokens, mask, (3, 5), backend=backend)
        assert torch.equal(tokens, before)


def test_a_broken_outlier_does_not_spread(run):
    device, backend = run
    tokens = torch.randn(1, 12, 3, device=device)
    mask = torch.zeros(1, 12, dtype=torch.bool, device=device)
    mask[0, 5] = mask[0, 6] = True
    expected = sf.repair(tokens, mask, (3, 4), backend=backend)
    tokens[0, 5], tokens[0, 6] = torch.nan, torch.inf
    assert torch.equal(sf.repair(tokens, mask, (3, 4), backend=backend), expected)


def test_broken_tokens_that_are_no_outliers(run):
    """A token that is not finite and no outlier stays, and a mean that it enters is not finite."""
    device, backend = run
    tokens = torch.randn(1, 12, 3, device=device)
    tokens[0, 3, 1], tokens[0, 11, 2] = torch.nan, -torch.inf
    mask = torch.zeros(1, 12, dtype=torch.bool, device=device)
    mask[0, [2, 5, 6]] = True
    out = sf.repair(tokens, mask, (3, 4), backend=backend)
    assert_close(
        out.nan_to_num(neginf=7.0, nan=torch.nan),
        ref=listed(tokens.double(), mask, (3, 4)).nan_to_num(neginf=7.0, nan=torch.nan),
    )
    assert out[0, [2, 3, 6], 1].isnan().all() and out.isnan().sum() == 3
    assert out[0, 6, 2] == -torch.inf
    alone = sf.repair(tokens[:, 3:4], mask[:, 2:3], (1, 1), backend=backend)
    assert torch.equal(alone.isnan(), tokens[:, 3:4].isnan())


def test_large_values_do_not_overflow(run):
    """The sum of eight neighbours near the largest float16 exceeds it."""
    device, backend = run
    tokens = torch.full((1, 9, 2), 60000.0, dtype=torch.float16, device=device)
    mask = (torch.arange(9, device=device) == 4)[None]
    assert torch.equal(sf.repair(tokens, mask, (3, 3), backend=backend), tokens)


def test_empty_batch(run):
    device, backend = run
    tokens, mask = torch.randn(0, 12, 3, device=device), torch.zeros(0, 12, device=device) > 0
    assert sf.repair(tokens, mask, (3, 4), backend=backend).shape == (0, 12, 3)


def test_gradcheck(run):
    device, backend = run
    if backend == "triton":
        pytest.skip("the kernels take no float64")
    tokens = torch.randn(2, 6, 2, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.rand(2, 6, device=device) < 0.5
    assert gradcheck(lambda t: sf.repair(t, mask, (2, 3), backend=backend), (tokens,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(1, 9), (7, 12)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_gradient(run, grid, share, dtype):
    """The gradient is the reference's, and NaN upstream reaches the same tokens."""
    device, backend = run
    n = grid[0] * grid[1]
    tokens = torch.randn(2, n, 5, device=device).to(dtype).requires_grad_()
    mask = torch.rand(2, n, device=device) < share
    upstream = torch.randn(2, n, 5, device=device).to(dtype)
    upstream[0, 4, 2] = torch.nan
    found = torch.autograd.grad(sf.repair(tokens, mask, grid, backend=backend), tokens, upstream)
    exact = tokens.detach().double().requires_grad_()
    out = listed(exact, mask, grid)
    (expected,) = torch.autograd.grad(out, exact, upstream.nan_to_num(0).double())
    broken = upstream.isnan().double()
    (reached,) = torch.autograd.grad(listed(exact, mask, grid), exact, broken)
    assert_close(found[0], ref=expected.masked_fill(reached > 0, torch.nan))


def test_batched_gradients():
    """The backward pass under vmap, as `vectorize=True` and `is_grads_batched` run it."""
    tokens, mask = torch.randn(12, 2, dtype=torch.float64), torch.arange(12) % 5 == 0
    jacobian = partial(torch.autograd.functional.jacobian, lambda t: sf.repair(t, mask, (3, 4)))
    assert torch.equal(jacobian(tokens, vectorize=True), jacobian(tokens))

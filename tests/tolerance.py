"""How far an implementation may be from float64, in one place."""

from __future__ import annotations

import torch
from torch import Tensor

from scclip_fast import reference

#: ||out - ref|| / ||ref||, by the dtype of the output. The short types round once at the end (2^-11
#: and 2^-8), and their kernels once more where the weights enter the second product.
RELATIVE_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

#: Two squared distances tie when they differ by less than this share of themselves: what float32
#: rounds away in a sum of up to a few thousand squared differences.
TIE = 4e-6


def relative_error(out: Tensor, ref: Tensor) -> float:
    error = torch.linalg.vector_norm(out.double().cpu() - ref.double().cpu())
    return (error / torch.linalg.vector_norm(ref.double().cpu()).clamp(min=1e-30)).item()


def assert_close(out: Tensor, *, ref: Tensor, factor: float = 1) -> None:
    """`out` is within `factor` times the tolerance of its dtype of `ref`; NaN where it has NaN."""
    assert out.shape == ref.shape, f"{tuple(out.shape)} instead of {tuple(ref.shape)}"
    out, nan = out.detach(), ref.isnan()
    assert torch.equal(out.isnan().cpu(), nan.cpu()), "NaN in other places"
    limit = factor * RELATIVE_ERROR[out.dtype]
    found = relative_error(out.cpu()[~nan.cpu()], ref.cpu()[~nan.cpu()])
    assert found <= limit, f"relative error {found:.2e}, allowed {limit:.1e}"


def assert_neighbors(indices: Tensor, *, x: Tensor, k: int) -> None:
    """The sets are float64's, but for pairs that tie within float32 rounding."""
    x = x.detach().double().cpu()
    indices = indices.cpu()
    batch, n, _ = x.shape
    assert indices.shape == (batch, n, k) and indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < n)).all(), "an index out of range"
    assert (indices != torch.arange(n)[:, None]).all(), "a token among its own neighbours"
    assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a neighbour twice"
    d2 = reference.squared_distances(x)
    true, _ = reference.knn(x, k)
    # In a set of k, every member beyond the true k-th distance stands for one that was missed.
    found, limit = d2.gather(-1, indices), true[..., -1:] * (1 + TIE)
    near = (found <= limit) | limit.isnan()
    assert near.all(), f"{(~near).any(dim=-1).sum()} rows have a neighbour that is too far"


def assert_nearest(
    indices: Tensor, *, x: Tensor, k: int, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """The sets are float64's, but for ties of the distance itself within its float32 rounding.

    indices are (M, k), of the given rows of x (N, D). Returns which of the rows (M,) have the same
    set, and float64's squared distances (M, N).
    """
    x, indices = x.detach().double().cpu(), indices.cpu()
    d2 = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist").square()
    own = torch.arange(len(x))[rows, None]
    true = d2.scatter(1, own, torch.inf).sort(dim=1, stable=True)
    assert (indices != own).all(), "a token among its own neighbours"
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), "a neighbour twice"
    beyond = d2.gather(1, indices) / true.values[:, k - 1 : k].clamp(min=1e-300)
    assert (beyond <= 1 + 1e-5).all(), f"a neighbour {beyond.max().item():.6f} times too far"
    same = indices.sort(dim=1).values == true.indices[:, :k].sort(dim=1).values
    return same.all(dim=1), d2


def decided(indices: Tensor, *, x: Tensor) -> Tensor:
    """(B, N) tokens whose LOF no tie can move: theirs and their neighbours' sets are float64's.

    Where two candidates for the last place tie, either is right, and the score that follows
    differs.
    """
    expected = reference.knn(x.detach().double().cpu(), indices.shape[-1])[1]
    found = indices.cpu()
    same = (found.sort(dim=-1).values == expected.sort(dim=-1).values).all(dim=-1)
    return same & same.gather(-1, found.flatten(1)).view_as(found).all(dim=-1)

"""The errors against float64 that tests allow, in one place."""

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

#: Two squared distances tie when they differ by less than this share of themselves, which float32
#: rounds away in a sum of up to a few thousand squared differences.
TIE = 4e-6


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, in float64."""
    error = torch.linalg.vector_norm(out.double().cpu() - ref.double().cpu())
    return (error / torch.linalg.vector_norm(ref.double().cpu()).clamp(min=1e-30)).item()


def assert_close(out: Tensor, *, ref: Tensor, factor: float = 1) -> None:
    """Asserts a relative error of at most `factor` times the one that the dtype of `out` allows.

    `out` must have NaN exactly where `ref` has.
    """
    assert out.shape == ref.shape, f"{tuple(out.shape)} instead of {tuple(ref.shape)}"
    out, nan = out.detach(), ref.isnan()
    assert torch.equal(out.isnan().cpu(), nan.cpu()), "NaN in other places"
    allowed = factor * RELATIVE_ERROR[out.dtype]
    error = relative_error(out.cpu()[~nan.cpu()], ref.cpu()[~nan.cpu()])
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.1e}"


def assert_neighbors(
    indices: Tensor, *, x: Tensor, k: int, rows: slice = slice(None), tie: float = TIE
) -> tuple[Tensor, Tensor]:
    """Asserts that the neighbours are k others of each row, and float64's but for ties.

    Args:
        indices: (M, k) or (B, M, k), the neighbours of the given rows of
        x: (N, D) or (B, N, D).
        tie: squared distances that differ by a smaller share of themselves tie.

    Returns:
        The mask (..., M) of the rows whose set is float64's, and the squared distances of float64,
        (..., M, N).
    """
    x, indices = x.detach().double().cpu(), indices.cpu()
    n = x.shape[-2]
    itself = torch.arange(n)[rows, None]
    assert indices.shape == (*x.shape[:-2], len(itself), k) and indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < n)).all(), "an index out of range"
    assert (indices != itself).all(), "a token among its own neighbours"
    assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a neighbour twice"
    d2 = torch.cdist(x[..., rows, :], x, compute_mode="donot_use_mm_for_euclid_dist").square()
    finite = x.isfinite().all(dim=-1)
    d2 = torch.where(finite[..., rows, None] & finite[..., None, :], d2, torch.nan)
    # NaN sorts last: the row itself, and tokens that are not finite.
    nearest = d2.masked_fill(itself == torch.arange(n), torch.nan).sort(dim=-1, stable=True)
    # In a set of k, every member beyond the true k-th distance stands for one that was missed.
    farthest = nearest.values[..., k - 1 : k] * (1 + tie)
    near = (d2.gather(-1, indices) <= farthest) | farthest.isnan()
    assert near.all(), f"{(~near).any(dim=-1).sum()} rows have a neighbour that is too far"
    same = indices.sort(dim=-1).values == nearest.indices[..., :k].sort(dim=-1).values
    return same.all(dim=-1), d2


def decided(indices: Tensor, *, x: Tensor) -> Tensor:
    """Mask (B, N) of the tokens whose LOF no tie can change.

    Their neighbours and the neighbours of these are float64's. Where two candidates for the last
    place tie, either is right, and the scores that follow from them differ.
    """
    expected = reference.knn(x.detach().double().cpu(), indices.shape[-1])[1]
    indices = indices.cpu()
    same = (indices.sort(dim=-1).values == expected.sort(dim=-1).values).all(dim=-1)
    return same & same.gather(-1, indices.flatten(1)).view_as(indices).all(dim=-1)


def assert_nearest(found, x, k, queries=None, metric="euclidean"):
    """Asserts that the values are float64's, in order, and those of the tokens at the indices."""
    values, indices = (t.cpu() for t in found)
    x, queries = (None if t is None else t.detach().double().cpu() for t in (x, queries))
    rows = x if queries is None else queries
    assert indices.dtype == torch.int64 and indices.shape == (*rows.shape[:-1], k)
    batch = [t if t.dim() == 3 else t[None] for t in (x, rows)]
    distances = reference.DISTANCES[metric](*batch).view(*rows.shape[:-1], x.shape[-2])
    expected, _ = reference.knn(batch[0], k, None if queries is None else batch[1], metric)
    sign = -1 if metric == "inner_product" else 1
    at_indices = sign * distances.gather(-1, indices)
    scale = 1.0
    if metric == "inner_product":  # sums in float64, whose rounding is that of their terms
        norms = (torch.linalg.vector_norm(t, dim=-1) for t in (rows, x))
        scale = next(norms)[..., None] * next(norms).amax(dim=-1)[..., None, None]
    relative = TIE if metric == "euclidean" else 2.0**-23
    for right in (at_indices, expected.view_as(values)):
        error = (values.double() - right).abs()
        allowed = relative * right.abs() + (0 if metric == "euclidean" else 1e-14 * scale)
        assert (error <= allowed).all(), f"off by {(error - allowed).max():.1e}"
    assert (sign * values.diff(dim=-1) >= 0).all()
    assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all(), "a neighbour twice"
    if queries is None:
        assert (indices != torch.arange(x.shape[-2])[:, None]).all()

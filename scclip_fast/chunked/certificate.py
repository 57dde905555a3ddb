"""A bound on the rounding of a search by products, row by row.

A search (`search.py`, `symmetric.py`, `distributed/search.py`) ranks the tokens j of a row i by a
rounded value c_ij of the squared distance d^2 of y_i and y_j,

    ||y_i||^2 + ||y_j||^2 - 2 y_i y_j,        y = fl(x - m),

and measures the distances of the last few candidates. With a = ||y_i||, u half the unit of the
products' dtype, and ||y_j|| <= a + d:

    |c_ij - d^2| <= gamma (||y_i|| + ||y_j||)^2 <= gamma (2 a + d)^2,    gamma = n u / (1 - 8 n u)

where n = D + 16: D roundings in the sum of D products in any order, and 16 for x - m and the bounds
themselves. The denominator covers products of roundings. `UNDERFLOW`, which is added to 2 a, covers
what underflows.

Let r^2 be the measured squared distance of the k-th neighbour, whose own rounding is at most a
share rho of it, gamma with the u of the measured distances. With the margin

    M = gamma (2 a + r)^2 + 2 rho r^2

a row is decided if both of these hold:

- Complete: a token that would be measured to be as near as r has d^2 <= r^2 / (1 - rho), and so
  c <= r^2 + M. Every token that the search dropped has a larger c.
- Settled: a candidate that was not measured, because it ranks so far ahead, has c <= r^2 - M, and
  so d^2 (1 + rho) <= r^2. It would be measured to be as near as r.

A c of products in float64 may be rounded to float32 where distances are measured in float32: its
share 2^-24 is less than a 16th of rho, of which M holds twice as much as it needs.

The bounds hold for one huge token among small ones, as no row's bound depends on another token's
norm. Data that suit the dtype badly leave rows undecided, never wrong.

A search for inner products (`products.py`) has no triangle inequality, and needs none. With a =
||q||, the true score of a token is s_j = -q x_j / a, its rounded value is c_j, and its measured
value, a sum of float64 over a, is m_j:

    |c_j - s_j| <= gamma b_j,  |m_j - s_j| <= gamma b_j,      b_j = ||x_j|| + sqrt(D t)

The bound is the one above, for products of a unit row. sqrt(D t), with the smallest normal number t
of the products' dtype, covers what underflows in the norm and in the products. The search ranks
the tokens by l_j = c_j - 2 gamma b_j, so that every token has m_j >= l_j, and every token that the
search dropped has m_j >= l_n of the last of its n candidates. All n candidates are measured. A row
is decided if l_n > m_k, plus the rounding of m_k itself: two roundings of the quotient, and what
underflows in the sum, 2 D t' / a. This is tighter than gamma max_j b_j for all tokens, which one
huge token would spoil.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows searched so far in this process: "product" counts the rows of the first pass, "candidates"
#: those of it that a first look leaves undecided on a CPU (`symmetric.py`), "float64" and
#: "differences" the rows that the pass before left undecided.
counts: Counter[str] = Counter()


#: At least the root of what underflows in c and in a measured distance, divided by gamma: sums of D
#: numbers below the smallest normal one, 1.2e-38, over gamma >= D 2^-24.
UNDERFLOW = 1e-15


class Found(NamedTuple):
    """The result of one pass of a search."""

    distances: Tensor  # (..., k), or (..., 1) of the k-th neighbours
    indices: Tensor  # (..., k)
    undecided: Tensor  # (...) bool, rows whose neighbours may be others


def relative_bound(width: int, dtype: torch.dtype) -> float:
    """gamma of sums over `width` channels in a dtype; infinite where the bound is none."""
    rounding = (width + 16) * torch.finfo(dtype).eps / 2
    return rounding / (1 - 8 * rounding) if 8 * rounding < 1 else math.inf


def error_bound(norms: Tensor, distances: Tensor, width: int) -> Tensor:
    """gamma (2 a + d)^2 of rows with the norms a, in the dtype of the norms.

    A row whose own square overflows has the largest norm, whose square is finite. The bound of such
    a row is infinite.
    """
    reach = distances.add(norms, alpha=2).add_(UNDERFLOW)
    return reach.square_().mul_(relative_bound(width, norms.dtype))


def undecided(
    norms: Tensor,
    k_distance: Tensor,
    width: int,
    dropped: Tensor | None,
    unmeasured: Tensor | None,
) -> Tensor:
    """The rows (...) bool for which the conditions of this module do not hold.

    Args:
        norms: (...), a, in the dtype of the products.
        k_distance: (...), r^2.
        width: D.
        dropped: (...), the smallest c that a token without a place among the candidates may have;
            None if all tokens are candidates.
        unmeasured: (...), the largest c of the candidates that were not measured; None if all were.
    """
    r2 = k_distance.to(norms.dtype)
    margin = error_bound(norms, r2.sqrt(), width)
    margin.add_(r2, alpha=2 * relative_bound(width, k_distance.dtype))
    if unmeasured is None:
        if dropped is None:
            return ~(r2 < torch.inf)
        # Equal tokens tie at the distance 0, where no token can be nearer.
        return ~((dropped - r2 > margin) | (r2 == 0))
    gap = r2 - unmeasured.clamp(min=0)
    if dropped is not None:
        gap = torch.minimum(gap, dropped - r2)
    return ~(gap > margin)  # undecided where r2 is infinite or NaN


def undecided_lists(
    squares: Tensor, norms: Tensor, k_distance: Tensor, n_measured: int, width: int, complete: bool
) -> Tensor:
    """`undecided` for lists of candidates.

    Args:
        squares: (..., n), the n smallest c of each row, ascending.
        norms, k_distance, width: as for `undecided`.
        n_measured: number of these n candidates that were measured, the last ones.
        complete: True if the candidates are all tokens there are.
    """
    n_unmeasured = squares.shape[-1] - n_measured
    is_open = undecided(
        norms,
        k_distance,
        width,
        dropped=None if complete else squares[..., -1],
        unmeasured=squares[..., n_unmeasured - 1] if n_unmeasured > 0 else None,
    )
    # For a row at m, c is ||y_j||^2 without an error: candidates before one at 0 are at 0 too.
    return is_open & (norms + k_distance != 0)


def product_margin(norms: Tensor, width: int) -> Tensor:
    """2 gamma b of tokens with these norms, in the dtype of the products."""
    limits = torch.finfo(norms.dtype)
    return (norms + (width * limits.tiny) ** 0.5) * ((width + 16) * limits.eps)


def undecided_products(
    scores: Tensor, norms: Tensor, k_value: Tensor, width: int, complete: bool
) -> Tensor:
    """The rows (B, M) bool of a search for inner products that are not decided.

    Args:
        scores: (B, M, n), the n smallest l of each row, ascending.
        norms: (B, M), a in float64.
        k_value: (B, M), a m_k in float64.
        width: D.
        complete: True if the candidates are all tokens there are.
    """
    if complete:
        return torch.zeros_like(k_value, dtype=torch.bool)
    limits = torch.finfo(k_value.dtype)
    m = k_value / norms
    return ~(scores[..., -1] > m + 4 * limits.eps * m.abs() + 2 * width * limits.tiny / norms)

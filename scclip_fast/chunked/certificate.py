"""A bound on the rounding of a search by products, row by row.

A search (`search.py`, `distributed/search.py`) ranks the tokens j of a row i by a rounded value
c_ij of

    s_ij = ||y_j||^2 - 2 y_i y_j,        y = fl(x - m)

and measures the distances of the last few candidates. With a = ||y_i||, d the true distance of x_i
and x_j, u half the unit of the products' dtype, and ||y_j|| <= a + d:

    |c_ij - (d^2 - a^2)| <= gamma (||y_j||^2 + 2 a ||y_j||) <= g(d)
    g(d) = gamma ((a + d)^2 + 2 a (a + d)),    gamma = (D + 16) u

where D u bounds the sum of D products in any order, and 16 u the rounding of x - m and that of the
bounds themselves. Sums over pieces of the channels, products and norms alike, round fewer times
than D (`gram.roundings`).

Let r be the measured distance of the k-th neighbour, whose own rounding is at most a share rho =
(D + 16) u' of it, with the u' of the measured distances. A row is decided if both of these hold:

- Complete: a token that would be measured to be as near as r has d <= V = r (1 + rho), and so
  c <= V^2 - a^2 + g(V). Every token that the search dropped has a larger c.
- Settled: a candidate that was not measured, because it ranks so far ahead, has c <= tau, and so
  d^2 - g(d) <= tau + a^2. It would be measured to be as near as r.

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

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows searched so far in this process: "product" counts the rows of the first pass, "candidates"
#: those of it that a first look leaves undecided on a CPU (`symmetric.py`), "float64" and
#: "differences" the rows that the pass before left undecided.
counts: Counter[str] = Counter()


class Found(NamedTuple):
    """The result of one pass of a search."""

    distances: Tensor  # (..., k), or (..., 1) of the k-th neighbours
    indices: Tensor  # (..., k)
    undecided: Tensor  # (...) bool, rows whose neighbours may be others


def error_bound(norm: Tensor, distance: Tensor, roundings: int) -> Tensor:
    """g(d) of rows with the norms a, in the dtype of the products."""
    gamma = (roundings + 16) * torch.finfo(norm.dtype).eps / 2
    reach = norm + distance
    return reach.mul(gamma).mul_(reach.add_(norm, alpha=2))


def undecided(
    scores: Tensor,
    norms: Tensor,
    k_distance: Tensor,
    n_measured: int,
    width: int,
    complete: bool,
    roundings: int | None = None,
) -> Tensor:
    """The rows (B, M) bool for which the conditions of this module do not hold.

    Args:
        scores: (B, M, n), the n smallest c of each row, ascending.
        norms: (B, M), a.
        k_distance: (B, M), r^2.
        n_measured: number of these n candidates that were measured, the last ones.
        width: D.
        complete: True if the candidates are all tokens there are.
        roundings: the number of roundings in a product; by default D.
    """
    roundings = width if roundings is None else roundings
    gamma = (roundings + 16) * torch.finfo(scores.dtype).eps / 2
    rho = (width + 16) * torch.finfo(k_distance.dtype).eps / 2
    a, r = norms, k_distance.to(scores.dtype).sqrt()
    decided = r.isfinite()
    if not complete:
        V = r * (1 + rho)
        # c > V^2 - a^2 + g(V). Equal tokens tie at the distance 0, where no token can be nearer.
        decided &= (scores[..., -1] > (V - a) * (V + a) + error_bound(a, V, roundings)) | (r == 0)
    n_unmeasured = scores.shape[-1] - n_measured
    if n_unmeasured > 0:
        # Solves d^2 - g(d) = tau + a^2 for the largest d that such a candidate can have.
        tau = torch.addcmul(scores[..., n_unmeasured - 1], a, a, value=1 + 3 * gamma)
        root = torch.addcmul(tau.clamp_(min=0), a, a, value=4 * gamma**2).sqrt_()
        decided &= root.add_(a, alpha=2 * gamma) <= r * ((1 - rho) * (1 - gamma))
    return ~decided


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

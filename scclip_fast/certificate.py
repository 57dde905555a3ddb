"""Which rows the rounding of a search by products leaves undecided.

A search (`search.py`, `distributed.py`) ranks the tokens j of a row i by a rounded value c_ij of

    s_ij = ||y_j||^2 - 2 y_i y_j,        y = fl(x - m)

and measures the distances of the last few candidates. With a = ||y_i||, h = ||y_i - y_j||, d the
true distance of x_i and x_j, u half the unit of the products' dtype, and ||y_j|| <= a + h:

    |d - h| <= u (2 a + h)                                     rounding of x - m
    |c - s| <= gamma (||y_j||^2 + 2 a ||y_j||) <= g(h)         rounding of D products, summed in
    g(h) = gamma ((a + h)^2 + 2 a (a + h)),  gamma = (D + 16) u       any order

Let r be the measured distance of the k-th neighbour, whose own rounding is at most a share rho =
(D + 16) u' of it, with the u' of the measured distances. A row is decided if both of these hold:

- Complete: a token that is measured to be as near as r has h <= V = (r (1 + rho) + 2 u a) / (1 - u)
  and so c <= V^2 - a^2 + g(V). Every token that the search dropped has a larger c.
- Settled: a candidate that was not measured, because it ranks so far ahead, has c <= tau, and so
  h^2 - g(h) <= tau + a^2. Its distance would be measured as r at most.

The bounds hold for one huge token among small ones, as no row's bound depends on another token's
norm. Data that suit the dtype badly leave rows undecided, never wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor


def undecided(
    scores: Tensor,
    norms: Tensor,
    k_distance: Tensor,
    measured: int,
    width: int,
    complete: bool,
) -> Tensor:
    """The rows (B, M) bool for which the module's conditions do not hold.

    Args:
        scores: (B, M, n) the n smallest c of each row, ascending.
        norms: (B, M) a.
        k_distance: (B, M) r^2.
        measured: how many of these n candidates were measured, the last ones.
        width: D.
        complete: True if the candidates are all tokens there are.
    """
    u = torch.finfo(scores.dtype).eps / 2
    gamma = (width + 16) * u
    rho = (width + 16) * torch.finfo(k_distance.dtype).eps / 2
    a, r = norms, k_distance.to(scores.dtype).sqrt()
    decided = r.isfinite()
    if not complete:
        v = (r * (1 + rho) + 2 * u * a) / (1 - u)
        bound = gamma * ((a + v).square() + 2 * a * (a + v))
        # Tokens of equal features tie at the distance 0, where none can be nearer.
        decided &= (scores[..., -1] + a.square() > v.square() + bound) | (r == 0)
    settled = scores.shape[-1] - measured
    if settled > 0:
        tau = scores[..., settled - 1] + a.square() * (1 + 3 * gamma)
        h = (2 * gamma * a + (4 * (gamma * a).square() + tau.clamp(min=0)).sqrt()) / (1 - gamma)
        decided &= h * (1 + u) + 2 * u * a <= r * (1 - rho)
    return ~decided

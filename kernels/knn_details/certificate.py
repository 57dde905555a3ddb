"""The bounds of the certificate, which `certify` and `select` share.

The derivation is in README.md beside this file; its letters are the names here:

    e  = r + u a + eta               g(h) = 2 gamma a (a + h)
    k columns have h <= t_most       all columns but k - 1 have h >= t_least
    V  = (U + e) / (1 - u)           U = t_most (1 + u) + e, at least the k-th true distance
    W  = V^2 + g(V)                  every neighbour has c <= W
    S  = (L - e) / (1 + u)           L = t_least (1 - u) - e, at most the k-th true distance
    S2 = S^2 - g(S)                  every column with c < S2 is a neighbour
"""

from __future__ import annotations

import triton
import triton.language as tl

SLACK: tl.constexpr = tl.constexpr(1 + 2**-17)  # rounding of the norms and of these bounds


@triton.jit
def errors_of(row_a2_ptr, row_r_ptr, col_u_ptr, eta):
    """Returns a and e of rows, and u of their image's columns."""
    a = tl.sqrt(tl.load(row_a2_ptr))
    u = tl.load(col_u_ptr)
    return a, tl.load(row_r_ptr) + u * a + eta, u


@triton.jit
def most_c(tau_most, a, e, u, gamma):
    """Returns W, the most that c of a neighbour can be where k columns have c <= tau_most.

    From u = 1/2 on, half precision bounds no row of the image, and W is infinite.
    """
    gamma_a = gamma * a
    t_most = (gamma_a + tl.sqrt(tau_most + 2.0 * gamma_a * a + gamma_a * gamma_a)) * SLACK
    V = (t_most * (1.0 + u) + 2.0 * e) / (1.0 - u) * SLACK
    W = (V * V + 2.0 * gamma_a * (a + V)) * SLACK
    return tl.where(u < 0.5, W, float("inf"))


@triton.jit
def sure_c(tau_least, a, e, u, gamma):
    """Returns S2, below which every c is a neighbour's where all but k - 1 have c >= tau_least.

    S2 is 0 where no column is sure.
    """
    gamma_a = gamma * a
    t_least = tl.sqrt(tl.maximum(tau_least / SLACK - 2.0 * gamma_a * a, 0.0)) - gamma_a
    S = (t_least / SLACK * (1.0 - u) - 2.0 * e) / (1.0 + u) / SLACK
    S2 = S * S / SLACK - 2.0 * gamma_a * (a + S)
    return tl.where((S > 0.0) & (S2 > 0.0), S2, 0.0)


@triton.jit
def kth_smallest(keys, K, bits):
    """Returns the k-th smallest key of each row, its lowest bits zero."""
    kth = tl.zeros([keys.shape[0]], tl.int32)
    for step in range(0, 31 - bits):
        trial = kth | (1 << (30 - step))
        fewer = tl.sum((keys < trial[:, None]).to(tl.int32), axis=1) < K
        kth = tl.where(fewer, trial, kth)
    return kth


def gamma(d: int) -> float:
    """Returns a bound on the rounding of a sum of d products, as a share of the norms' product.

    Tensor cores add 16 products at a time to the sum and truncate each to the largest of them: 17
    units of 2^-23 a step.
    """
    return (1.1 * d + 64) * 2.0**-23

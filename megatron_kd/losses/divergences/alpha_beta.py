"""Define alpha_beta, the two-parameter family between forward and reverse KL."""

from __future__ import annotations

import torch
from torch import Tensor


def term(log_q: Tensor, log_p: Tensor, *, ab_alpha: float, ab_beta: float) -> Tensor:
    """Return -1/(a b) [q^a p^b - a/(a+b) q^(a+b) - b/(a+b) p^(a+b)], exact in its limits at 0.

    With r(c) = (1 - exp(-c |d|)) / c, which tends to |d| for c -> 0, it is
    q^(a+b) / a [r(b) - r(a + b)] for p <= q, else p^(a+b) / a [r(a + b) - exp(-a |d|) r(b)].
    Nothing is divided by b, and with q and p exchanged nothing by a.
    """
    if ab_beta > ab_alpha:
        return term(log_p, log_q, ab_alpha=ab_beta, ab_beta=ab_alpha)
    d = log_p - log_q
    if ab_alpha == 0.0:
        return 0.5 * d**2
    total = ab_alpha + ab_beta
    under, over = -d.clamp(max=0.0), d.clamp(min=0.0)
    below = (total * log_q).exp() * (_ratio(ab_beta, under) - _ratio(total, under))
    above = (total * log_p).exp() * (
        _ratio(total, over) - (-ab_alpha * over).exp() * _ratio(ab_beta, over)
    )
    return torch.where(d > 0, above, below) / ab_alpha


def _ratio(exponent: float, distance: Tensor) -> Tensor:
    """Return (1 - exp(-c |d|)) / c for the exponent c >= 0 and the distance |d|."""
    return distance if exponent == 0.0 else -torch.expm1(-exponent * distance) / exponent

"""Define skew_reverse_kl, KL(student || mixture of student and teacher)."""

from __future__ import annotations

from torch import Tensor

from megatron_kd.losses.divergences.log_mixture import log_mixture


def term(log_q: Tensor, log_p: Tensor, *, skew: float) -> Tensor:
    """Return p (log p - log m) with m = skew p + (1 - skew) q."""
    return -(log_p.exp() * log_mixture(log_q - log_p, 1.0 - skew))

"""Define skew_kl, KL(teacher || mixture of teacher and student)."""

from __future__ import annotations

from torch import Tensor

from megatron_kd.losses.divergences.log_mixture import log_mixture


def term(log_q: Tensor, log_p: Tensor, *, skew: float) -> Tensor:
    """Return q (log q - log m) with m = skew q + (1 - skew) p."""
    return -(log_q.exp() * log_mixture(log_p - log_q, 1.0 - skew))

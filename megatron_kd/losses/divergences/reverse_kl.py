"""Define reverse_kl, KL(student || teacher)."""

from __future__ import annotations

from torch import Tensor


def term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return p (log p - log q)."""
    return log_p.exp() * (log_p - log_q)

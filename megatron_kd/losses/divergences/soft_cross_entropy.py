"""Define soft_cross_entropy, the cross-entropy of the student under the teacher."""

from __future__ import annotations

from torch import Tensor


def term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return -q log p."""
    return -(log_q.exp() * log_p)

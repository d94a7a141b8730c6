"""Define mse_probabilities, the squared difference of the probabilities."""

from __future__ import annotations

from torch import Tensor


def term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return (q - p)^2."""
    return (log_q.exp() - log_p.exp()) ** 2

"""Define mse_logits, the mean squared difference of centred logits."""

from __future__ import annotations

from torch import Tensor


def term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return d^2, where log q has been shifted so that d = log p - log q has mean 0."""
    return (log_p - log_q) ** 2

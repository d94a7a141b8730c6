"""Define hard_label, forward KL from the teacher's most probable id."""

from __future__ import annotations

from torch import Tensor


def term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return q (log q - log p), where q is 1 at the teacher's most probable id, else 0."""
    return log_q.exp() * (log_q - log_p)

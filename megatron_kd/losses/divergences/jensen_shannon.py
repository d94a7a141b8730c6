"""Define jensen_shannon, the weighted KL of teacher and student to their mixture."""

from __future__ import annotations

from torch import Tensor

from megatron_kd.losses.divergences.log_mixture import log_mixture


def term(log_q: Tensor, log_p: Tensor, *, js_beta: float) -> Tensor:
    """Return b q (log q - log m) + (1 - b) p (log p - log m), m = b q + (1 - b) p, b = js_beta."""
    from_teacher = -js_beta * log_q.exp() * log_mixture(log_p - log_q, 1.0 - js_beta)
    return from_teacher - (1.0 - js_beta) * log_p.exp() * log_mixture(log_q - log_p, js_beta)

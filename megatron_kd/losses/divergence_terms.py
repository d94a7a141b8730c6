"""The divergences between two distributions, id by id.

q is the teacher's probability of an id and p the student's, both at the loss temperature t; d = log p - log q. Everything is
computed from logarithms, and log(a q + (1 - a) p) from d alone, so that nothing overflows, p -> 0 and q -> 0 give no NaN,
and equal distributions give exactly 0. An id that is not there (q = p = 0) has the finite logarithm `ABSENT` on both sides.

    name                 sum over ids of                                         source
    forward_kl           q (log q - log p), KL(teacher || student)               Hinton et al. 2015, arXiv 1503.02531
    soft_cross_entropy   - q log p, the "NLL" of arXiv 2410.16215                forward_kl + the teacher's entropy
    reverse_kl           p (log p - log q), KL(student || teacher)               arXiv 2306.08543
    jensen_shannon       b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p  arXiv 2306.13649: b = 0.5 is symmetric,
                         b (js_beta) in (0, 1) weighs the teacher                b -> 0 tends to b * forward_kl
    skew_kl              KL(q || s q + (1 - s) p), s (skew) in (0, 1)            arXiv 2402.03898: s -> 0 is forward_kl
    skew_reverse_kl      KL(p || s p + (1 - s) q)                                arXiv 2402.03898: s -> 0 is reverse_kl
    alpha_beta           - 1/(a b) [q^a p^b - a/(a+b) q^(a+b) - b/(a+b) p^(a+b)]  arXiv 2505.04560, after Cichocki et al.
                         a, b (ab_alpha, ab_beta) >= 0, the limits at 0 exact:   2011 (Entropy 13): (1, 0) is forward_kl,
                         b = 0: 1/a^2 [q^a log(q^a / p^a) - q^a + p^a]           (0, 1) reverse_kl, (0.5, 0.5) is
                         a = 0: the same with q and p exchanged, b for a         4 (1 - sum sqrt(p q)), Hellinger
                         a = b = 0: d^2 / 2
    mse_logits           (d - mean of d)^2 / V                                   the logits / t less their mean over the V
                                                                                 ids: no probability depends on the mean
    mse_probabilities    (q - p)^2                                               not divided by V: in [0, 2]
    hard_label           - log p of the teacher's likeliest id                   ties to the smaller id; forward_kl to it

mse_logits * t^2 is the limit of 2 t^2 forward_kl for a high temperature (arXiv 1503.02531, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.config.divergences import DIVERGENCES
from megatron_kd.head.logit_rows import MASKED

ABSENT = MASKED


@dataclass(frozen=True)
class Divergence:
    """One of the divergences of the module's table, with its parameters; those that it does not have are ignored.

    js_beta, skew in (0, 1); ab_alpha, ab_beta >= 0. ValueError otherwise.
    """

    name: str = "forward_kl"
    js_beta: float = 0.5
    skew: float = 0.1
    ab_alpha: float = 0.2
    ab_beta: float = 0.7

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(
                f"divergence must be one of {', '.join(DIVERGENCES)}, not {self.name!r}"
            )
        for name in ("js_beta", "skew"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in (0, 1), not {getattr(self, name)}")
        for name in ("ab_alpha", "ab_beta"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, not {getattr(self, name)}")

    def terms(self, log_q: Tensor, log_p: Tensor, vocab_size: int) -> Tensor:
        """[..., M] logarithms -> the terms [..., M], differentiable in log_p.

        For mse_logits log_q must have been shifted so that d has mean 0; for hard_label it is 0 at the likeliest id and
        ABSENT elsewhere.
        """
        if self.name == "mse_logits":
            return (log_p - log_q) ** 2 / vocab_size
        return self._function()(log_q, log_p)

    def _function(self) -> Callable[[Tensor, Tensor], Tensor]:
        beta, skew = self.js_beta, self.skew
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "forward_kl": lambda lq, lp: lq.exp() * (lq - lp),
            "hard_label": lambda lq, lp: lq.exp() * (lq - lp),
            "soft_cross_entropy": lambda lq, lp: -(lq.exp() * lp),
            "reverse_kl": lambda lq, lp: lp.exp() * (lp - lq),
            "jensen_shannon": lambda lq, lp: (
                -beta * lq.exp() * _log_mix(lp - lq, 1.0 - beta)
                - (1.0 - beta) * lp.exp() * _log_mix(lq - lp, beta)
            ),
            "skew_kl": lambda lq, lp: -(lq.exp() * _log_mix(lp - lq, 1.0 - skew)),
            "skew_reverse_kl": lambda lq, lp: -(lp.exp() * _log_mix(lq - lp, 1.0 - skew)),
            "alpha_beta": lambda lq, lp: _alpha_beta(lq, lp, self.ab_alpha, self.ab_beta),
            "mse_probabilities": lambda lq, lp: (lq.exp() - lp.exp()) ** 2,
        }
        return functions[self.name]

    def terms_and_slopes(
        self, log_q: Tensor, log_p: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        """The terms and their derivatives with respect to log_p, each term by its own: both [..., M], detached."""
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            terms = self.terms(log_q, leaf, vocab_size)
            (slopes,) = torch.autograd.grad(terms.sum(), leaf)
        return terms.detach(), slopes


def _log_mix(d: Tensor, weight: float) -> Tensor:
    """log((1 - weight) + weight exp(d)), exactly 0 at d = 0."""
    below = torch.log1p(weight * torch.expm1(d.clamp(max=0.0)))
    above = d + torch.log1p((1.0 - weight) * torch.expm1(-d.clamp(min=0.0)))
    return torch.where(d > 0, above, below)


def _alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """The term of the module's table with r(c) = (1 - exp(-c |d|)) / c, which tends to |d| for c -> 0.

    For p <= q it is q^(a+b) / a [r(b) - r(a + b)], else p^(a+b) / a [r(a + b) - exp(-a |d|) r(b)]: nothing is divided by b, and
    with q and p exchanged nothing by a.
    """
    if beta > alpha:
        return _alpha_beta(log_p, log_q, beta, alpha)
    d = log_p - log_q
    if alpha == 0.0:
        return 0.5 * d**2
    total = alpha + beta

    def r(c: float, distance: Tensor) -> Tensor:
        return distance if c == 0.0 else -torch.expm1(-c * distance) / c

    under, over = -d.clamp(max=0.0), d.clamp(min=0.0)
    below = (total * log_q).exp() * (r(beta, under) - r(total, under))
    above = (total * log_p).exp() * (r(total, over) - (-alpha * over).exp() * r(beta, over))
    return torch.where(d > 0, above, below) / alpha

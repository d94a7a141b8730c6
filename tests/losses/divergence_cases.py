"""Compute the divergences plainly, on whole rows in fp64; make problems with a dense teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_kd.losses import DenseTeacher, Divergence, KDLoss, linear_divergence
from megatron_kd.targets import SparseTarget
from tests.losses.cases import Outcome, Problem, errors, make_problem, outcome_of, say

DIVERGENCES = {
    "forward_kl": Divergence("forward_kl"),
    "soft_cross_entropy": Divergence("soft_cross_entropy"),
    "reverse_kl": Divergence("reverse_kl"),
    "jensen_shannon 0.5": Divergence("jensen_shannon"),
    "jensen_shannon 0.2": Divergence("jensen_shannon", js_beta=0.2),
    "skew_kl 0.1": Divergence("skew_kl"),
    "skew_kl 0.7": Divergence("skew_kl", skew=0.7),
    "skew_reverse_kl 0.1": Divergence("skew_reverse_kl"),
    "skew_reverse_kl 0.7": Divergence("skew_reverse_kl", skew=0.7),
    "alpha_beta 0.2 0.7": Divergence("alpha_beta"),
    "alpha_beta 0.7 0.2": Divergence("alpha_beta", ab_alpha=0.7, ab_beta=0.2),
    "alpha_beta 0.7 0.3": Divergence("alpha_beta", ab_alpha=0.7, ab_beta=0.3),
    "alpha_beta 1 1": Divergence("alpha_beta", ab_alpha=1.0, ab_beta=1.0),
    "alpha_beta 0.6 0": Divergence("alpha_beta", ab_alpha=0.6, ab_beta=0.0),
    "alpha_beta 0 0.6": Divergence("alpha_beta", ab_alpha=0.0, ab_beta=0.6),
    "alpha_beta 1 0": Divergence("alpha_beta", ab_alpha=1.0, ab_beta=0.0),
    "alpha_beta 0 1": Divergence("alpha_beta", ab_alpha=0.0, ab_beta=1.0),
    "alpha_beta 0 0": Divergence("alpha_beta", ab_alpha=0.0, ab_beta=0.0),
    "mse_logits": Divergence("mse_logits"),
    "mse_probabilities": Divergence("mse_probabilities"),
    "hard_label": Divergence("hard_label"),
}


DENSE_ONLY = ("mse_logits",)


# Those that tail "renormalize" can serve.
RENORMALIZABLE = (
    *(
        "forward_kl",
        "soft_cross_entropy",
        "jensen_shannon 0.5",
        "jensen_shannon 0.2",
        "skew_kl 0.1",
        "skew_kl 0.7",
        "hard_label",
    ),
    *("skew_reverse_kl 0.1", "skew_reverse_kl 0.7", "alpha_beta 0.7 0.3", "alpha_beta 1 0"),
)


# Finite even where a probability is 0 on one side.
BOUNDED = (
    *(
        "jensen_shannon 0.5",
        "jensen_shannon 0.2",
        "skew_kl 0.1",
        "skew_kl 0.7",
        "skew_reverse_kl 0.1",
        "skew_reverse_kl 0.7",
    ),
    *(
        "alpha_beta 0.2 0.7",
        "alpha_beta 0.7 0.2",
        "alpha_beta 0.7 0.3",
        "alpha_beta 1 1",
        "mse_probabilities",
    ),
)


# Their gradient is a difference of terms of the size of log p - log q, however small it is itself.
REVERSE = ("reverse_kl", "alpha_beta 0 1")


# Zero between equal distributions.
VANISHING = tuple(name for name in DIVERGENCES if name not in ("soft_cross_entropy", "hard_label"))


class DenseProblem(NamedTuple):
    """Hold a problem whose teacher logits [N, V] are a product.

    They are hidden [N, H_t] times weight [rows_t, H_t], both fp64.
    """

    problem: Problem
    hidden: Tensor
    weight: Tensor

    def teacher(self, dtype: torch.dtype) -> DenseTeacher:
        return DenseTeacher(self.hidden.to(dtype), self.weight.to(dtype))


def dense_problem(
    seed: int, dtype: torch.dtype = torch.float64, *, teacher_rows: int | None = None, **sizes: Any
) -> DenseProblem:
    """Return a problem with everything exact in `dtype`.

    The teacher's padding rows are garbage; `teacher_rows` makes more or fewer of them than the
    student has.
    """
    problem = make_problem(seed, **sizes).rounded_to(dtype)
    generator = torch.Generator().manual_seed(seed + 2)
    hidden = torch.randn((len(problem.hidden), 12), dtype=torch.float64, generator=generator)
    weight = (
        torch.randn(
            (teacher_rows or len(problem.weight), 12), dtype=torch.float64, generator=generator
        )
        / 12**0.25
    )
    weight[problem.vocab_size :] = -30.0
    hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()
    return DenseProblem(
        replace(problem, teacher=hidden @ weight[: problem.vocab_size].T), hidden, weight
    )


def thousands_problem(seed: int) -> DenseProblem:
    """Return logits of +-1e3 on both sides.

    The weights are unit matrices, so that no sum over ids cancels. In each row some ids are moved
    up by 1000 and others down, for both models alike, for one of them, or for each differently.
    """
    problem = make_problem(seed)
    generator = torch.Generator().manual_seed(seed + 3)

    def jumps() -> Tensor:
        return (
            1000.0
            * torch.randint(-1, 2, (40, 90), generator=generator)
            * (torch.rand((40, 90), generator=generator) < 0.2)
        )

    common, student, teacher = jumps(), jumps(), jumps()
    student[0::4], teacher[0::4] = common[0::4], common[0::4]
    student[1::4], teacher[2::4] = 0.0, 0.0
    small = torch.randn((2, 40, 90), dtype=torch.float64, generator=generator) * 2
    # Multiples of 1/64, so that fp32 holds them.
    student_logits, teacher_logits = ((small + torch.stack([student, teacher])) * 64).round() / 64
    unit = torch.zeros((96, 90), dtype=torch.float64)
    unit[:90] = torch.eye(90)
    unit[90:] = 5.0
    return DenseProblem(
        replace(problem, hidden=student_logits, weight=unit, teacher=teacher_logits),
        teacher_logits,
        unit,
    )


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=1e-300).log()


def _alpha_beta(q: Tensor, p: Tensor, a: float, b: float) -> Tensor:
    if a == 0 and b == 0:
        return 0.5 * (_log(p) - _log(q)) ** 2
    if b == 0:
        return (q**a * a * (_log(q) - _log(p)) - q**a + p**a) / a**2
    if a == 0:
        return (p**b * b * (_log(p) - _log(q)) - p**b + q**b) / b**2
    return -(q**a * p**b - a / (a + b) * q ** (a + b) - b / (a + b) * p ** (a + b)) / (a * b)


def plain_divergence(divergence: Divergence, q: Tensor, p: Tensor) -> Tensor:
    """Return the divergence [N] of distributions [N, M], q the teacher's.

    Entries where both are exactly 0 do not count.
    """
    has_mass = (q > 0) | (p > 0)
    is_top = q == q.amax(1, keepdim=True)
    is_top = is_top & (is_top.cumsum(1) == 1)
    if divergence.name == "hard_label":
        return -_log(p[is_top])
    if divergence.name == "mse_logits":
        d = _log(p) - _log(q)
        return ((d - d.mean(1, keepdim=True)) ** 2).mean(1)
    # 1 and 1 give 0 everywhere, and their gradients are multiplied away.
    q, p = torch.where(has_mass, q, 1.0), torch.where(has_mass, p, 1.0)
    kl = {"forward_kl": (q, p), "reverse_kl": (p, q)}
    s, beta = divergence.skew, divergence.js_beta
    kl |= {"skew_kl": (q, s * q + (1 - s) * p), "skew_reverse_kl": (p, s * p + (1 - s) * q)}
    if divergence.name in kl:
        left, right = kl[divergence.name]
        terms = left * (_log(left) - _log(right))
    elif divergence.name == "soft_cross_entropy":
        terms = -q * _log(p)
    elif divergence.name == "jensen_shannon":
        mixture = _log(beta * q + (1 - beta) * p)
        terms = beta * q * (_log(q) - mixture) + (1 - beta) * p * (_log(p) - mixture)
    elif divergence.name == "alpha_beta":
        terms = _alpha_beta(q, p, divergence.ab_alpha, divergence.ab_beta)
    else:
        assert divergence.name == "mse_probabilities"
        terms = (q - p) ** 2
    return torch.where(has_mass, terms, 0.0).sum(1)


def distributions(
    logits: Tensor, teacher: Tensor, temperature: float, is_kept: Tensor | None, tail: str
) -> tuple[Tensor, Tensor]:
    """Return the distributions (q, p) that are compared, from whole rows.

    is_kept: bool [N, V] for a sparse target.
    """
    q, p = (teacher / temperature).softmax(1), (logits / temperature).softmax(1)
    if is_kept is None:
        return q, p
    if tail == "renormalize":
        return q * is_kept / (q * is_kept).sum(1, keepdim=True), p
    return tuple(torch.cat([x * is_kept, (x * ~is_kept).sum(1, keepdim=True)], 1) for x in (q, p))  # type: ignore[return-value]


def kept_ids(target: SparseTarget, vocab_size: int) -> Tensor:
    is_kept = torch.zeros((len(target.indices), vocab_size + 1), dtype=torch.bool)
    return is_kept.scatter_(
        1, torch.where(target.indices >= 0, target.indices, vocab_size).long(), True
    )[:, :vocab_size]


def check_beside_terms(
    actual: Outcome,
    exact: Outcome,
    problem: Problem,
    temperature: float,
    is_kept: Tensor | None,
    limit: float,
    *case: object,
) -> None:
    """Check fp32 against `exact`, relative to the size of gradients and of their terms; alpha = 1.

    reverse_kl gives logit i the gradient p_i (d_i - sum of p d), d = log p - log q. If d is about
    1000 for every probable id of the student, these cancel, and fp32 holds each to 3e-5 only: of a
    gradient of 0.01 that leaves three digits, and a weight gradient of few large rows can consist
    of such ones.
    """
    q, p = distributions(problem.logits(), problem.teacher, temperature, is_kept, "bucket")
    terms = p * (_log(p) - _log(q)).abs()
    if is_kept is not None:
        rest_distribution = (
            (problem.logits() / temperature)
            .masked_fill(is_kept, -torch.inf)
            .softmax(1)
            .nan_to_num()
        )
        terms = terms[:, :-1] + rest_distribution * terms[:, -1:]
    weight = problem.upstream * problem.mask * (problem.labels >= 0) / temperature
    terms = terms * weight.abs().unsqueeze(1)
    beside = {
        "hidden": terms,
        "weight": terms.T @ problem.hidden.abs(),
    }  # the weight is a unit matrix
    for name, value in errors(actual, exact).items():
        size = getattr(exact, name).norm()
        value = value * (size / (size + beside[name].norm())).item() if name in beside else value
        assert value < limit, say(problem.seed, name, value, *case)


def plain_outcome(  # noqa: PLR0913 (the arguments of the public losses)
    problem: Problem,
    divergence: Divergence,
    upstream: Tensor,
    mask: Tensor | None,
    *,
    is_kept: Tensor | None = None,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
) -> Outcome:
    """Return the outcome in fp64 over the whole vocabulary, by plain autograd."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        logits = hidden @ weight[: problem.vocab_size].T
        counted = (problem.labels >= 0).double()
        # A rest that outweighs every kept id is no label.
        q, p = distributions(
            logits,
            problem.teacher,
            temperature,
            is_kept,
            "renormalize" if divergence.name == "hard_label" else tail,
        )
        kd = (
            plain_divergence(divergence, q, p)
            * counted
            * (temperature**2 if temperature_squared else 1.0)
        )
        ce = (
            -logits.log_softmax(1).gather(1, problem.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
            * counted
        )
        total = (1 - alpha) * ce + alpha * kd + z_loss * logits.logsumexp(1) ** 2 * counted
        return KDLoss(total if mask is None else total * mask, ce, kd)

    return outcome_of(problem, loss, upstream)


def divergence_outcome(
    problem: Problem,
    teacher: DenseTeacher | SparseTarget,
    divergence: Divergence,
    upstream: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Outcome:
    """Return the outcome of `linear_divergence` in `dtype`."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        arguments = dict(divergence=divergence, loss_mask=mask, vocab_size=problem.vocab_size)
        return linear_divergence(hidden, weight, problem.labels, teacher, **arguments, **options)  # type: ignore[arg-type]

    return outcome_of(
        problem, loss, upstream, dtype=dtype, main_grad=options.get("schedule") == "direct"
    )

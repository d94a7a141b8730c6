"""The divergences written a second time, plainly, on whole rows in fp64; and problems with a teacher to multiply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_kd.losses import DenseTeacher, Divergence, KDLoss, linear_divergence
from megatron_kd.parallel.collectives import Group, group_size
from megatron_kd.targets import SparseTarget
from tests.losses.cases import Outcome, Problem, errors, make_problem, outcome_of, say
from tests.losses.mistakes import ROWS, B, H, Mistake, S, good_target

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
    """`problem.teacher` [N, V] are the logits of `hidden` [N, H_t] and `weight` [rows_t, H_t], both fp64."""

    problem: Problem
    hidden: Tensor
    weight: Tensor

    def teacher(self, dtype: torch.dtype) -> DenseTeacher:
        return DenseTeacher(self.hidden.to(dtype), self.weight.to(dtype))


def dense_problem(
    seed: int, dtype: torch.dtype = torch.float64, *, teacher_rows: int | None = None, **sizes: Any
) -> DenseProblem:
    """Everything exact in `dtype`; the teacher's padding rows are garbage and, if so asked, more or fewer than the student's."""
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
    """Logits of +-1e3 on both sides, given as they are: the weights are unit matrices, so that no sum over ids cancels.

    Of each row some ids are moved up by 1000 and others down, for both models alike, for one of them, or each in its own way.
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
    ours, theirs = ((small + torch.stack([student, teacher])) * 64).round() / 64
    unit = torch.zeros((96, 90), dtype=torch.float64)
    unit[:90] = torch.eye(90)
    unit[90:] = 5.0
    return DenseProblem(replace(problem, hidden=ours, weight=unit, teacher=theirs), theirs, unit)


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
    """[N] from distributions [N, M], q the teacher's. Entries where both are exactly 0 do not count."""
    there = (q > 0) | (p > 0)
    first = q == q.amax(1, keepdim=True)
    first = first & (first.cumsum(1) == 1)
    if divergence.name == "hard_label":
        return -_log(p[first])
    if divergence.name == "mse_logits":
        d = _log(p) - _log(q)
        return ((d - d.mean(1, keepdim=True)) ** 2).mean(1)
    # 1 and 1 give 0 everywhere, and their gradients are multiplied away.
    q, p = torch.where(there, q, 1.0), torch.where(there, p, 1.0)
    kl = {"forward_kl": (q, p), "reverse_kl": (p, q)}
    s, beta = divergence.skew, divergence.js_beta
    kl |= {"skew_kl": (q, s * q + (1 - s) * p), "skew_reverse_kl": (p, s * p + (1 - s) * q)}
    if divergence.name in kl:
        one, other = kl[divergence.name]
        terms = one * (_log(one) - _log(other))
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
    return torch.where(there, terms, 0.0).sum(1)


def distributions(
    logits: Tensor, teacher: Tensor, temperature: float, kept: Tensor | None, tail: str
) -> tuple[Tensor, Tensor]:
    """(q, p) that are compared, whole rows; kept: bool [N, V] for a sparse target."""
    q, p = (teacher / temperature).softmax(1), (logits / temperature).softmax(1)
    if kept is None:
        return q, p
    if tail == "renormalize":
        return q * kept / (q * kept).sum(1, keepdim=True), p
    return tuple(torch.cat([x * kept, (x * ~kept).sum(1, keepdim=True)], 1) for x in (q, p))  # type: ignore[return-value]


def kept_ids(target: SparseTarget, vocab_size: int) -> Tensor:
    kept = torch.zeros((len(target.indices), vocab_size + 1), dtype=torch.bool)
    return kept.scatter_(
        1, torch.where(target.indices >= 0, target.indices, vocab_size).long(), True
    )[:, :vocab_size]


def check_beside_terms(
    found: Outcome,
    exact: Outcome,
    problem: Problem,
    temperature: float,
    kept: Tensor | None,
    limit: float,
    *what: object,
) -> None:
    """`found` in fp32 against `exact`, alpha = 1: gradients relative to their own size and that of the terms they consist of.

    reverse_kl gives logit i the gradient p_i (d_i - sum of p d), d = log p - log q. Where d is about 1000 for every id that
    the student thinks likely, these cancel, and fp32 holds each to 3e-5 only: of a gradient of 0.01 that leaves three digits,
    and a weight gradient of few large rows can consist of such ones.
    """
    q, p = distributions(problem.logits(), problem.teacher, temperature, kept, "bucket")
    terms = p * (_log(p) - _log(q)).abs()
    if kept is not None:
        others = (
            (problem.logits() / temperature).masked_fill(kept, -torch.inf).softmax(1).nan_to_num()
        )
        terms = terms[:, :-1] + others * terms[:, -1:]
    weight = problem.upstream * problem.mask * (problem.labels >= 0) / temperature
    terms = terms * weight.abs().unsqueeze(1)
    beside = {
        "hidden": terms,
        "weight": terms.T @ problem.hidden.abs(),
    }  # the weight is a unit matrix
    for name, value in errors(found, exact).items():
        own = getattr(exact, name).norm()
        value = value * (own / (own + beside[name].norm())).item() if name in beside else value
        assert value < limit, say(problem.seed, name, value, *what)


def plain_outcome(
    problem: Problem,
    divergence: Divergence,
    upstream: Tensor,
    mask: Tensor | None,
    *,
    kept: Tensor | None = None,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
) -> Outcome:
    """fp64, whole vocabulary, plain autograd."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        logits = hidden @ weight[: problem.vocab_size].T
        counted = (problem.labels >= 0).double()
        # A rest that outweighs every kept id is no label.
        q, p = distributions(
            logits,
            problem.teacher,
            temperature,
            kept,
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
    """`linear_divergence` in `dtype`."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        given = dict(divergence=divergence, loss_mask=mask, vocab_size=problem.vocab_size)
        return linear_divergence(hidden, weight, problem.labels, teacher, **given, **options)  # type: ignore[arg-type]

    return outcome_of(
        problem, loss, upstream, dtype=dtype, main_grad=options.get("schedule") == "direct"
    )


def _sparse_mistakes(vocab_size: int) -> list[tuple[dict[str, Any], str]]:
    """(changed arguments, says)."""
    draws = replace(good_target(), sampled=True)
    own = "has a term of its own for every id outside the kept ones"
    return [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, soft_cross_entropy"),
        (
            {"divergence": "mse_logits"},
            'divergence = "mse_logits" compares the logits of all ids: it needs the dense teacher',
        ),
        (
            {"tail": "renormalize"},
            'divergence = "reverse_kl" with tail = "renormalize" is infinite',
        ),
        ({"tail": "renormalize"}, 'use tail = "bucket"'),
        (
            {"tail": "drop"},
            'with a sparse target takes tail = "bucket" or "renormalize", not "drop"',
        ),
        (
            {"tail": "uniform", "divergence": "skew_kl"},
            'takes tail = "bucket" or "renormalize", not "uniform"',
        ),
        ({"divergence": "mse_probabilities", "tail": "renormalize"}, own),
        ({"divergence": "alpha_beta", "tail": "renormalize"}, own),
        ({"divergence": DIVERGENCES["alpha_beta 0 1"], "tail": "renormalize"}, "is infinite"),
        ({"teacher": draws}, "with random samples is infinite"),
        ({"teacher": draws, "divergence": "alpha_beta"}, own),
        ({"teacher": draws, "divergence": "hard_label"}, "which random samples do not tell"),
        ({"alpha": 1.5}, "alpha must be in [0, 1], not 1.5"),
        ({"temperature": 2.0}, "make it at the loss temperature"),
        ({"schedule": "eager"}, "schedule must be one of"),
        ({"teacher": None}, "alpha = 0.5 needs a target"),
        (
            {"labels": torch.full((S, B), vocab_size)},
            f"label {vocab_size} is not in the vocabulary",
        ),
    ]


def _dense_mistakes(lines: int, size: int) -> list[tuple[dict[str, Any], str]]:
    hidden, weight = torch.randn(lines, B, 6), torch.randn(ROWS, 6)
    fit = "must end in the same width and have the same type"
    found: list[tuple[DenseTeacher, str]] = [
        (
            DenseTeacher(torch.randn(lines + 1, B, 6), weight),
            f"must have the student's leading shape ({lines}, 2)",
        ),
        (DenseTeacher(torch.randn(lines, B, 5), weight), fit),
        (DenseTeacher(hidden.half(), weight), fit),
        (DenseTeacher(hidden, torch.randn(6)), fit),
        (DenseTeacher(hidden.double(), weight.double()), "both must be float64, or neither"),
        (
            DenseTeacher(hidden, torch.randn(ROWS - 2, 6)),
            f"each rank must hold the same ids of the {ROWS * size - 1}, so pad both",
        ),
    ]
    if size > 1:
        # The ranks before the last hold as many ids; only their places differ.
        found.append(
            (
                DenseTeacher(hidden, torch.randn(ROWS + 2, 6)),
                f"{ROWS + 2} vocabulary rows on each of {size} rank(s)",
            )
        )
    return [
        *(({"teacher": teacher}, says) for teacher, says in found),
        ({"schedule": "recompute"}, 'schedule = "recompute" cannot serve a dense teacher'),
        ({"labels": torch.full((S, B), ROWS * size - 1)}, "is not in the vocabulary"),
        ({"alpha": -1.0}, "alpha must be in [0, 1], not -1.0"),
        ({"loss_mask": torch.ones(S)}, "loss_mask (8,) must have the labels' shape (8, 2)"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
    ]


def divergence_mistakes(group: Group, *, sequence_parallel: bool) -> list[Mistake]:
    """Of `linear_divergence`, each a change of a call that works; as in tests/losses/mistakes.py."""
    size = group_size(group)
    lines, vocab_size = S // size if sequence_parallel else S, ROWS * size - 1
    options: dict[str, Any] = dict(
        divergence="reverse_kl", alpha=0.5, tail="bucket", vocab_size=vocab_size, tp_group=group
    )
    options |= dict(
        hidden=torch.randn(lines, B, H),
        weight=torch.randn(ROWS, H),
        labels=torch.zeros((S, B), dtype=torch.long),
    )
    options |= dict(sequence_parallel=sequence_parallel)
    dense = DenseTeacher(torch.randn(lines, B, 6), torch.randn(ROWS, 6))
    if group is None:
        for teacher in (good_target(), dense):
            linear_divergence(**options, teacher=teacher)
    return [
        Mistake(
            says,
            lambda changes=changes, teacher=teacher: linear_divergence(
                **{**options, "teacher": teacher, **changes}
            ),
            says,
        )  # type: ignore[misc]
        for teacher, mistakes in (
            (good_target(), _sparse_mistakes(vocab_size)),
            (dense, _dense_mistakes(lines, size)),
        )
        for changes, says in mistakes
    ]

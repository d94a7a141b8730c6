"""Test weights and temperatures that differ from token to token.

The head is compared with fp64 autograd over whole rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import DenseTeacher, Divergence, KDLoss
from megatron_kd.losses.linear_loss import linear_loss
from megatron_kd.losses.spec import LossInputs, LossSpec, TokenTerms
from megatron_kd.targets import Target
from megatron_kd.targets.sparse import SparseTarget
from tests.losses.cases import (
    Outcome,
    Problem,
    errors,
    fresh_seed,
    hand_target,
    make_problem,
    outcome_of,
    say,
)

SCHEDULES = ("save", "chunk", "recompute", "direct")


def random_terms(seed: int, tokens: int) -> TokenTerms:
    """Return fp32 [N] weights, zeros among them, and temperatures between 0.3 and 4."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(tokens, generator=generator)

    return TokenTerms(
        draw() * (draw() > 0.3),
        draw() * (draw() > 0.3),
        0.3 + 3.7 * draw(),
        0.3 + 3.7 * draw(),
        0.5 + draw(),
    )


def by_hand(problem: Problem, target: SparseTarget, terms: TokenTerms, z_loss: float) -> Outcome:
    """Return forward KL from the rescaled kept entries, each token with its own terms."""
    t, used = terms.map(Tensor.double), target.indices >= 0
    q = torch.where(
        used, target.logprobs.double() / t.teacher_temperature.unsqueeze(1), -torch.inf
    ).softmax(1)  # type: ignore[union-attr]

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        logits = hidden @ weight[: problem.vocab_size].T
        log_p = (
            (logits / t.temperature.unsqueeze(1))
            .log_softmax(1)
            .gather(1, target.indices.clamp(min=0).long())
        )  # type: ignore[union-attr]
        kd = t.kd_scale * torch.where(q > 0, q * (q.clamp(min=1e-300).log() - log_p), 0.0).sum(1)
        counted = (problem.labels >= 0).double()
        ce = -logits.log_softmax(1).gather(1, problem.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        total = t.ce_weight * ce + t.kd_weight * kd + z_loss * logits.logsumexp(1) ** 2
        return KDLoss(total * counted * problem.mask, ce * counted, kd * counted)

    return outcome_of(problem, loss, torch.ones_like(problem.upstream))


def through_head(
    problem: Problem,
    target: Target,
    spec: LossSpec,
    terms: TokenTerms | None,
    dtype: torch.dtype,
    **keywords: Any,
) -> Outcome:
    name, schedule = keywords.get("name", "forward_kl"), keywords.get("schedule", "auto")
    options = HeadOptions(problem.vocab_size, strategy=schedule, chunk_tokens=7)

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        inputs = LossInputs(problem.labels, problem.mask, terms)
        spec_with_name = replace(spec, divergence=Divergence(name))
        return linear_loss(hidden, weight, inputs, target, spec_with_name, options)[0]

    return outcome_of(
        problem,
        loss,
        torch.ones_like(problem.upstream),
        dtype=dtype,
        main_grad=schedule == "direct",
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_token_by_its_own_terms(schedule: str) -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target, terms = hand_target(problem.teacher, top_k=9), random_terms(seed, len(problem.labels))
    expected = by_hand(problem, target, terms, z_loss=0.01)
    spec = LossSpec(
        alpha=0.123, z_loss=0.01
    )  # what it says of weights and temperatures must not count
    for dtype, limit in (
        (torch.float64, 2e-7),
        (torch.float32, 1e-5),
    ):  # the terms themselves are fp32
        actual = errors(
            through_head(problem, target, spec, terms, dtype, schedule=schedule), expected
        )
        assert max(actual.values()) < limit, (actual, say(seed, schedule, dtype))


@pytest.mark.parametrize(
    "name", ["soft_cross_entropy", "jensen_shannon", "skew_reverse_kl", "hard_label"]
)
def test_terms_that_are_all_alike_are_the_numbers(name: str) -> None:
    """Compare tensors of one value with the same loss by scalars, which have their own tests."""
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=9)
    spec = LossSpec(alpha=0.7, temperature=1.7, temperature_squared=True)
    scalar_terms = spec.terms()
    tensors = TokenTerms(
        *(torch.full((len(problem.labels),), value) for value in vars(scalar_terms).values())
    )
    by_scalars = through_head(problem, target, spec, None, torch.float32, name=name)
    by_tensors = through_head(problem, target, spec, tensors, torch.float32, name=name)
    assert max(errors(by_tensors, by_scalars).values()) < 2e-7, say(seed, name)


@pytest.mark.parametrize(
    "weights,scale", [("keep_ce", (1.0, 0.3)), ("keep_kd", (0.7, 1.0)), ("mix", (0.7, 0.3))]
)
@pytest.mark.parametrize("dense", [False, True])
def test_what_the_losses_count(weights: str, scale: tuple[float, float], dense: bool) -> None:
    """Check total = e ce + k kd by linearity from the two parts, losses and gradients."""
    seed = fresh_seed()
    problem = make_problem(seed)
    target: Target = hand_target(problem.teacher, top_k=5)
    if dense:
        target = DenseTeacher(problem.hidden.flip(0), problem.weight)

    def run(spec: LossSpec) -> Outcome:
        target_of_run = (
            replace(target, hidden=target.hidden.double(), weight=target.weight)
            if isinstance(target, DenseTeacher)
            else target
        )
        return through_head(problem, target_of_run, spec, None, torch.float64)

    ce, kd = run(LossSpec(alpha=0.0)), run(LossSpec(alpha=1.0))
    actual = run(LossSpec(alpha=0.3, weights=weights))
    for name in ("total", "hidden", "weight"):
        expected = scale[0] * getattr(ce, name) + scale[1] * getattr(kd, name)
        torch.testing.assert_close(getattr(actual, name), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tail", ["drop", "renormalize", "bucket"])
def test_temperature_on_the_teacher_alone(tail: str) -> None:
    """Compare temperature t on both models with t on the teacher alone.

    The former has the student's logits times t, so the divergences are equal.
    """
    seed = fresh_seed()
    problem, t = make_problem(seed), 2.5
    target = hand_target(problem.teacher, top_k=6, temperature=t)
    on_both = through_head(
        replace(problem, weight=problem.weight * t),
        target,
        LossSpec(1.0, t, temperature_squared=True, tail=tail),
        None,
        torch.float64,
    )
    on_teacher = through_head(
        problem,
        target,
        LossSpec(1.0, t, temperature_squared=True, tail=tail, teacher_only=True),
        None,
        torch.float64,
    )
    torch.testing.assert_close(on_teacher.total, on_both.total, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(on_teacher.weight, on_both.weight * t, rtol=1e-9, atol=1e-10)


def test_a_whole_teacher_at_its_own_temperature() -> None:
    seed = fresh_seed()
    problem, t = make_problem(seed), 0.6
    teacher = DenseTeacher(problem.hidden.flip(0), problem.weight)
    on_teacher = through_head(
        problem, teacher, LossSpec(1.0, t, teacher_only=True), None, torch.float64
    )
    log_q = (teacher.hidden @ problem.weight[: problem.vocab_size].T / t).log_softmax(1)
    log_p = problem.logits().log_softmax(1)
    kd = (log_q.exp() * (log_q - log_p)).sum(1) * (problem.labels >= 0)
    torch.testing.assert_close(on_teacher.kd, kd, rtol=1e-9, atol=1e-12)


def test_what_terms_must_be() -> None:
    problem = make_problem(fresh_seed())
    target, n = hand_target(problem.teacher, top_k=5), len(problem.labels)
    used = TokenTerms(0.5, 0.5, torch.ones(n), torch.ones(n))
    cases: list[tuple[Target, LossSpec, TokenTerms, str]] = [
        (target, LossSpec(0.5), TokenTerms(0.5, torch.ones(n - 1)), "terms.kd_weight"),
        (target, LossSpec(0.5, tail="bucket"), used, "of one temperature for all tokens"),
        (replace(target, sampled=True), LossSpec(0.5), used, "random draws are of one temperature"),
        (DenseTeacher(problem.hidden, problem.weight), LossSpec(0.5), used, "use sparse targets"),
    ]
    for target_of_run, spec, terms, message in cases:
        with pytest.raises(ValueError, match=message):
            through_head(problem, target_of_run, spec, terms, torch.float64)
    with pytest.raises(ValueError, match="weights must be one of"):
        LossSpec(0.5, weights="keep")

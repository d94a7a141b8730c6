"""Test divergences of extreme logits and of tokens that do not count."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_kd.losses import DenseTeacher
from tests.losses.cases import (
    Outcome,
    Problem,
    check,
    fresh_seed,
    hand_target,
    relative_error,
    say,
)
from tests.losses.divergence_cases import (
    BOUNDED,
    DENSE_ONLY,
    DIVERGENCES,
    REVERSE,
    check_beside_terms,
    dense_problem,
    divergence_outcome,
    kept_ids,
    plain_divergence,
    plain_outcome,
    thousands_problem,
)

pytestmark = pytest.mark.usefixtures("small_sizes")


def check_at_a_thousand(
    actual: Outcome,
    exact: Outcome,
    problem: Problem,
    temperature: float,
    is_kept: Tensor | None,
    name: str,
    *case: object,
) -> None:
    """Check logits of +-1000: reverse KL relative to its terms, every other directly."""
    if name in REVERSE:
        check_beside_terms(actual, exact, problem, temperature, is_kept, 5e-6, name, *case)
    else:
        check(actual, exact, 1e-5, problem.seed, name, *case)


def test_logits_of_a_thousand() -> None:
    """Check probabilities of exactly 0 on either side or on both.

    There is no NaN, and values and gradients are those of fp64.
    """
    seed = fresh_seed()
    case = thousands_problem(seed)
    problem = case.problem
    for name, temperature in product(DIVERGENCES, (1.0, 2.0)):
        options = dict(alpha=1.0, temperature=temperature, schedule="save")
        arguments = (DIVERGENCES[name], problem.upstream, problem.mask)
        exact = divergence_outcome(
            problem, case.teacher(torch.float64), *arguments, torch.float64, **options
        )
        actual = divergence_outcome(problem, case.teacher(torch.float32), *arguments, **options)
        check_at_a_thousand(actual, exact, problem, temperature, None, name, options)
        log_p, log_q = (
            (x / temperature).log_softmax(1) for x in (problem.logits(), problem.teacher)
        )
        if name in BOUNDED:
            expected = plain_divergence(DIVERGENCES[name], log_q.exp(), log_p.exp())
        elif name == "mse_logits":
            expected = (log_p - log_q).var(1, unbiased=False)
        elif name in ("forward_kl", "reverse_kl"):
            left, right = (log_p, log_q) if name == "reverse_kl" else (log_q, log_p)
            expected = (left.exp() * (left - right)).sum(1)
        else:
            continue
        assert relative_error(exact.kd, expected * (problem.labels >= 0)) < 1e-12, say(
            seed, name, options
        )


def test_sparse_targets_of_logits_of_a_thousand() -> None:
    seed = fresh_seed()
    problem = thousands_problem(seed).problem
    for name, temperature in product((n for n in DIVERGENCES if n not in DENSE_ONLY), (1.0, 2.0)):
        options = dict(alpha=1.0, temperature=temperature, tail="bucket", schedule="save")
        arguments = (DIVERGENCES[name], problem.upstream, problem.mask)
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
        exact = divergence_outcome(problem, target, *arguments, torch.float64, **options)
        actual, is_kept = (
            divergence_outcome(problem, target, *arguments, **options),
            kept_ids(target, 90),
        )
        check_at_a_thousand(actual, exact, problem, temperature, is_kept, name, options)
        if name in BOUNDED:
            expected = plain_outcome(
                problem,
                *arguments,
                is_kept=is_kept,
                alpha=1.0,
                temperature=temperature,
                tail="bucket",
            )
            assert relative_error(exact.kd, expected.kd) < 1e-5, say(
                seed, name, options
            )  # the target's numbers are fp32


def test_masked_rows_are_exactly_zero() -> None:
    """Check labels of -100 and a mask of zeros: no loss and no gradient, whatever the rows hold."""
    seed = fresh_seed()
    case = dense_problem(seed, torch.float32)
    unlabelled = replace(case.problem, labels=torch.full_like(case.problem.labels, -100))
    target = hand_target(case.problem.teacher, top_k=8, dtype=torch.float32)
    for teacher, name in product(
        (case.teacher(torch.float32), target), ("reverse_kl", "alpha_beta 0.2 0.7", "hard_label")
    ):
        options = dict(alpha=0.5, tail="bucket", z_loss=0.1, chunk_tokens=7, schedule="save")
        actual = divergence_outcome(
            unlabelled, teacher, DIVERGENCES[name], case.problem.upstream, None, **options
        )
        assert not any(t.any() for t in actual), say(seed, name)
        masked = divergence_outcome(
            case.problem,
            teacher,
            DIVERGENCES[name],
            case.problem.upstream,
            torch.zeros(40),
            **options,
        )
        assert not masked.total.any(), say(seed, name)
        assert not masked.hidden.any(), say(seed, name)
        assert not masked.weight.any(), say(seed, name)
        partly_masked = divergence_outcome(
            case.problem,
            teacher,
            DIVERGENCES[name],
            case.problem.upstream,
            case.problem.mask.float(),
            **options,
        )
        off = (case.problem.labels < 0) | (case.problem.mask == 0)
        if isinstance(
            teacher, DenseTeacher
        ):  # what the teacher says of an ignored token is not even looked at
            broken = DenseTeacher(
                torch.where((case.problem.labels < 0).unsqueeze(1), torch.nan, teacher.hidden),
                teacher.weight,
            )
            mask = case.problem.mask.float()
            repeated = divergence_outcome(
                case.problem, broken, DIVERGENCES[name], case.problem.upstream, mask, **options
            )
            assert all(torch.equal(a, b) for a, b in zip(partly_masked, repeated, strict=True)), (
                say(seed, name)
            )
        assert not partly_masked.hidden[off].any(), say(seed, name)
        assert partly_masked.hidden[~off].any(1).all(), say(seed, name)

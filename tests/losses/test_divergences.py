"""Test every divergence against fp64 autograd on whole rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch

from megatron_kd.losses import DenseTeacher, Divergence, linear_divergence
from tests.losses.cases import (
    LIMITS,
    check,
    errors,
    fresh_seed,
    hand_target,
    make_problem,
    say,
    upstream_for,
)
from tests.losses.divergence_cases import (
    DENSE_ONLY,
    DIVERGENCES,
    RENORMALIZABLE,
    dense_problem,
    divergence_outcome,
    kept_ids,
    plain_outcome,
)
from tests.losses.divergence_mistakes import divergence_mistakes
from tests.losses.mistakes import problem_with

pytestmark = pytest.mark.usefixtures("small_sizes")

CHUNK = 17  # does not divide the 40 tokens


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_dense_teacher(dtype: torch.dtype, name: str) -> None:
    """Compare where padding rows of both models are garbage, and the teacher has more of them."""
    seed = fresh_seed()
    case, divergence = dense_problem(seed, dtype, teacher_rows=100), DIVERGENCES[name]
    schedules = cycle(("save", "chunk", "direct"))
    for temperature, (alpha, squared, z_loss) in product(
        (1.0, 2.0), ((0.5, True, 1e-2), (0.5, False, 0.0), (1.0, True, 0.0))
    ):
        scalars = dict(
            alpha=alpha, temperature=temperature, temperature_squared=squared, z_loss=z_loss
        )
        for mask, schedule in ((None, next(schedules)), (case.problem.mask, next(schedules))):
            upstream = upstream_for(schedule, case.problem.upstream)
            options = dict(schedule=schedule, chunk_tokens=CHUNK, **scalars)
            actual = divergence_outcome(
                case.problem, case.teacher(dtype), divergence, upstream, mask, dtype, **options
            )
            expected = plain_outcome(case.problem, divergence, upstream, mask, **scalars)
            check(actual, expected, LIMITS[dtype], seed, name, dtype, options)
            assert not actual.weight[case.problem.vocab_size :].any(), say(seed, name)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in DENSE_ONLY])
@pytest.mark.parametrize("dtype", LIMITS)
def test_sparse_target(dtype: torch.dtype, name: str) -> None:
    """Compare with unused slots and with every memory strategy, recompute included."""
    seed = fresh_seed()
    problem, divergence = make_problem(seed).rounded_to(dtype), DIVERGENCES[name]
    schedules = cycle(("save", "recompute", "chunk", "direct", "auto"))
    tails = ("bucket", "renormalize") if name in RENORMALIZABLE else ("bucket",)
    for temperature, tail, (alpha, z_loss) in product((1.0, 2.0), tails, ((0.5, 1e-2), (1.0, 0.0))):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=dtype)
        scalars = dict(
            alpha=alpha, temperature=temperature, temperature_squared=True, z_loss=z_loss, tail=tail
        )
        for mask, schedule in ((None, next(schedules)), (problem.mask, next(schedules))):
            upstream = upstream_for(schedule, problem.upstream)
            options = dict(schedule=schedule, chunk_tokens=CHUNK, **scalars)
            actual = divergence_outcome(
                problem, target, divergence, upstream, mask, dtype, **options
            )
            expected = plain_outcome(
                problem, divergence, upstream, mask, is_kept=kept_ids(target, 90), **scalars
            )
            check(actual, expected, LIMITS[dtype], seed, name, dtype, options)


def test_chunk_sizes_and_shapes_change_nothing() -> None:
    seed = fresh_seed()
    case = dense_problem(seed)
    teacher = case.teacher(torch.float64)
    for name in ("jensen_shannon 0.2", "mse_logits", "hard_label"):
        expected = plain_outcome(
            case.problem,
            DIVERGENCES[name],
            torch.ones(40),
            case.problem.mask,
            alpha=0.5,
            temperature=2.0,
        )
        for chunk_tokens, schedule in product((None, 1, 7, 40, 1000), ("auto", "save")):
            options = dict(alpha=0.5, temperature=2.0, chunk_tokens=chunk_tokens, schedule=schedule)
            actual = divergence_outcome(
                case.problem,
                teacher,
                DIVERGENCES[name],
                torch.ones(40),
                case.problem.mask,
                torch.float64,
                **options,
            )
            check(actual, expected, 1e-12, seed, name, options)
    lines = replace(
        case.problem,
        hidden=case.problem.hidden.view(20, 2, -1),
        labels=case.problem.labels.view(20, 2),
    )
    shaped = DenseTeacher(teacher.hidden.view(20, 2, -1), teacher.weight)
    actual = divergence_outcome(
        lines,
        shaped,
        DIVERGENCES["hard_label"],
        torch.ones(40),
        case.problem.mask.view(20, 2),
        torch.float64,
        alpha=0.5,
    )
    expected = plain_outcome(
        case.problem, DIVERGENCES["hard_label"], torch.ones(40), case.problem.mask, alpha=0.5
    )
    check(actual._replace(hidden=actual.hidden.flatten(0, 1)), expected, 1e-12, seed, "[S, B]")


def test_bfloat16() -> None:
    """Check losses as exact as in fp32 on the same bf16 values.

    A gradient is off by its own rounding.
    """
    seed = fresh_seed()
    case = dense_problem(seed, torch.bfloat16)
    for name in DIVERGENCES:
        scalars = dict(alpha=0.5, temperature=2.0)
        options = dict(schedule="save", chunk_tokens=CHUNK, **scalars)
        teacher = case.teacher(torch.bfloat16)
        actual = divergence_outcome(
            case.problem,
            teacher,
            DIVERGENCES[name],
            case.problem.upstream,
            None,
            torch.bfloat16,
            **options,
        )
        by_name = errors(
            actual,
            plain_outcome(case.problem, DIVERGENCES[name], case.problem.upstream, None, **scalars),
        )
        assert max(by_name[n] for n in ("total", "ce", "kd")) < 1e-5, say(seed, name, by_name)
        assert max(by_name[n] for n in ("hidden", "weight")) < 2**-8, say(seed, name, by_name)


def test_nothing_is_written_to_and_the_teacher_takes_no_gradient() -> None:
    seed = fresh_seed()
    case = dense_problem(seed, torch.float32)
    teacher = case.teacher(torch.float32)
    for tensor in (teacher.hidden, teacher.weight):
        tensor.requires_grad_()
    originals = [t.detach().clone() for t in (teacher.hidden, teacher.weight)]
    actual = divergence_outcome(
        case.problem, teacher, DIVERGENCES["skew_kl 0.1"], torch.ones(40), None, alpha=1.0
    )
    assert actual.hidden.any()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None
    assert all(
        torch.equal(a, b) for a, b in zip(originals, (teacher.hidden, teacher.weight), strict=True)
    )
    with torch.no_grad():
        loss = linear_divergence(
            case.problem.hidden.float(),
            case.problem.weight.float(),
            case.problem.labels,
            teacher,
            divergence="reverse_kl",
            alpha=0.5,
            vocab_size=90,
        )
    assert not loss.total.requires_grad
    assert bool(loss.kd[case.problem.labels >= 0].all())


def test_what_a_schedule_cannot_serve_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    case = dense_problem(seed, torch.float32)
    teacher, upstream = case.teacher(torch.float32), case.problem.upstream
    for schedule in ("chunk", "auto"):
        with pytest.raises(RuntimeError, match="give per-token weights as loss_mask"):
            divergence_outcome(
                case.problem,
                teacher,
                DIVERGENCES["reverse_kl"],
                upstream,
                None,
                alpha=1.0,
                schedule=schedule,
            )
    monkeypatch.setattr("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 96 * 40)
    actual = divergence_outcome(
        case.problem, teacher, DIVERGENCES["reverse_kl"], upstream, None, alpha=1.0
    )
    check(
        actual,
        plain_outcome(case.problem, DIVERGENCES["reverse_kl"], upstream, None, alpha=1.0),
        1e-5,
        seed,
    )
    hidden, weight = case.problem.hidden.float().requires_grad_(), case.problem.weight.float()
    for schedule in ("save", "chunk"):
        options = dict(divergence="reverse_kl", alpha=1.0, vocab_size=90, schedule=schedule)
        loss = linear_divergence(hidden, weight, case.problem.labels, teacher, **options)  # type: ignore[arg-type]
        loss.total.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.total.sum().backward()


def test_what_makes_no_sense_is_refused_with_a_reason() -> None:
    """Check one rank; for several ranks see tests/layouts/test_head_ranks.py."""
    mistakes = divergence_mistakes(None, sequence_parallel=False)
    problems = [problem for mistake in mistakes if (problem := problem_with(mistake)) is not None]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"js_beta": 0.0},
        {"js_beta": 1.0},
        {"skew": 1.0},
        {"ab_alpha": -0.1},
        {"ab_beta": float("inf")},
    ],
)
def test_parameters_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Divergence("alpha_beta", **changes)

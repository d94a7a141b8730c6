"""Test the head and the loss of existing logits against the fp64 reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from megatron_kd.losses import kd_cross_entropy, reference_kd_cross_entropy
from megatron_kd.targets import SparseTarget, TopSelection, select_targets
from tests.losses.cases import (
    LIMITS,
    TAILS,
    UPSTREAM,
    Problem,
    check,
    errors,
    extreme_problem,
    fresh_seed,
    hand_target,
    head_outcome,
    logits_outcome,
    make_problem,
    oracle_outcome,
    reference_outcome,
    relative_error,
    say,
    upstream_for,
)

pytestmark = pytest.mark.usefixtures("small_sizes")

CHUNK = 17  # does not divide the 40 tokens
SCHEDULES = ("save", "chunk", "direct", "recompute", "auto")


def check_head(
    problem: Problem, target: SparseTarget | None, dtype: torch.dtype, schedule: str, **scalars: Any
) -> None:
    """Check one combination, without and with a mask.

    With the mask the upstream gradient is random if the memory strategy can serve that.
    """
    exact = problem.rounded_to(dtype)
    uniform = torch.full_like(problem.upstream, UPSTREAM.get(schedule, 0.37))
    for mask, upstream in ((None, uniform), (exact.mask, upstream_for(schedule, exact.upstream))):
        expected = reference_outcome(exact, target, upstream, mask, **scalars)
        head_mask = None if mask is None else mask.float()
        actual = head_outcome(
            exact,
            target,
            upstream,
            head_mask,
            dtype,
            schedule=schedule,
            chunk_tokens=CHUNK,
            **scalars,
        )
        assert actual.total.dtype == dtype
        check(
            actual,
            expected,
            LIMITS[dtype],
            problem.seed,
            schedule,
            dtype,
            "mask" if mask is not None else "",
            scalars,
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_every_tail_temperature_and_alpha(schedule: str, dtype: torch.dtype) -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    for temperature, tail in product((1.0, 2.0), TAILS):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=dtype)
        for alpha, squared, z_loss in (
            (0.0, False, 1e-2),
            (0.5, True, 1e-2),
            (0.5, False, 0.0),
            (1.0, True, 0.0),
            (1.0, False, 1e-2),
        ):
            scalars = dict(
                alpha=alpha,
                temperature=temperature,
                temperature_squared=squared,
                tail=tail,
                z_loss=z_loss,
            )
            check_head(problem, target, dtype, schedule, **scalars)


@pytest.mark.parametrize("dtype", LIMITS)
def test_existing_logits(dtype: torch.dtype) -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    exact = problem.rounded_to(dtype)
    for temperature, tail, squared in product((1.0, 2.0), TAILS, (False, True)):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=dtype)
        for alpha, z_loss in ((0.0, 0.0), (0.5, 1e-2), (1.0, 0.0)):
            scalars = dict(
                alpha=alpha,
                temperature=temperature,
                temperature_squared=squared,
                tail=tail,
                z_loss=z_loss,
            )
            actual = logits_outcome(exact, target, exact.upstream, exact.mask, dtype, **scalars)
            check(
                actual,
                reference_outcome(exact, target, exact.upstream, exact.mask, **scalars),
                LIMITS[dtype],
                seed,
                dtype,
                scalars,
            )


def test_existing_logits_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 150 tokens in chunks of 64, the smallest size, and targets selected from them."""
    monkeypatch.setattr("megatron_kd.head.sizes.CHUNK_LOGITS_CPU", 1)
    seed = fresh_seed()
    problem = make_problem(seed, tokens=150)
    for temperature, tail in product((1.0, 2.0), TAILS):
        chosen = select_targets(problem.teacher, TopSelection(8, temperature=temperature))
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, ragged=False)
        assert torch.equal(chosen.indices, target.indices), say(seed, temperature)
        scalars = dict(alpha=0.5, temperature=temperature, tail=tail, z_loss=1e-2)
        expected = oracle_outcome(problem, target, problem.upstream, problem.mask, **scalars)
        for candidate in (chosen, target):
            actual = logits_outcome(
                problem, candidate, problem.upstream, problem.mask, torch.float64, **scalars
            )
            check(actual, expected, 1e-12, seed, scalars)


def test_against_the_dense_loss_directly() -> None:
    """Compare the fp64 head with the loss over whole rows, without the reference between."""
    seed = fresh_seed()
    problem = make_problem(seed)
    for temperature, tail in product((1.0, 2.0), TAILS):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature)
        scalars = dict(
            alpha=0.6, temperature=temperature, temperature_squared=True, tail=tail, z_loss=1e-2
        )
        expected = oracle_outcome(problem, target, problem.upstream, problem.mask, **scalars)
        for run in (head_outcome, logits_outcome):
            check(
                run(problem, target, problem.upstream, problem.mask, torch.float64, **scalars),
                expected,
                1e-12,
                seed,
                run,
                scalars,
            )


def test_logits_of_ten_thousand() -> None:
    """Check the bucket's gradient where the rest lies 2e4 below the support.

    Its softmax must keep its digits.
    """
    seed = fresh_seed()
    problem = extreme_problem(seed, top_k=8)
    assert problem.logits().abs().max() > 9e3
    for temperature, tail, alpha in product((1.0, 2.0), TAILS, (0.0, 0.5, 1.0)):
        target = hand_target(
            problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32, ragged=False
        )
        scalars = dict(alpha=alpha, temperature=temperature, tail=tail)
        expected = reference_outcome(problem, target, problem.upstream, problem.mask, **scalars)
        for schedule in ("recompute", "auto"):
            actual = head_outcome(
                problem,
                target,
                problem.upstream,
                problem.mask.float(),
                schedule=schedule,
                chunk_tokens=CHUNK,
                **scalars,
            )
            check(actual, expected, 1e-5, seed, schedule, scalars)
        check(
            logits_outcome(problem, target, problem.upstream, problem.mask, **scalars),
            expected,
            1e-5,
            seed,
            "given",
            scalars,
        )


def test_bfloat16() -> None:
    """Compare with fp64 on the same bf16 values.

    Computed in fp32, a gradient is off by its own rounding: 2^-9 of each entry.
    """
    seed = fresh_seed()
    problem = make_problem(seed).rounded_to(torch.bfloat16)
    for temperature, tail in product((1.0, 2.0), TAILS):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
        scalars = dict(alpha=0.5, temperature=temperature, tail=tail, z_loss=1e-2)
        for schedule in SCHEDULES:
            upstream = upstream_for(schedule, problem.upstream)
            options = dict(schedule=schedule, chunk_tokens=CHUNK, **scalars)
            actual = head_outcome(
                problem, target, upstream, problem.mask.float(), torch.bfloat16, **options
            )
            by_name = errors(
                actual, reference_outcome(problem, target, upstream, problem.mask, **scalars)
            )
            assert max(by_name[name] for name in ("total", "ce", "kd")) < 1e-5, say(
                seed, options, by_name
            )
            assert max(by_name[name] for name in ("hidden", "weight")) < 2**-8, say(
                seed, options, by_name
            )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bfloat16_near_the_teacher(schedule: str) -> None:
    """Check where p - q is small against both.

    The student's logits are within 0.02 of the teacher's, whose standard deviation is 4.8. Logits
    rounded to bf16 lose a fifth of this gradient; the second half checks that the measure can tell.
    """
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    tokens, width, vocab_size = 64, 64, 1500
    hidden = (
        torch.randn(tokens, width, generator=generator, dtype=torch.float64).bfloat16().double()
    )
    weight = (
        (0.6 * torch.randn(vocab_size, width, generator=generator, dtype=torch.float64))
        .bfloat16()
        .double()
    )
    teacher = hidden @ weight.T
    teacher = teacher + 0.02 * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
    labels, ones = teacher.argmax(1), torch.ones(tokens, dtype=torch.float64)
    problem = Problem(seed, hidden, weight, labels, ones, ones, teacher)
    target = hand_target(teacher, top_k=64, dtype=torch.float32, ragged=False)
    scalars = dict(alpha=1.0, tail="bucket")
    expected = reference_outcome(problem, target, ones, None, **scalars)
    actual = head_outcome(
        problem, target, ones, None, torch.bfloat16, schedule=schedule, chunk_tokens=24, **scalars
    )
    assert relative_error(actual.hidden, expected.hidden) < 2e-3, say(
        seed, relative_error(actual.hidden, expected.hidden)
    )
    assert relative_error(actual.weight, expected.weight) < 2e-3, say(
        seed, relative_error(actual.weight, expected.weight)
    )

    rounded = teacher.new_tensor((hidden @ weight.T).bfloat16().tolist()).requires_grad_()
    reference_kd_cross_entropy(rounded, labels, target, **scalars).total.sum().backward()
    assert rounded.grad is not None
    assert relative_error(rounded.grad @ weight, expected.hidden) > 0.1


def test_bfloat16_existing_logits() -> None:
    """Check the gradient of bf16 logits themselves.

    It is off by 2^-9 for a sum, and by three roundings for any upstream gradient; losses stay fp32.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    narrow = problem.logits().bfloat16()
    for (temperature, tail), (upstream, limit) in product(
        product((1.0, 2.0), TAILS),
        ((torch.ones_like(problem.upstream), 2**-8), (problem.upstream, 3 * 2**-9)),
    ):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
        scalars = dict(alpha=0.5, temperature=temperature, tail=tail)
        leaf, wide = narrow.clone().requires_grad_(), narrow.double().requires_grad_()
        actual = kd_cross_entropy(leaf, problem.labels, target, **scalars)
        expected = reference_kd_cross_entropy(wide, problem.labels, target, **scalars)
        actual.total.backward(upstream.float())
        expected.total.backward(upstream)
        assert actual.total.dtype == torch.float32
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        assert relative_error(actual.total.detach(), expected.total.detach()) < 1e-5, say(
            seed, scalars
        )
        assert wide.grad is not None, say(seed, scalars, limit)
        assert relative_error(leaf.grad, wide.grad) < limit, say(seed, scalars, limit)


def test_sampled_targets_and_no_target() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 20, (40, 6), generator=generator).float()
    ids = torch.rand(40, 90, generator=generator).argsort(1)[:, :6].int()
    sampled = SparseTarget(
        ids, (counts / counts.sum(1, keepdim=True)).log(), temperature=2.0, sampled=True
    )
    for tail in TAILS:
        for schedule in SCHEDULES:
            check_head(
                problem, sampled, torch.float32, schedule, alpha=0.5, temperature=2.0, tail=tail
            )
    for schedule in SCHEDULES:
        check_head(problem, None, torch.float32, schedule, alpha=0.0, z_loss=1e-2)


def test_sequence_by_batch_layout() -> None:
    """Compare [S, B, H] with [N, H] of the same tokens; losses come back as [S, B]."""
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    flat = head_outcome(
        problem,
        target,
        problem.upstream,
        problem.mask.float(),
        alpha=0.5,
        tail="bucket",
        chunk_tokens=CHUNK,
    )
    shaped = Problem(
        seed,
        problem.hidden.view(20, 2, -1),
        problem.weight,
        problem.labels.view(20, 2),
        problem.mask.view(20, 2),
        problem.upstream,
        problem.teacher,
    )
    actual = head_outcome(
        shaped,
        target.map(lambda t: t.view(20, 2, *t.shape[1:])),
        problem.upstream,
        shaped.mask.float(),
        alpha=0.5,
        tail="bucket",
        chunk_tokens=CHUNK,
    )
    assert actual.hidden.shape == (20, 2, 16)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(actual, flat, strict=True)), (
        say(seed)
    )

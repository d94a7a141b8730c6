"""Test reference_kd_cross_entropy against dense teacher rows and finite differences."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from megatron_kd.losses import reference_kd_cross_entropy
from megatron_kd.targets import SparseTarget
from tests.losses.cases import (
    TAILS,
    dense_loss,
    errors,
    extreme_problem,
    fresh_seed,
    hand_target,
    make_problem,
    oracle_outcome,
    reference_outcome,
    relative_error,
    say,
)


def test_values_and_gradients_equal_the_dense_loss() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    for temperature, top_k in product((1.0, 2.0, 0.5), (1, 8)):
        target = hand_target(problem.teacher, top_k=top_k, temperature=temperature)
        for tail, alpha, squared, z_loss in product(
            TAILS, (0.0, 0.5, 1.0), (False, True), (0.0, 1e-2)
        ):
            scalars = dict(
                alpha=alpha,
                temperature=temperature,
                temperature_squared=squared,
                tail=tail,
                z_loss=z_loss,
            )
            actual = errors(
                reference_outcome(problem, target, problem.upstream, problem.mask, **scalars),
                oracle_outcome(problem, target, problem.upstream, problem.mask, **scalars),
            )
            assert max(actual.values()) < 1e-13, say(seed, top_k, scalars, actual)


def test_renormalize_needs_no_matching_temperature() -> None:
    """Check that kept entries alone are known at any temperature."""
    seed = fresh_seed()
    problem = make_problem(seed)
    measured_at_1 = hand_target(problem.teacher, top_k=8, temperature=1.0)
    scalars = dict(alpha=0.7, temperature=2.0, tail="renormalize")
    actual = reference_outcome(problem, measured_at_1, problem.upstream, None, **scalars)
    expected = oracle_outcome(problem, measured_at_1, problem.upstream, None, **scalars)
    assert max(errors(actual, expected).values()) < 1e-13, say(seed, errors(actual, expected))


def test_without_log_tail_it_is_what_the_kept_entries_leave() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8)
    bare = SparseTarget(target.indices, target.logprobs)
    for tail in TAILS:
        actual = reference_outcome(problem, bare, problem.upstream, None, alpha=1.0, tail=tail)
        expected = oracle_outcome(problem, target, problem.upstream, None, alpha=1.0, tail=tail)
        assert max(errors(actual, expected).values()) < 1e-12, say(
            seed, tail, errors(actual, expected)
        )


def test_sampled_targets_are_counts_whatever_the_tail() -> None:
    """Check counts 3, 2 and 1 of 6: q = (1/2, 1/3, 1/6), no mass outside.

    They are already at the temperature of the samples.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    ids = torch.rand_like(problem.teacher).argsort(1)[:, :4].int()
    ids[:, 3] = -1
    q = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64) / 6
    target = SparseTarget(ids, q.log().expand(ids.shape), temperature=2.0, sampled=True)
    logits = problem.logits()
    log_p = (logits / 2.0).log_softmax(1).gather(1, ids.long().clamp(min=0))
    expected = (q[:3] * (q[:3].log() - log_p[:, :3])).sum(1) * (problem.labels >= 0)
    for tail in TAILS:
        actual = reference_kd_cross_entropy(
            logits, problem.labels, target, alpha=1.0, temperature=2.0, tail=tail
        )
        assert relative_error(actual.kd, expected) < 1e-14, say(seed, tail)
        assert torch.equal(actual.total, actual.kd)


def test_finite_differences() -> None:
    seed = fresh_seed()
    problem = make_problem(seed, tokens=4, vocab_size=7, rows=7, width=4)
    for temperature, tail in product((1.0, 2.0), TAILS):
        target = hand_target(problem.teacher, top_k=3, temperature=temperature)

        def total(
            logits: Tensor,
            target: SparseTarget = target,
            temperature: float = temperature,
            tail: str = tail,
        ) -> Tensor:
            return reference_kd_cross_entropy(
                logits,
                problem.labels,
                target,
                alpha=0.6,
                temperature=temperature,
                temperature_squared=True,
                tail=tail,
                z_loss=0.01,
            ).total

        assert torch.autograd.gradcheck(total, (problem.logits().requires_grad_(),)), say(
            seed, tail, temperature
        )


def test_any_leading_shape_and_detached_parts() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8)
    logits = problem.logits().requires_grad_()
    flat = reference_kd_cross_entropy(logits, problem.labels, target, alpha=0.5, tail="bucket")
    shaped = reference_kd_cross_entropy(
        logits.view(20, 2, -1),
        problem.labels.view(20, 2),
        target.map(lambda t: t.view(20, 2, *t.shape[1:])),
        alpha=0.5,
        tail="bucket",
    )
    assert shaped.total.shape == shaped.ce.shape == shaped.kd.shape == (20, 2)
    assert all(torch.equal(a, b.flatten()) for a, b in zip(flat, shaped, strict=True)), say(seed)
    assert flat.total.requires_grad
    assert not flat.ce.requires_grad
    assert not flat.kd.requires_grad


def test_extreme_logits_are_finite_and_right() -> None:
    seed = fresh_seed()
    problem = extreme_problem(seed, top_k=8)
    assert problem.logits().abs().max() > 9e3
    for temperature, tail in product((1.0, 2.0), TAILS):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, ragged=False)
        scalars = dict(alpha=0.5, temperature=temperature, tail=tail)
        actual = reference_outcome(problem, target, problem.upstream, None, **scalars)
        expected = oracle_outcome(problem, target, problem.upstream, None, **scalars)
        assert max(errors(actual, expected).values()) < 1e-12, say(
            seed, scalars, errors(actual, expected)
        )


def test_without_a_target_it_is_plain_cross_entropy() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    actual = reference_kd_cross_entropy(problem.logits(), problem.labels, None, alpha=0.0)
    expected = torch.nn.functional.cross_entropy(problem.logits(), problem.labels, reduction="none")
    assert relative_error(actual.total, expected) < 1e-14, say(seed)
    assert not actual.kd.any(), say(seed)
    dense = dense_loss(
        problem.logits(),
        problem.labels,
        problem.teacher,
        hand_target(problem.teacher, top_k=2),
        alpha=0.0,
    )
    assert relative_error(actual.ce, dense.ce) < 1e-14, say(seed)

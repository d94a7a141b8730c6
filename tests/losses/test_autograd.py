"""Test the losses as autograd functions: arguments, repeats, backward passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_kd.losses import (
    KDLoss,
    kd_cross_entropy,
    linear_kd_cross_entropy,
)
from megatron_kd.losses.sparse_loss import SparseLoss
from megatron_kd.targets import SparseTarget
from tests.losses.cases import (
    TAILS,
    fresh_seed,
    hand_target,
    head_outcome,
    make_problem,
    reference_outcome,
    say,
    worst,
)

SCHEDULES = ("save", "chunk", "recompute", "auto")


Losses = list[tuple[str, Callable[[Tensor, Tensor, SparseTarget], KDLoss]]]


def entry_points(labels: Tensor, **options: object) -> Losses:
    """Return every loss as a function of hidden, weight and target."""
    heads: Losses = [
        (
            name,
            lambda h, w, t, name=name: linear_kd_cross_entropy(
                h, w, labels, t, schedule=name, chunk_tokens=7, **options
            ),
        )  # type: ignore[misc]
        for name in SCHEDULES
    ]
    return [
        *heads,
        ("given logits", lambda h, w, t: kd_cross_entropy(h @ w.T, labels, t, **options)),
    ]  # type: ignore[arg-type]


def test_arguments_are_never_written_to() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0, dtype=torch.float32)
    logits = problem.logits().float()
    tensors = [
        problem.hidden.float(),
        problem.weight.float(),
        problem.labels,
        problem.mask.float(),
        logits,
    ]
    tensors += [target.indices, target.logprobs, target.log_tail, target.entropy]
    originals = [t.clone() for t in tensors]
    hidden, weight, labels, mask = tensors[:4]
    for tail in TAILS:
        options = dict(alpha=0.5, temperature=2.0, tail=tail, z_loss=0.1)
        for schedule in SCHEDULES:
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            actual = linear_kd_cross_entropy(
                *leaves,
                labels,
                target,
                loss_mask=mask,
                vocab_size=90,
                schedule=schedule,
                chunk_tokens=7,
                **options,
            )
            upstream = torch.ones(40) if schedule == "chunk" else problem.upstream.float()
            original = upstream.clone()
            actual.total.backward(upstream)
            assert torch.equal(upstream, original)
        upstream = problem.upstream.float()
        kd_cross_entropy(
            logits.detach().requires_grad_(), labels, target, **options
        ).total.backward(upstream)
        assert torch.equal(upstream, problem.upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(tensors, originals, strict=True)), say(seed)


def test_twice_the_same_bits() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for schedule in SCHEDULES:
        repetition_1, repetition_2 = (
            head_outcome(
                problem,
                target,
                torch.ones(40),
                None,
                alpha=0.5,
                tail="bucket",
                schedule=schedule,
                chunk_tokens=7,
            )
            for _ in "12"
        )
        assert all(torch.equal(a, b) for a, b in zip(repetition_1, repetition_2, strict=True)), say(
            seed, schedule
        )
        expected = reference_outcome(
            problem.rounded_to(torch.float32),
            target,
            torch.ones(40),
            None,
            alpha=0.5,
            tail="bucket",
        )
        assert worst(repetition_1, expected) < 1e-5, say(seed, schedule)


def test_a_second_backward_raises() -> None:
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for name, loss in entry_points(problem.labels, alpha=0.5, vocab_size=90):
        if name == "recompute":
            continue  # which can: see below
        total = loss(
            problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_(), target
        ).total.sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            total.backward()


def test_recompute_can_go_back_again() -> None:
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    hidden, weight = (
        problem.hidden.float().requires_grad_(),
        problem.weight.float().requires_grad_(),
    )
    total = linear_kd_cross_entropy(
        hidden, weight, problem.labels, target, alpha=0.5, vocab_size=90, schedule="recompute"
    ).total.sum()
    repetition_1, repetition_2 = (
        torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(repetition_1, repetition_2, strict=True))


def test_schedule_chunk_refuses_an_upstream_that_differs_between_tokens() -> None:
    """Check that auto recomputes instead, and that a materialised constant is recognised."""
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)

    def total(schedule: str) -> Tensor:
        leaves = problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_()
        return linear_kd_cross_entropy(
            *leaves, problem.labels, target, alpha=0.5, vocab_size=90, schedule=schedule
        ).total

    uneven = torch.ones(40)
    uneven[17] = 1.0 + 1e-6
    with pytest.raises(RuntimeError, match="give per-token weights as loss_mask"):
        total("chunk").backward(uneven)
    with pytest.raises(RuntimeError, match="give per-token weights as loss_mask"):
        (total("chunk") * problem.mask.float()).sum().backward()
    total("auto").backward(uneven)
    total("chunk").backward(torch.full((40,), 0.25))
    total("chunk").mean().backward()


def test_ce_and_kd_have_no_gradient() -> None:
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for name, loss in entry_points(problem.labels, alpha=0.5, vocab_size=90):
        actual = loss(
            problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_(), target
        )
        assert actual.total.requires_grad, name
        assert not actual.ce.requires_grad, name
        assert not actual.kd.requires_grad, name


def test_without_autograd_no_gradient_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that evaluation costs one product instead of three.

    A parameter requires its gradient even then.
    """

    def refuse(self: SparseLoss, *arguments: object, **options: object) -> Tensor:
        raise AssertionError("formed a gradient")

    monkeypatch.setattr(SparseLoss, "logit_gradient", refuse)
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    leaves = problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_()
    for _, loss in entry_points(problem.labels, alpha=0.5, vocab_size=90):
        with torch.no_grad():
            assert not loss(*leaves, target).total.requires_grad
    with torch.no_grad():
        kd_cross_entropy(
            problem.logits().float().requires_grad_(), problem.labels, target, alpha=0.5
        )
    with pytest.raises(AssertionError, match="formed a gradient"):
        linear_kd_cross_entropy(
            *leaves, problem.labels, target, alpha=0.5, vocab_size=90, schedule="chunk"
        )

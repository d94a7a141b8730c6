"""Test megatron-core's contract about `main_grad`.

Gradients of the output weight are summed into it, and DDP's hook is informed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_kd.losses import linear_kd_cross_entropy, reference_kd_cross_entropy
from tests.losses.cases import (
    Problem,
    fresh_seed,
    hand_target,
    make_problem,
    reference_outcome,
    relative_error,
    say,
)

SCHEDULES = ("save", "chunk", "direct", "recompute", "auto")


class Ddp:
    """Imitate megatron-core's DistributedDataParallel for one parameter.

    It has a main_grad, and a hook runs once its gradient exists.
    """

    def __init__(self, weight: Tensor, *, zero_out: bool) -> None:
        self.weight, self.fired = weight, 0
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        weight.zero_out_wgrad = zero_out  # type: ignore[attr-defined]
        weight.register_post_accumulate_grad_hook(self.hook)

    def hook(self, weight: Tensor) -> None:
        self.fired += 1
        if weight.grad is not None and (
            not weight.grad_added_to_main_grad or weight.zero_out_wgrad
        ):  # type: ignore[attr-defined]
            weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
        weight.grad = None


def loss_of(problem: Problem, hidden: Tensor, weight: Tensor, schedule: str) -> Tensor:
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    loss = linear_kd_cross_entropy(
        hidden,
        weight,
        problem.labels,
        target,
        alpha=0.6,
        tail="bucket",
        vocab_size=90,
        schedule=schedule,
        chunk_tokens=17,
    )
    return loss.total.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_microbatches_add_up(
    schedule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum in fp32 whatever the weight's type: nothing is rounded to bf16 between microbatches."""
    monkeypatch.setattr("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 0)
    seed = fresh_seed()
    weight, expected = None, torch.zeros(96, 16, dtype=torch.float64)
    for number in range(3):
        problem = make_problem(seed + number).rounded_to(dtype)
        if weight is None:
            shared = problem.weight
            weight = torch.nn.Parameter(shared.to(dtype))
            ddp = Ddp(weight, zero_out=False)
        problem = Problem(**{**problem.__dict__, "weight": shared})
        hidden = problem.hidden.to(dtype).requires_grad_()
        scale = 1.0 if schedule == "direct" else 0.5  # a loss scale
        (scale * loss_of(problem, hidden, weight, schedule)).backward()
        target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
        exact = reference_outcome(
            problem, target, torch.full((40,), scale), None, alpha=0.6, tail="bucket"
        )
        expected += exact.weight
        assert relative_error(hidden.grad, exact.hidden) < (
            1e-5 if dtype == torch.float32 else 4e-3
        )
    assert ddp.fired == 3
    assert weight.grad is None
    assert relative_error(weight.main_grad, expected) < 1e-5, say(seed, schedule)
    assert not weight.main_grad[90:].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tied_embeddings(schedule: str) -> None:
    """Use a weight twice: the head's part is in main_grad, the embedding's comes through autograd.

    DDP adds the latter.
    """
    seed = fresh_seed()
    problem = make_problem(seed).rounded_to(torch.float32)
    ids = torch.randint(0, 90, (40,))
    exact = problem.weight.clone().requires_grad_()
    hidden = torch.nn.functional.embedding(ids, exact) + problem.hidden
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    reference_kd_cross_entropy(
        hidden @ exact[:90].T, problem.labels, target, alpha=0.6, tail="bucket"
    ).total.sum().backward()

    weight = torch.nn.Parameter(problem.weight.float())
    ddp = Ddp(weight, zero_out=True)
    loss_of(
        problem,
        torch.nn.functional.embedding(ids, weight) + problem.hidden.float(),
        weight,
        schedule,
    ).backward()
    assert ddp.fired == 1
    assert exact.grad is not None, say(seed, schedule)
    assert relative_error(weight.main_grad, exact.grad) < 1e-5, say(seed, schedule)


def test_direct_refuses_what_it_cannot_do() -> None:
    problem = make_problem(fresh_seed())
    hidden, weight = (
        problem.hidden.float().requires_grad_(),
        torch.nn.Parameter(problem.weight.float()),
    )
    with pytest.raises(
        ValueError, match='schedule="direct" adds to weight.main_grad, which must exist in fp32'
    ):
        loss_of(problem, hidden, weight, "direct")
    weight.main_grad = torch.zeros_like(weight, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match='schedule="direct" adds to weight.main_grad, which must exist in fp32'
    ):
        loss_of(problem, hidden, weight, "direct")
    weight.main_grad = torch.zeros_like(weight)
    total = loss_of(problem, hidden, weight, "direct")
    with pytest.raises(RuntimeError, match="has already added its gradients to main_grad"):
        (0.5 * total).backward()


def test_a_main_grad_in_bfloat16_is_added_to_once() -> None:
    """Round once per microbatch, not once per chunk."""
    seed = fresh_seed()
    problem = make_problem(seed).rounded_to(torch.bfloat16)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    expected = reference_outcome(
        problem, target, torch.ones(40), None, alpha=0.6, tail="bucket"
    ).weight
    for schedule in ("save", "chunk", "recompute"):
        weight = torch.nn.Parameter(problem.weight.bfloat16())
        weight.main_grad = torch.zeros_like(weight)
        loss_of(problem, problem.hidden.bfloat16().requires_grad_(), weight, schedule).backward()
        assert weight.grad_added_to_main_grad
        assert (
            torch.equal(weight.main_grad, expected.bfloat16())
            or relative_error(weight.main_grad, expected) < 2**-8
        ), say(seed, schedule)

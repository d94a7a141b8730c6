"""Make random problems for the losses, and compute the loss plainly in fp64.

The package's own arithmetic is not used: targets and teacher distributions come from the teacher's
complete rows. N tokens, H hidden, V true vocabulary, K kept entries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_kd.losses import (
    KDLoss,
    kd_cross_entropy,
    linear_kd_cross_entropy,
    reference_kd_cross_entropy,
)
from megatron_kd.targets import SparseTarget

TAILS = ("drop", "renormalize", "bucket", "uniform")
SEED_VARIABLE = "KD_TEST_SEED"


def fresh_seed() -> int:
    """Return a new seed, also given to torch and printed; KD_TEST_SEED repeats one."""
    variable = os.environ.get(SEED_VARIABLE)
    seed = int(variable) if variable else int.from_bytes(os.urandom(4), "little")
    print(f"{SEED_VARIABLE}={seed}", file=sys.stderr)
    torch.manual_seed(seed)
    return seed


class Outcome(NamedTuple):
    """Hold losses [N] and the gradients of sum(upstream * total)."""

    total: Tensor
    ce: Tensor
    kd: Tensor
    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Problem:
    """Hold the inputs of one output head, in fp64.

    Attributes:
        hidden: [N, H].
        weight: [rows, H], whose rows past vocab_size are large garbage.
        labels: [N], ids inside and outside the teacher's most probable ones, and some -100.
        mask: [N], with zeros and fractions.
        upstream: [N].
        teacher: [N, V] logits.
    """

    seed: int
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    mask: Tensor
    upstream: Tensor
    teacher: Tensor

    @property
    def vocab_size(self) -> int:
        return self.teacher.shape[1]

    def logits(self) -> Tensor:
        """Return the student's logits [N, V]."""
        return self.hidden @ self.weight[: self.vocab_size].T

    def rounded_to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with hidden and weight exact in `dtype`, still as fp64."""
        return replace(
            self, hidden=self.hidden.to(dtype).double(), weight=self.weight.to(dtype).double()
        )


def make_problem(
    seed: int, *, tokens: int = 40, width: int = 16, vocab_size: int = 90, rows: int = 96
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weight = normal(rows, width) / width**0.25
    weight[vocab_size:] = 50.0
    teacher = 2.0 * normal(tokens, vocab_size)
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    labels[0::5], labels[1::5] = teacher[0::5].argmax(1), teacher[1::5].argmin(1)
    labels[3::7] = -100
    mask = torch.rand(tokens, dtype=torch.float64, generator=generator)
    mask[2::6] = 0.0
    # Fractions that fp32 holds, so that a mask in either type is the same mask.
    return Problem(
        seed,
        normal(tokens, width),
        weight,
        labels,
        (mask * 64).round() / 64,
        normal(tokens),
        teacher,
    )


def extreme_problem(seed: int, *, top_k: int) -> Problem:
    """Return logits of +-1e4 that are multiples of 1/16, so that products in fp32 are exact.

    On half of the tokens the `top_k` ids at +1e4 are the most probable of the teacher: all others
    are 2e4 below the support.
    """
    problem = make_problem(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randint(-4, 5, problem.hidden.shape, generator=generator).double()
    weight = torch.randint(-8, 9, problem.weight.shape, generator=generator).double() / 16
    high = torch.randperm(problem.vocab_size, generator=generator)[:top_k]
    hidden[:, 0], weight[:, 0] = 100.0, -100.0
    weight[high, 0] = 100.0
    hidden[1::4, 0] = -100.0
    teacher = problem.teacher.clone()
    teacher[::2] = teacher[::2].index_fill(1, high, 0.0) + 4.0 * torch.zeros_like(
        teacher[::2]
    ).index_fill(1, high, 2.0)
    return replace(problem, hidden=hidden, weight=weight, teacher=teacher)


def hand_target(
    teacher: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
    ragged: bool = True,
) -> SparseTarget:
    """Return the `top_k` most probable ids of each row of `teacher` [N, V].

    If `ragged`, a third of the rows use fewer slots.
    """
    ids = teacher.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    count = torch.full((teacher.shape[0], 1), top_k)
    if ragged:
        count[::3, 0] = 1 + torch.arange(count[::3].shape[0]) % top_k
    used = torch.arange(top_k) < count
    log_p = teacher.log_softmax(1)
    outside = ~_kept_mask(ids.masked_fill(~used, -1), teacher.shape[1])
    log_tail = (teacher / temperature).log_softmax(1).masked_fill(~outside, -torch.inf).logsumexp(1)
    return SparseTarget(
        ids.masked_fill(~used, -1).int(),
        log_p.gather(1, ids).masked_fill(~used, -torch.inf).to(dtype),
        log_tail.to(dtype),
        -(log_p.exp() * log_p).sum(1).to(dtype),
        temperature,
    )


def _kept_mask(ids: Tensor, vocab_size: int) -> Tensor:
    """Return bool [N, V] of ids [N, K] with -1 for unused slots."""
    is_kept = torch.zeros((ids.shape[0], vocab_size + 1), dtype=torch.bool)
    return is_kept.scatter_(1, torch.where(ids >= 0, ids, vocab_size).long(), True)[:, :vocab_size]


def dense_loss(  # noqa: PLR0913 (the arguments of the public losses)
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    target: SparseTarget,
    *,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
) -> KDLoss:
    """Return the loss over whole rows.

    Only the ids of `target` are used: its numbers are computed again from `teacher` [N, V].
    """
    is_kept = _kept_mask(target.indices, logits.shape[1])
    p_teacher = (teacher / temperature).softmax(1)
    log_p = (logits / temperature).log_softmax(1)
    if tail == "uniform":
        num_others = (~is_kept).sum(1, keepdim=True)
        rest = (p_teacher * ~is_kept).sum(1, keepdim=True) / num_others
        q = torch.where(is_kept, p_teacher, rest)
    else:
        q = p_teacher * is_kept
        q = q / q.sum(1, keepdim=True) if tail == "renormalize" else q
    kd = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - log_p), 0.0).sum(1)
    if tail == "bucket":
        student_log_rest, teacher_rest = (
            log_p.masked_fill(is_kept, -torch.inf).logsumexp(1),
            (p_teacher * ~is_kept).sum(1),
        )
        kd = kd + teacher_rest * (teacher_rest.log() - student_log_rest)
    if temperature_squared:
        kd = kd * temperature**2
    counted = (labels >= 0).double()
    log_softmax = logits.log_softmax(1)
    ce = -log_softmax.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) * counted
    kd = kd * counted
    total = (1 - alpha) * ce + alpha * kd + z_loss * logits.logsumexp(1) ** 2 * counted
    return KDLoss(total, ce, kd)


Loss = Callable[[Tensor, Tensor], KDLoss]


def outcome_of(
    problem: Problem,
    loss: Loss,
    upstream: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    main_grad: bool = False,
) -> Outcome:
    """Run `loss(hidden, weight)` in `dtype` and its backward with `upstream` [N].

    main_grad: give the weight one, as megatron-core's DDP does.
    """
    hidden, weight = (
        t.detach().to(dtype, copy=True).requires_grad_() for t in (problem.hidden, problem.weight)
    )
    if main_grad:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight.main_grad, weight.grad_added_to_main_grad = (
            torch.zeros_like(weight, dtype=wide),
            False,
        )
    result = loss(hidden, weight)
    if main_grad:
        (result.total * upstream.to(result.total.dtype)).sum().backward()
        assert weight.grad_added_to_main_grad
        assert hidden.grad is not None
        return Outcome(*(t.detach().reshape(-1) for t in result), hidden.grad, weight.main_grad)
    (result.total * upstream.to(result.total.dtype).view_as(result.total)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    return Outcome(*(t.detach().reshape(-1) for t in result), hidden.grad, weight.grad)


def oracle_outcome(
    problem: Problem, target: SparseTarget, upstream: Tensor, mask: Tensor | None, **scalars: Any
) -> Outcome:
    """Return the outcome of plain autograd on `dense_loss`, in fp64 over the whole vocabulary."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        result = dense_loss(
            hidden @ weight[: problem.vocab_size].T,
            problem.labels,
            problem.teacher,
            target,
            **scalars,
        )
        return result if mask is None else result._replace(total=result.total * mask)

    return outcome_of(problem, loss, upstream)


def reference_outcome(
    problem: Problem,
    target: SparseTarget | None,
    upstream: Tensor,
    mask: Tensor | None,
    **scalars: Any,
) -> Outcome:
    """Return the outcome of `reference_kd_cross_entropy` in fp64.

    For properties of a target that no dense teacher has.
    """

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        result = reference_kd_cross_entropy(
            hidden @ weight[: problem.vocab_size].T, problem.labels, target, **scalars
        )
        return result if mask is None else result._replace(total=result.total * mask)

    return outcome_of(problem, loss, upstream)


def head_outcome(
    problem: Problem,
    target: SparseTarget | None,
    upstream: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Outcome:
    """Return the outcome of `linear_kd_cross_entropy` in `dtype`."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        return linear_kd_cross_entropy(
            hidden,
            weight,
            problem.labels,
            target,
            loss_mask=mask,
            vocab_size=problem.vocab_size,
            **options,
        )

    return outcome_of(
        problem, loss, upstream, dtype=dtype, main_grad=options.get("schedule") == "direct"
    )


def logits_outcome(
    problem: Problem,
    target: SparseTarget | None,
    upstream: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype = torch.float32,
    **scalars: Any,
) -> Outcome:
    """Return the outcome of `kd_cross_entropy` on logits multiplied in `dtype`."""

    def loss(hidden: Tensor, weight: Tensor) -> KDLoss:
        result = kd_cross_entropy(
            hidden @ weight.T, problem.labels, target, vocab_size=problem.vocab_size, **scalars
        )
        return result if mask is None else result._replace(total=result.total * mask)

    return outcome_of(problem, loss, upstream, dtype=dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of `expected`.

    It is the absolute norm if `expected` is zero, and inf for NaN.
    """
    difference, scale = (
        (actual.double() - expected.double()).norm().item(),
        expected.double().norm().item(),
    )
    return (
        float("inf")
        if difference != difference
        else difference / scale
        if scale > 0
        else difference
    )


def errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    return {
        name: relative_error(getattr(actual, name), getattr(expected, name))
        for name in Outcome._fields
    }


def worst(actual: Outcome, expected: Outcome) -> float:
    return max(errors(actual, expected).values())


# Upstream gradients that a memory strategy can serve: one value for all tokens, or ones; the others
# take any.
UPSTREAM = {"chunk": 0.37, "direct": 1.0}
# Largest relative error by type.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


def upstream_for(schedule: str, upstream: Tensor) -> Tensor:
    return torch.full_like(upstream, UPSTREAM[schedule]) if schedule in UPSTREAM else upstream


def check(actual: Outcome, expected: Outcome, limit: float, seed: int, *case: object) -> None:
    by_name = errors(actual, expected)
    assert max(by_name.values()) < limit, say(seed, *case, by_name)


def say(seed: int, *case: object) -> str:
    """Return the message of a failure: the case, and how to repeat it."""
    return f"{' '.join(map(str, case))} ({SEED_VARIABLE}={seed})"

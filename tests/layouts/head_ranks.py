"""Run the head over a tensor-parallel group. Spawned ranks import this module.

Four ranks are one group of four and, for tensor parallelism of two, two groups of two that do the
same work. Ranks only run and return their results; test_head_ranks.py makes the same cases again
and judges. A collective costs milliseconds here, so each case runs in few chunks and nothing is
gathered for the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses import (
    DenseTeacher,
    KDLoss,
    kd_cross_entropy,
    linear_divergence,
    linear_kd_cross_entropy,
)
from megatron_kd.targets import (
    SparseTarget,
    TopSelection,
    linear_targets,
    select_targets,
)
from tests.layouts.head_cases import (
    CHUNK,
    SIZES,
    DivergenceCase,
    LossCase,
    SelectionCase,
    default_chunks_problem,
    divergence_cases,
    grid_cases,
    in_lines,
    loss_cases,
    problems,
    selection_cases,
)
from tests.losses.cases import Outcome, Problem
from tests.losses.divergence_cases import (
    DIVERGENCES,
)
from tests.losses.divergence_mistakes import divergence_mistakes
from tests.losses.mistakes import loss_mistakes, problem_with, selection_mistakes

COLLECTIVES = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Layout:
    """Describe this rank's place in a tensor-parallel group."""

    group: dist.ProcessGroup
    size: int
    rank: int
    sequence_parallel: bool

    def lines(self, tensor: Tensor) -> Tensor:
        """Return this rank's [S(/tp), B, ...] of a tensor [N, ...]."""
        full = in_lines(tensor)
        return full.chunk(self.size)[self.rank] if self.sequence_parallel else full

    def rows(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a tensor [padded vocabulary, ...]."""
        return tensor.chunk(self.size)[self.rank]

    def leaves(self, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return this rank's hidden states and weight as new tensors that require gradients."""
        hidden, weight = self.lines(problem.hidden), self.rows(problem.weight)
        return hidden.detach().to(dtype, copy=True).requires_grad_(), weight.detach().to(
            dtype, copy=True
        ).requires_grad_()

    def options(self, problem: Problem) -> dict[str, Any]:
        return dict(
            vocab_size=problem.vocab_size,
            tp_group=self.group,
            sequence_parallel=self.sequence_parallel,
            chunk_tokens=CHUNK,
        )


class Findings(NamedTuple):
    """Hold the results of one rank in one layout, in the order of the cases."""

    losses: list[Outcome]  # gradients are this rank's shards
    logits_losses: list[
        tuple[KDLoss, Tensor]
    ]  # with the gradient of this rank's logits; without sequence parallelism only
    targets: list[SparseTarget]
    written_to: list[str]
    identical: KDLoss
    default_chunks: Tensor
    repeats_differ: int
    calls: dict[str, dict[str, int]]
    refusals: list[str]
    divergences: list[Outcome]


def run_everything(rendezvous: str, seed: int, grid: bool = False) -> dict[tuple[int, bool], Any]:
    """Return (tensor-parallel size, sequence_parallel) -> results of this rank.

    All layouts run in one world of four. grid: run `grid_cases` only.
    """
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    torch.manual_seed(seed)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    places: dict[int, tuple[Any, int]] = {
        2: (pairs[rank // 2], rank % 2),
        4: (dist.group.WORLD, rank),
    }
    run = _run_grid if grid else _run_layout
    try:
        return {
            (size, split): run(Layout(places[size][0], size, places[size][1], split), seed)
            for size, split in product(SIZES, (False, True))
        }
    finally:
        dist.destroy_process_group()


def _run_grid(layout: Layout, seed: int) -> list[Outcome]:
    return [run_head(layout, case, []) for case in grid_cases(layout.size, seed)]


def _run_layout(layout: Layout, seed: int) -> Findings:
    losses, divergences = loss_cases(layout.size, seed), divergence_cases(layout.size, seed)
    whole_logits = (
        [] if layout.sequence_parallel else [case for case in losses if case.dtype == torch.float64]
    )
    written_to: list[str] = []
    first_run, second_run = (run_head(layout, losses[0], written_to) for _ in "12")
    return Findings(
        losses=[run_head(layout, case, written_to) for case in losses],
        logits_losses=[_run_logits_loss(layout, case) for case in whole_logits],
        targets=[
            target
            for case in selection_cases(layout.size, seed)
            for target in _run_selection(layout, case, written_to)
        ],
        written_to=written_to,
        identical=_run_identical(layout, seed),
        default_chunks=_run_default_chunks(layout, seed),
        repeats_differ=sum(
            not torch.equal(a, b) for a, b in zip(first_run, second_run, strict=True)
        ),
        calls=_count_all_calls(layout, losses[0], divergences[1]),
        refusals=list(_refusals(layout)),
        divergences=[_run_divergence(layout, case) for case in divergences],
    )


def run_head(layout: Layout, case: LossCase, written_to: list[str]) -> Outcome:
    hidden, weight = layout.leaves(case.problem, case.dtype)
    originals = hidden.detach().clone(), weight.detach().clone()
    if case.schedule == "direct":
        weight.main_grad = torch.zeros_like(weight)
    loss = linear_kd_cross_entropy(
        hidden,
        weight,
        in_lines(case.problem.labels),
        case.target.map(in_lines),
        loss_mask=in_lines(case.problem.mask).to(case.dtype),
        schedule=case.schedule,
        **case.scalars,
        **layout.options(case.problem),
    )
    loss.total.backward(in_lines(case.upstream).to(loss.total.dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    if not torch.equal(hidden, originals[0]) or not torch.equal(weight, originals[1]):
        written_to.append(case.label)
    gradient = weight.main_grad if case.schedule == "direct" else weight.grad
    return Outcome(*(t.detach().flatten() for t in loss), hidden.grad, gradient)


def _run_divergence(layout: Layout, case: DivergenceCase) -> Outcome:
    problem = case.dense.problem
    hidden, weight = layout.leaves(problem, case.dtype)
    teacher = DenseTeacher(
        layout.lines(case.dense.hidden).to(case.dtype),
        layout.rows(case.dense.weight).to(case.dtype),
    )
    loss = linear_divergence(
        hidden,
        weight,
        in_lines(problem.labels),
        teacher if case.target is None else case.target.map(in_lines),
        divergence=DIVERGENCES[case.name],
        loss_mask=in_lines(problem.mask).to(case.dtype),
        schedule=case.schedule,
        **case.scalars,
        **layout.options(problem),
    )
    loss.total.backward(in_lines(case.upstream).to(loss.total.dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(*(t.detach().flatten() for t in loss), hidden.grad, weight.grad)


def _run_logits_loss(layout: Layout, case: LossCase) -> tuple[KDLoss, Tensor]:
    full = case.problem.hidden @ case.problem.weight.T
    shard = layout.rows(full.T).T.contiguous().requires_grad_()
    loss = kd_cross_entropy(
        shard,
        case.problem.labels,
        case.target,
        vocab_size=case.problem.vocab_size,
        tp_group=layout.group,
        **case.scalars,
    )
    loss.total.backward(case.problem.upstream)
    assert shard.grad is not None
    return KDLoss(*(t.detach() for t in loss)), shard.grad


def _run_selection(
    layout: Layout, case: SelectionCase, written_to: list[str]
) -> Iterator[SparseTarget]:
    """Yield targets from hidden states and, in layouts that have all logits, from those."""
    hidden, weight = layout.lines(case.problem.hidden), layout.rows(case.problem.weight)
    shard = layout.rows((case.problem.hidden @ case.problem.weight.T).T).T
    originals = hidden.clone(), weight.clone(), shard.clone()
    yield linear_targets(hidden, weight, case.selection, **layout.options(case.problem)).flatten()
    if not layout.sequence_parallel:
        yield select_targets(
            shard, case.selection, vocab_size=case.problem.vocab_size, tp_group=layout.group
        )
    if not all(torch.equal(a, b) for a, b in zip(originals, (hidden, weight, shard), strict=True)):
        written_to.append(case.label)


def _run_identical(layout: Layout, seed: int) -> KDLoss:
    """Return the loss where teacher and student are the same fp32 model."""
    problem = problems(layout.size, seed)["uneven"]
    hidden, weight = (leaf.detach() for leaf in layout.leaves(problem, torch.float32))
    target = linear_targets(hidden, weight, TopSelection(8, top_p=0.9), **layout.options(problem))
    return linear_kd_cross_entropy(
        hidden,
        weight,
        in_lines(problem.labels),
        target,
        alpha=1.0,
        tail="bucket",
        **layout.options(problem),
    )


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Count the collectives called inside, by name."""
    calls = dict.fromkeys(COLLECTIVES, 0)

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    patches = [patch.object(dist, name, counting(name)) for name in COLLECTIVES]
    for active in patches:
        active.start()
    try:
        yield calls
    finally:
        for active in patches:
            active.stop()


def _count_all_calls(
    layout: Layout, case: LossCase, divergence: DivergenceCase
) -> dict[str, dict[str, int]]:
    cases = {
        schedule: _count_calls(layout, case, schedule)
        for schedule in ("chunk", "save", "recompute")
    }
    with _counted() as cases["dense"]:
        _run_divergence(
            layout,
            divergence._replace(
                target=None, schedule="chunk", upstream=torch.ones_like(divergence.upstream)
            ),
        )
    return cases


def _run_default_chunks(layout: Layout, seed: int) -> Tensor:
    """Return total [N] without chunk_tokens.

    In these sizes, ranks that used their own number of rows would cut the tokens differently.
    """
    problem = default_chunks_problem(layout.size, seed)
    options = {**layout.options(problem), "chunk_tokens": None}
    hidden = (
        problem.hidden.float().chunk(layout.size)[layout.rank]
        if layout.sequence_parallel
        else problem.hidden.float()
    )
    hidden, weight = (
        hidden.clone().requires_grad_(),
        layout.rows(problem.weight).float().requires_grad_(),
    )
    chunk_logits = 80 * -(-problem.vocab_size // layout.size)
    with (
        patch("megatron_kd.head.sizes.CHUNK_LOGITS_CPU", chunk_logits),
        patch("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 100 * 23),
    ):
        target = linear_targets(hidden, weight, TopSelection(8), **options)
        loss = linear_kd_cross_entropy(
            hidden, weight, problem.labels, target, alpha=0.5, tail="bucket", **options
        )
        loss.total.sum().backward()
    return loss.total.detach()


def _count_calls(layout: Layout, case: LossCase, schedule: str) -> dict[str, int]:
    with _counted() as calls:
        run_head(
            layout, case._replace(schedule=schedule, upstream=torch.ones_like(case.upstream)), []
        )
    return calls


def _refusals(layout: Layout) -> Iterator[str]:
    """Yield the mistakes that were not refused, or only after a collective.

    Every rank must refuse by itself before it sends anything, so that no rank is left waiting.
    """
    for make in (loss_mistakes, selection_mistakes, divergence_mistakes):
        mistakes = make(layout.group, sequence_parallel=layout.sequence_parallel)
        assert len(mistakes) > 10
        for mistake in mistakes:
            with _counted() as calls:
                problem = problem_with(mistake)
            if problem is not None or sum(calls.values()):
                yield f"{mistake.name}: {problem}, {calls}"

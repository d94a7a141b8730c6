"""One optimizer update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.batches import Microbatch
from megatron_kd.losses.objective import Objective
from megatron_kd.models.gpt_model import output_weight
from megatron_kd.targets import Target
from megatron_kd.telemetry.metrics import reduce_reports
from megatron_kd.train.build import Run
from megatron_kd.train.capture import Observe, nothing
from megatron_kd.train.hidden_state_loss import Through, forward


@dataclass(frozen=True)
class StepReport:
    """metrics: means over the step's unmasked tokens, equal on every rank (None: not measured). updated: False where the
    loss or the gradient norm was not finite and the weights stayed as they were.
    """

    metrics: dict[str, float | None]
    grad_norm: float
    learning_rate: float
    alpha: float
    updated: bool


def train_step(run: Run) -> StepReport:
    """Advance the student by one optimizer update over one global batch. Collective over the world."""
    learning_rate, alpha, watchdog = run.learning_rate, run.alpha, run.groups.watchdog
    watchdog.step = run.progress.step + 1
    watchdog.enter_phase("reading data")
    run.times.begin()
    microbatches = run.train_data.microbatches(run.progress.consumed_samples)
    run.times.has_data()
    watchdog.enter_phase("running the teacher")
    targets = run.teacher.targets(microbatches)
    through = run.hidden_states.through(microbatches)
    watchdog.enter_phase("running the student")
    run.student.zero_grad()
    run.optimizer.zero_grad()
    objective = run.objective_now(microbatches, targets)
    step = partial(
        forward_step,
        objective=objective,
        observe=run.capture.observer(run.progress.step),
        through=through,
    )
    reports = run.student.run_schedule(step, list(zip(microbatches, targets, strict=True)))
    metrics = reduce_step(run, reports)
    watchdog.enter_phase("updating the weights")
    run.optimizer.set_learning_rate(learning_rate)
    updated, grad_norm = run.optimizer.step(allowed=math.isfinite(metrics["total_loss"] or 0.0))
    batch = run.config.batch
    run.progress.advance(
        samples=batch.global_batch_size,
        tokens=batch.global_batch_size * batch.sequence_length,
        updated=updated,
    )
    run.capture.end_step()
    return StepReport(metrics, grad_norm, learning_rate, alpha, updated)


def forward_step(
    batches: Iterator[tuple[Microbatch, Target | None]],
    chunk: Any,
    *,
    objective: Objective,
    observe: Observe = nothing,
    through: Through = forward,
) -> tuple[Tensor, Any]:
    """Forward of the next microbatch through one chunk, and what its output is worth: megatron-core's forward step."""
    microbatch, target = next(batches)
    output = through(chunk, microbatch)
    return output, partial(
        _loss,
        chunk=chunk,
        microbatch=microbatch,
        target=target,
        objective=objective,
        observe=observe,
    )


def _loss(
    hidden: Tensor,
    *,
    chunk: Any,
    microbatch: Microbatch,
    target: Target | None,
    objective: Objective,
    observe: Observe,
) -> Any:
    weight = output_weight(chunk.module)
    observe(hidden, weight, microbatch)
    return objective(
        hidden,
        weight=weight,
        labels=microbatch.labels,
        loss_mask=microbatch.loss_mask,
        target=target,
    )


def reduce_step(run: Run, reports: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Sums and counts of every rank in one all-reduce over the world, divided once."""
    groups = run.groups
    world = dist.group.WORLD if groups.world_size > 1 else None
    mine = [*(reports if groups.reports_loss else ()), *run.hidden_states.take_reports()]
    return reduce_reports(mine, contribute=True, group=world, device=groups.platform.device)

"""Make one optimizer update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from megatron_kd.train.capture import Capture, NoCapture
from megatron_kd.train.forward import StudentInput
from megatron_kd.train.hidden_states.hidden_state_loss import HiddenStates, NoHiddenStates


@dataclass(frozen=True)
class StepReport:
    """Report what a step did.

    Attributes:
        metrics: means over the step's unmasked tokens, equal on every rank; None: not measured.
        grad_norm: norm of the gradient before clipping.
        learning_rate: of this update.
        alpha: weight of the distillation loss in this step.
        updated: False if the loss or the gradient norm was not finite and the weights stayed as
            they were.
    """

    metrics: dict[str, float | None]
    grad_norm: float
    learning_rate: float
    alpha: float
    updated: bool


def train_step(run: Run) -> StepReport:
    """Advance the student by one optimizer update over one global batch.

    Collective over the world.
    """
    step, learning_rate, alpha = run.progress.step, run.learning_rate, run.alpha
    watchdog, batch = run.groups.watchdog, run.config.batch
    watchdog.step = step + 1
    watchdog.enter_phase("reading data")
    run.times.begin()
    microbatches = run.train_data.microbatches(run.progress.consumed_samples)
    run.teacher.wait_for_prefetch(step)
    run.times.has_data()
    watchdog.enter_phase("running the teacher")
    targets = run.teacher.targets(microbatches, step=step)
    inputs = student_inputs(run, microbatches, targets)
    run.teacher.prefetch(run.train_data.upcoming(), step=step + 1)
    watchdog.enter_phase("running the student")
    run.student.zero_grad()
    run.optimizer.zero_grad()
    run.capture.begin_step(step)
    forward = partial(
        forward_step,
        objective=run.objective_of_step(microbatches, targets),
        hidden_states=run.hidden_states,
        capture=run.capture,
    )
    reports = run.student.run_pipeline(forward, inputs)
    metrics = reduce_step(run, reports)
    watchdog.enter_phase("updating the weights")
    run.optimizer.set_learning_rate(learning_rate)
    updated, grad_norm = run.optimizer.step(allowed=math.isfinite(metrics["total_loss"] or 0.0))
    samples = batch.global_batch_size
    run.progress.advance(samples=samples, tokens=samples * batch.sequence_length, updated=updated)
    run.capture.end_step()
    return StepReport(metrics, grad_norm, learning_rate, alpha, updated)


def student_inputs(
    run: Run, microbatches: Sequence[Microbatch], targets: Sequence[Target | None]
) -> list[StudentInput]:
    """Combine microbatches with their targets and the teacher's layer outputs.

    Args:
        run: the run.
        microbatches: of one step.
        targets: of each microbatch.

    Collectives:
        Over the pipeline group, if hidden states are compared across stages.
    """
    layers = run.hidden_states.teacher_layers(microbatches)
    return [StudentInput(*parts) for parts in zip(microbatches, targets, layers, strict=True)]


def forward_step(
    inputs: Iterator[StudentInput],
    chunk: Any,
    *,
    objective: Objective,
    hidden_states: HiddenStates | None = None,
    capture: Capture | None = None,
) -> tuple[Tensor, Any]:
    """Run the next microbatch through one chunk: megatron-core's forward step.

    Args:
        inputs: the chunk's microbatches.
        chunk: DDP-wrapped chunk of the student.
        objective: the loss.
        hidden_states: adds losses of hidden states; None: none.
        capture: stores the student's targets; None: does not.

    Returns:
        The chunk's output, and a function that turns the last stage's into its loss.
    """
    item = next(inputs)
    output = (hidden_states or NoHiddenStates()).forward(chunk, item)
    capture = capture or NoCapture()
    return output, partial(_loss, chunk=chunk, item=item, objective=objective, capture=capture)


def _loss(
    hidden: Tensor, *, chunk: Any, item: StudentInput, objective: Objective, capture: Capture
) -> Any:
    weight = output_weight(chunk.module)
    capture.add(hidden, weight, item.microbatch)
    return objective(
        hidden,
        weight=weight,
        labels=item.microbatch.labels,
        loss_mask=item.microbatch.loss_mask,
        target=item.target,
    )


def reduce_step(run: Run, reports: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Return the metrics of a step: sums and counts of every rank, divided once.

    Collectives:
        One all-reduce over the world.
    """
    groups = run.groups
    world = dist.group.WORLD if groups.world_size > 1 else None
    local = [*(reports if groups.reports_loss else ()), *run.hidden_states.take_reports()]
    return reduce_reports(local, contribute=True, group=world, device=groups.platform.device)

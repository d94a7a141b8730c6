"""Measure losses on held-out data, in any layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from megatron_kd.data.batches import BatchSource
from megatron_kd.losses.objective import Objective
from megatron_kd.train.build import Run
from megatron_kd.train.step import forward_step, reduce_step, student_inputs


def evaluate(run: Run) -> dict[str, dict[str, float | None]]:
    """Return the means over each validation set: name -> metrics, as in StepReport.

    The distillation loss is measured with the run's own teacher and settings, on every token and
    at distill.temperature alike; it is None without a teacher. No gradient; collective over the
    world.
    """
    # alpha must not leave a term out of the report, and one that is 0 in this step must not need a
    # target.
    alpha = 0.5 if run.config.teacher.enabled else 0.0
    objective = replace(run.objective, spec=replace(run.objective.spec, alpha=alpha), rules=())
    run.student.train(False)
    metrics = {}
    for name, source in run.valid_data.items():
        reports = []
        for index in range(source.num_batches):
            run.groups.watchdog.enter_phase(f"evaluating on {name}")
            reports += _evaluate_batch(run, source, index, objective)
        metrics[name] = reduce_step(run, reports)
    run.student.train(True)
    return metrics


def _evaluate_batch(
    run: Run, source: BatchSource, index: int, objective: Objective
) -> list[dict[str, Tensor]]:
    """Return the last stage's reports of one global batch."""
    microbatches = source.microbatches(index * run.config.batch.global_batch_size)
    targets = run.teacher.targets(microbatches)
    inputs = student_inputs(run, microbatches, targets)
    forward = partial(forward_step, objective=objective, hidden_states=run.hidden_states)
    return run.student.run_pipeline(forward, inputs, forward_only=True)

"""Losses on held-out data, in any layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron_kd.train.build import Run
from megatron_kd.train.step import forward_step, reduce_step


def evaluate(run: Run) -> dict[str, dict[str, float | None]]:
    """Means over each validation set: split -> metrics, as in StepReport. No gradient; collective over the world.

    The distillation loss is measured with the run's own teacher and settings, on every token and at distill.temperature alike; it is
    None without a teacher.
    """
    # alpha must not leave a term out of the report, and one that is 0 in this step must not need a target.
    alpha = 0.5 if run.config.teacher.enabled else 0.0
    objective = replace(run.objective, spec=replace(run.objective.spec, alpha=alpha), rules=())
    run.student.train(False)
    found = {}
    for split, source in run.valid_data.items():
        reports = []
        for index in range(source.num_batches):
            run.groups.watchdog.enter_phase(f"evaluating on {split}")
            microbatches = source.microbatches(index * run.config.batch.global_batch_size)
            targets = run.teacher.targets(microbatches)
            through = run.hidden_states.through(microbatches)
            pairs = list(zip(microbatches, targets, strict=True))
            reports += run.student.run_schedule(
                partial(forward_step, objective=objective, through=through),
                pairs,
                forward_only=True,
            )
        found[split] = reduce_step(run, reports)
    run.student.train(True)
    return found

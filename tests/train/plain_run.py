"""Run the engine for the comparison with plain torch. Spawned ranks import this module."""

from __future__ import annotations

from typing import Any

from megatron_kd.config import RunConfig
from tests.helpers.tiny import full_weights


def engine_steps(rendezvous: str, config: RunConfig, steps: int) -> dict[str, Any]:
    """Train `steps` steps and return everything that plain torch needs to repeat them.

    Returns:
        "before", "after": full weights by name. For each step: "batches", (tokens, labels, mask)
        of each microbatch; "targets", of each microbatch; "learning_rates"; "records", metrics.
    """
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    run = build_run(config, rendezvous=rendezvous)
    result: dict[str, Any] = {
        "before": full_weights(run.student.models),
        "batches": [],
        "targets": [],
        "records": [],
        "learning_rates": [],
    }
    for _ in range(steps):
        microbatches = run.train_data.microbatches(run.progress.consumed_samples)
        result["batches"].append([(m.tokens, m.labels, m.loss_mask) for m in microbatches])
        result["targets"].append(run.teacher.targets(microbatches))
        result["learning_rates"].append(run.learning_rate)
        report = train_step(run)
        result["records"].append({**report.metrics, "grad_norm": report.grad_norm})
    result["after"] = full_weights(run.student.models)
    return result

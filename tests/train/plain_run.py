"""The engine's side of the comparison with plain torch, in a process of its own."""

from __future__ import annotations

from typing import Any

from megatron_kd.config import RunConfig
from tests.helpers.tiny import full_weights


def engine_steps(rendezvous: str, config: RunConfig, steps: int) -> dict[str, Any]:
    """Initial weights, each step's data, targets and metrics, and the weights after `steps` updates."""
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    run = build_run(config, rendezvous=rendezvous)
    found: dict[str, Any] = {
        "before": full_weights(run.student.models),
        "batches": [],
        "targets": [],
        "rows": [],
        "learning_rates": [],
    }
    for _ in range(steps):
        microbatches = run.train_data.microbatches(run.progress.consumed_samples)
        found["batches"].append([(m.tokens, m.labels, m.loss_mask) for m in microbatches])
        found["targets"].append(run.teacher.targets(microbatches))
        found["learning_rates"].append(run.learning_rate)
        report = train_step(run)
        found["rows"].append({**report.metrics, "grad_norm": report.grad_norm})
    found["after"] = full_weights(run.student.models)
    return found

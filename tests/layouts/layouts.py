"""Train the runs that the layout tests compare. Spawned ranks import this module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_kd.config import RunConfig
from tests.helpers.tiny import full_weights


@dataclass
class Trained:
    """Hold the results of a run.

    Attributes:
        records: Metrics of each step.
        weights: Full weights by name.
        validation: Metrics of each validation set.
    """

    records: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    validation: dict[str, dict[str, float | None]]


def run_all(rendezvous: str, jobs: list[tuple[RunConfig, int, bool]]) -> list[Trained]:
    """Train each (config, last step, save then) in one world. Existing checkpoints are resumed."""
    from megatron_kd.parallel.groups import seed_step, stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.step import train_step

    results = []
    for number, (config, stop, save) in enumerate(jobs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        records = []
        while run.progress.step < stop:
            seed_step(config.train.seed, run.progress.step, run.groups)
            report = train_step(run)
            records.append(
                {
                    **report.metrics,
                    "step": run.progress.step,
                    "grad_norm": report.grad_norm,
                    "updated": report.updated,
                }
            )
        if save:
            run.save()
        results.append(Trained(records, full_weights(run.student.models), evaluate(run)))
        run.capture.close()
        # Each group keeps threads. Those of thirty layouts would compete for the cores.
        stop_groups()
    return results


def worst_loss(one: Trained, other: Trained) -> float:
    """Return the largest difference of losses over common steps, relative to the total loss."""
    others = {record["step"]: record for record in other.records}
    names = [
        name for name in ("total_loss", "ce_loss", "kd_loss") if one.records[0][name] is not None
    ]
    return max(
        abs(record[name] - others[record["step"]][name]) / others[record["step"]]["total_loss"]
        for record in one.records
        for name in names
    )


def worst_weight(one: Trained, other: Trained) -> float:
    """Return the largest difference of weights. NaN, as in a missing shard, is infinite."""
    assert one.weights.keys() == other.weights.keys()
    worst = max(float((one.weights[key] - other.weights[key]).abs().max()) for key in one.weights)
    return worst if worst == worst else float("inf")

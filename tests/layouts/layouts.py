"""Runs that the layout tests compare. A module of its own, because spawned ranks import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_kd.config import RunConfig
from tests.helpers.tiny import full_weights


@dataclass
class Trained:
    """What a run gave: metrics of each step, whole weights by name, and an evaluation where there is validation data."""

    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    validation: dict[str, dict[str, float | None]]


def run_all(rendezvous: str, jobs: list[tuple[RunConfig, int, bool]]) -> list[Trained]:
    """Each (config, stop after this step, save there) in turn in one world; a directory with a checkpoint is resumed."""
    from megatron_kd.parallel.groups import seed_step, stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.step import train_step

    found = []
    for number, (config, stop, save) in enumerate(jobs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        rows = []
        while run.progress.step < stop:
            seed_step(config.train.seed, run.progress.step, run.groups)
            report = train_step(run)
            rows.append(
                {
                    **report.metrics,
                    "step": run.progress.step,
                    "grad_norm": report.grad_norm,
                    "updated": report.updated,
                }
            )
        if save:
            run.save()
        found.append(Trained(rows, full_weights(run.student.models), evaluate(run)))
        run.capture.close()
        # All of them: every group keeps threads, and those of thirty layouts would fight for the cores.
        stop_groups()
    return found


def worst_loss(one: Trained, other: Trained) -> float:
    """Largest difference of the two runs' losses over the steps that both made, relative to the step's total loss."""
    theirs = {row["step"]: row for row in other.rows}
    names = [name for name in ("total_loss", "ce_loss", "kd_loss") if one.rows[0][name] is not None]
    return max(
        abs(row[name] - theirs[row["step"]][name]) / theirs[row["step"]]["total_loss"]
        for row in one.rows
        for name in names
    )


def worst_weight(one: Trained, other: Trained) -> float:
    """Largest absolute difference of any weight; NaN (a hole in a shard) counts as infinite."""
    assert one.weights.keys() == other.weights.keys()
    worst = max(float((one.weights[key] - other.weights[key]).abs().max()) for key in one.weights)
    return worst if worst == worst else float("inf")

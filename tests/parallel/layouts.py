"""Runs that the layout tests compare. A module of its own, because spawned ranks import it."""

from __future__ import annotations

from typing import Any

from tests.helpers.tiny import full_weights


def run_all(rendezvous: str, configs: list[Any]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Each config in turn in one world: (metrics of every step, final weights)."""
    from megatron_kd.parallel.groups import seed_step, stop_model_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    found = []
    for config in configs:
        run = build_run(config, rendezvous=rendezvous)
        rows = []
        while run.progress.step < config.train.steps:
            seed_step(config.train.seed, run.progress.step, run.groups)
            report = train_step(run)
            rows.append({**report.metrics, "grad_norm": report.grad_norm, "updated": report.updated})
        if config.checkpoint.interval:
            run.save()
        found.append((rows, full_weights(run.student.models)))
        stop_model_groups()
    return found

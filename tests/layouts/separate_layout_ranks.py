"""Train with a teacher in a separate layout. Spawned ranks import this module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_kd.config import RunConfig


@dataclass
class TeacherRun:
    """Hold the teacher's targets of the first step on this rank, and the metrics of the run.

    Attributes:
        targets: Sample -> the tensors of its target, [S, ...] each, as this rank received them.
        expected: Samples that this rank trains on in the first step.
        sent: Bytes sent to other ranks for the targets of the first step.
        records: Metrics of each step.
    """

    targets: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    expected: set[int] = field(default_factory=set)
    sent: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class OverlapRun:
    """Hold the numbers of a run, and how its teacher was placed.

    Attributes:
        prefetches: The teacher computes the targets of the next step during this one.
        reversed_stages: The teacher's pipeline stages are in reverse order of ranks.
        numbers: Losses and gradient norm of every step, and the losses of a validation.
    """

    prefetches: bool
    reversed_stages: bool
    numbers: list[float]


def train_all(rendezvous: str, configs: list[RunConfig], steps: int) -> list[TeacherRun]:
    """Collect the first step's targets of each run, then train it; all in one world."""
    from megatron_kd.parallel.groups import seed_step, stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    results = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        result = first_targets(run)
        while run.progress.step < steps:
            seed_step(config.train.seed, run.progress.step, run.groups)
            result.records.append({**train_step(run).metrics, "step": run.progress.step})
        stop_groups()
        results.append(result)
    return results


def request_unevenly(
    rendezvous: str, config: RunConfig, counts: list[list[int]]
) -> list[TeacherRun]:
    """Request targets of different numbers of microbatches on each replica, as a cache may.

    Args:
        rendezvous: Name of the world.
        config: Run whose first microbatches are requested.
        counts: Number of microbatches of each data-parallel rank, one list for each request.

    Returns:
        What this rank received for each request.
    """
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run

    run = build_run(config, rendezvous=rendezvous)
    run.teacher.equal_counts = False
    results = [first_targets(run, by_replica[run.groups.data_rank]) for by_replica in counts]
    stop_groups()
    return results


def first_targets(run: Any, count: int | None = None) -> TeacherRun:
    """Return the targets of the first step's first `count` microbatches, and the bytes sent."""
    from megatron_kd.targets import SparseTarget
    from megatron_kd.teacher.runtime import separate_layout

    result, exchange = TeacherRun(), separate_layout.exchange

    def exchange_and_count(
        sends: dict[int, torch.Tensor], sizes: dict[int, int], *, like: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        result.sent += sum(
            tensor.numel() * tensor.element_size()
            for rank, tensor in sends.items()
            if rank != run.groups.rank
        )
        return exchange(sends, sizes, like=like)

    separate_layout.exchange = exchange_and_count
    try:
        microbatches = run.train_data.microbatches(0)[:count]
        targets = run.teacher.targets(microbatches)
    finally:
        separate_layout.exchange = exchange
    for microbatch, target in zip(microbatches, targets, strict=True):
        samples = microbatch.sample_ids.tolist()
        result.expected |= set(samples) if run.groups.is_last_stage else set()
        if isinstance(target, SparseTarget):
            for index, sample in enumerate(samples):
                result.targets[sample] = [tensor[:, index].clone() for tensor in target.tensors()]
    return result


def train_with_overlap(rendezvous: str, configs: list[RunConfig], steps: int) -> list[OverlapRun]:
    """Train each run in one world, with a validation after the second step."""
    from megatron_kd.parallel.groups import seed_step, stop_groups
    from megatron_kd.teacher.runtime.drain import DrainTeacher
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.step import train_step

    results = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        prefetches = isinstance(run.teacher, DrainTeacher)
        inner = run.teacher.model if prefetches else run.teacher
        reversed_stages = getattr(inner, "groups", run.groups).reversed_stages
        numbers = []
        while run.progress.step < steps:
            seed_step(config.train.seed, run.progress.step, run.groups)
            report = train_step(run)
            numbers += [report.metrics["total_loss"], report.metrics["kd_loss"], report.grad_norm]
            if run.progress.step == 2:
                numbers += [metrics["kd_loss"] for metrics in evaluate(run).values()]
        stop_groups()
        results.append(OverlapRun(prefetches, reversed_stages, numbers))
    return results

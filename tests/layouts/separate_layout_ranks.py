"""What the tests of a teacher's own layout run on each rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_kd.config import RunConfig


@dataclass
class Asked:
    """targets: sample -> its numbers [S, ...], as this rank got them in the first step; expected: the samples it trains on in it;
    sent: bytes to other ranks in it. records: metrics of each step.
    """

    targets: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    expected: set[int] = field(default_factory=set)
    sent: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)


def ask_all(rendezvous: str, configs: list[RunConfig], steps: int) -> list[Asked]:
    """Each run in turn in one world: the first step's targets, then `steps` steps."""
    from megatron_kd.parallel.groups import seed_step, stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    found = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        asked = first_targets(run)
        while run.progress.step < steps:
            seed_step(config.train.seed, run.progress.step, run.groups)
            asked.records.append({**train_step(run).metrics, "step": run.progress.step})
        stop_groups()
        found.append(asked)
    return found


def ask_unevenly(rendezvous: str, config: RunConfig, counts: list[list[int]]) -> list[Asked]:
    """What replicas get who ask for other numbers of microbatches, as where a cache lacks some: counts[time][replica]."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run

    run = build_run(config, rendezvous=rendezvous)
    run.teacher.equal_counts = False
    found = [first_targets(run, each[run.groups.data_rank]) for each in counts]
    stop_groups()
    return found


def first_targets(run: Any, count: int | None = None) -> Asked:
    """The targets of the first step (of its first `count` microbatches), and what was sent for them."""
    from megatron_kd.targets import SparseTarget
    from megatron_kd.teacher.runtime import separate_layout as own_layout

    asked, exchange = Asked(), own_layout.exchange

    def counted(
        sends: dict[int, torch.Tensor], sizes: dict[int, int], *, like: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        asked.sent += sum(
            tensor.numel() * tensor.element_size()
            for rank, tensor in sends.items()
            if rank != run.groups.rank
        )
        return exchange(sends, sizes, like=like)

    own_layout.exchange = counted
    try:
        microbatches = run.train_data.microbatches(0)[:count]
        targets = run.teacher.targets(microbatches)
    finally:
        own_layout.exchange = exchange
    for microbatch, target in zip(microbatches, targets, strict=True):
        asked.expected |= set(microbatch.sample_ids.tolist()) if run.groups.is_last_stage else set()
        if isinstance(target, SparseTarget):
            for place, sample in enumerate(microbatch.sample_ids.tolist()):
                asked.targets[sample] = [tensor[:, place].clone() for tensor in target.tensors()]
    return asked


def run_ahead(
    rendezvous: str, configs: list[RunConfig], steps: int
) -> list[tuple[bool, bool, list[float]]]:
    """Each run in turn in one world: whether its teacher runs ahead, whether with its stages reversed, and every step's numbers."""
    from megatron_kd.parallel.groups import seed_step, stop_groups
    from megatron_kd.teacher.runtime.drain import DrainTeacher
    from megatron_kd.train.build import build_run
    from megatron_kd.train.evaluate import evaluate
    from megatron_kd.train.step import train_step

    found = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        ahead = isinstance(run.teacher, DrainTeacher)
        inner = run.teacher.model if ahead else run.teacher
        reversed_stages = getattr(inner, "groups", run.groups).reversed_stages
        numbers = []
        while run.progress.step < steps:
            seed_step(config.train.seed, run.progress.step, run.groups)
            report = train_step(run)
            numbers += [report.metrics["total_loss"], report.metrics["kd_loss"], report.grad_norm]
            if run.progress.step == 2:
                numbers += [each["kd_loss"] for each in evaluate(run).values()]
        stop_groups()
        found.append((ahead, reversed_stages, numbers))
    return found

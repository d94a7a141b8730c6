"""Train runs that compare hidden states. Spawned ranks import this module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_kd.config import RunConfig
from megatron_kd.data.batches import BatchSource, Microbatch
from tests.layouts.layouts import Trained, run_all
from tests.train.plain_run import engine_steps


@dataclass
class RankResult:
    """Hold the results of all jobs on one rank.

    Attributes:
        trained: Result of each job.
        sent: For each job, the bytes of hidden states that this rank sent to others; None where
            it did not take part in an exchange.
        steps: Results of `engine_steps`.
    """

    trained: list[Trained] = field(default_factory=list)
    sent: list[int | None] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)


def run_masked(
    rendezvous: str,
    jobs: list[tuple[RunConfig, int, bool]],
    repeated: list[tuple[RunConfig, int]] | None = None,
) -> RankResult:
    """Call `run_all`, then `engine_steps`, with every third id masked out of the loss.

    Args:
        rendezvous: Name of the world.
        jobs: Jobs of `run_all`.
        repeated: Runs and their numbers of steps for `engine_steps`.
    """
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.hidden_states import layer_exchange

    read_microbatches, exchange = BatchSource.microbatches, layer_exchange.exchange
    result = RankResult()

    def exchange_and_count(sends: dict[int, torch.Tensor], *rest: Any, **options: Any) -> Any:
        own_rank = torch.distributed.get_rank(options["group"])
        result.sent[-1] = (result.sent[-1] or 0) + sum(
            tensor.numel() * tensor.element_size()
            for rank, tensor in sends.items()
            if rank != own_rank
        )
        return exchange(sends, *rest, **options)

    def masked_microbatches(source: BatchSource, consumed_samples: int) -> list[Microbatch]:
        return [_mask(microbatch) for microbatch in read_microbatches(source, consumed_samples)]

    BatchSource.microbatches = masked_microbatches  # type: ignore[method-assign]
    layer_exchange.exchange = exchange_and_count
    for number, job in enumerate(jobs):
        result.sent.append(None)
        result.trained += run_all(f"{rendezvous}-{number}", [job])
    for number, (config, steps) in enumerate(repeated or []):
        result.steps.append(engine_steps(f"{rendezvous}-repeated{number}", config, steps))
        stop_groups()
    return result


def _mask(microbatch: Microbatch) -> Microbatch:
    mask = microbatch.loss_mask * (microbatch.labels % 3 != 0)
    return replace(microbatch, loss_mask=mask, labels=microbatch.labels.where(mask > 0, -100))

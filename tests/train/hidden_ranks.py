"""What the tests of hidden states run on each rank. A module of its own, because spawned ranks import it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_kd.config import RunConfig
from megatron_kd.data.batches import BatchSource, Microbatch
from tests.layouts.layouts import Trained, run_all
from tests.train.plain_run import engine_steps


@dataclass
class Ran:
    """trained: of each job; sent: bytes that this rank sent to others for hidden states in each job, None where it did not even
    meet them; steps: `engine_steps` of jobs.
    """

    trained: list[Trained] = field(default_factory=list)
    sent: list[int | None] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)


def run_masked(
    rendezvous: str,
    jobs: list[tuple[RunConfig, int, bool]],
    stepped: list[tuple[RunConfig, int]] | None = None,
) -> Ran:
    """`run_all`, then `engine_steps`, on data where every third id takes no part in the loss."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.hidden_states import layer_exchange

    whole, exchange, ran = BatchSource.microbatches, layer_exchange.exchange, Ran()

    def counted(sends: dict[int, torch.Tensor], *rest: Any, **named: Any) -> Any:
        here = torch.distributed.get_rank(named["group"])
        ran.sent[-1] = (ran.sent[-1] or 0) + sum(
            tensor.numel() * tensor.element_size() for rank, tensor in sends.items() if rank != here
        )
        return exchange(sends, *rest, **named)

    BatchSource.microbatches = lambda self, *where: [_mask(each) for each in whole(self, *where)]  # type: ignore[method-assign]
    layer_exchange.exchange = counted
    for number, job in enumerate(jobs):
        ran.sent.append(None)
        ran.trained += run_all(f"{rendezvous}-{number}", [job])
    for number, (config, steps) in enumerate(stepped or []):
        ran.steps.append(engine_steps(f"{rendezvous}-stepped{number}", config, steps))
        stop_groups()
    return ran


def _mask(microbatch: Microbatch) -> Microbatch:
    mask = microbatch.loss_mask * (microbatch.labels % 3 != 0)
    return replace(microbatch, loss_mask=mask, labels=microbatch.labels.where(mask > 0, -100))

"""What a long run looks at besides its loss: a loss that jumps, ranks that are slower than the others, samples that come late."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from megatron_kd.parallel.collectives import all_gather
from megatron_kd.parallel.groups import Groups

WINDOW, ENOUGH, STALLED_ROWS = 100, 20, 10


class LossSpikeError(RuntimeError):
    """The loss jumped and the policy says stop; the step that made it has been taken, the last checkpoint is from before."""


class SpikeGuard:
    """Compares each step's loss with the median of the last 100 steps without a spike; silent for the first 20 after a start.

    limit: nats above the median; None looks at nothing. stops: raise LossSpikeError, else only say so. The loss is the same on every
    rank, and so is the verdict.
    """

    def __init__(self, limit: float | None, *, stops: bool) -> None:
        self._limit, self._stops = limit, stops
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, loss: float | None) -> str | None:
        """A sentence about a spike in this step, None where there is none. LossSpikeError where the policy says stop."""
        if self._limit is None or loss is None or loss != loss:
            return None
        usual = statistics.median(self._losses) if len(self._losses) >= ENOUGH else None
        if usual is None or loss <= usual + self._limit:
            self._losses.append(loss)
            return None
        found = (
            f"step {step}: total_loss {loss:.4f} is {loss - usual:.2f} nats above the median of the {len(self._losses)} steps before "
            f"(train.loss_spike = {self._limit})"
        )
        if self._stops:
            raise LossSpikeError(
                f"{found}: look at the samples of this step, or start again from the last checkpoint with a lower learning rate"
            )
        return found


class DataGuard:
    """Says so once when, row after row, a step waits for its samples for more than half of its time; and again after it was well."""

    def __init__(self) -> None:
        self._rows = 0

    def look(self, step: int, times: Mapping[str, float | int]) -> str | None:
        """times: `RankTimes.spread`. A sentence at the tenth such row, else None."""
        self._rows = (
            self._rows + 1 if times["data_seconds"] > times["slowest_rank_seconds"] / 2 else 0
        )
        if self._rows != STALLED_ROWS:
            return None
        return (
            f"step {step}: {times['data_seconds']:.2f} of {times['slowest_rank_seconds']:.2f} s are spent waiting for samples, for "
            f"{STALLED_ROWS} rows now: is the disk with data.train or teacher.cache slow?"
        )


class RankTimes:
    """How long this rank took from the start of a step until its part of the pipeline was done, gradients not yet reduced.

    Data-parallel replicas wait for each other only after that, so a slow one stands out. On a GPU in the order of its stream: nothing
    waits for the measurement.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._data_seconds = 0.0
        self._marks: list[Any] = []

    def begin(self) -> None:
        """A step begins."""
        self._marks = [self._now()]
        self._data_seconds = -time.perf_counter()

    def has_data(self) -> None:
        """The step's samples are here."""
        self._data_seconds += time.perf_counter()

    def drained(self) -> None:
        """This rank's part of the pipeline is done."""
        self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._groups.platform.is_cuda:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def spread(self) -> dict[str, float | int]:
        """Of the last step, over all ranks: median and slowest seconds, who that was, and the longest wait for data.

        Call it when the step's metrics have reached the host. One all-gather of two numbers over the world.
        """
        start, stop = self._marks[0], self._marks[-1]
        seconds = start.elapsed_time(stop) / 1000 if self._groups.platform.is_cuda else stop - start
        device = self._groups.platform.device
        mine = torch.tensor([[seconds, self._data_seconds]], dtype=torch.float64, device=device)
        world = torch.distributed.group.WORLD if self._groups.world_size > 1 else None
        times, data = all_gather(mine, world).view(-1, 2).T.tolist()
        return {
            "rank_seconds": statistics.median(times),
            "slowest_rank_seconds": max(times),
            "slowest_rank": times.index(max(times)),
            "data_seconds": max(data),
        }

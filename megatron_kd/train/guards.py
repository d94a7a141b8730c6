"""Watch a long run for loss spikes, slow ranks and slow data loading."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from megatron_kd.parallel.collectives import all_gather
from megatron_kd.parallel.groups import Groups

_WINDOW_STEPS, _MIN_STEPS, _SLOW_RECORDS = 100, 20, 10


class LossSpikeError(RuntimeError):
    """Report that the loss jumped and the policy is to stop.

    The step with the spike was applied. The last checkpoint is from before it.
    """


class SpikeGuard:
    """Compare each step's loss with the median of the last 100 steps without a spike.

    The guard is silent for the first 20 steps after a start. The loss is the same on every rank,
    and so is the result.

    Args:
        limit: Nats above the median that make a spike. None turns the guard off.
        stops: Raise LossSpikeError on a spike instead of returning a warning.
    """

    def __init__(self, limit: float | None, *, stops: bool) -> None:
        self._limit, self._stops = limit, stops
        self._losses: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def check(self, step: int, loss: float | None) -> str | None:
        """Return a warning about a spike in this step, or None.

        Args:
            step: Step that the warning names.
            loss: Total loss of the step, nats per token. None and NaN are ignored.

        Raises:
            LossSpikeError: There is a spike and the policy is to stop.
        """
        if self._limit is None or loss is None or loss != loss:
            return None
        median = statistics.median(self._losses) if len(self._losses) >= _MIN_STEPS else None
        if median is None or loss <= median + self._limit:
            self._losses.append(loss)
            return None
        warning = (
            f"step {step}: total_loss {loss:.4f} is {loss - median:.2f} nats above the median of "
            f"the {len(self._losses)} steps before (train.loss_spike = {self._limit})"
        )
        if self._stops:
            raise LossSpikeError(
                f"{warning}: check the samples of this step, or restart from the last checkpoint "
                "with a lower learning rate"
            )
        return warning


class DataWaitGuard:
    """Warn when data loading exceeds half of the step time for 10 consecutive log records.

    The guard warns once, and again only after it has seen a record with fast data loading.
    """

    def __init__(self) -> None:
        self._slow_records = 0

    def check(self, step: int, times: Mapping[str, float | int]) -> str | None:
        """Return a warning at the tenth slow record, else None.

        Args:
            step: Step that the warning names.
            times: Times of the step from `RankTimes.spread`, seconds.
        """
        data_seconds, step_seconds = times["data_seconds"], times["slowest_rank_seconds"]
        self._slow_records = self._slow_records + 1 if data_seconds > step_seconds / 2 else 0
        if self._slow_records != _SLOW_RECORDS:
            return None
        return (
            f"step {step}: {data_seconds:.2f} of {step_seconds:.2f} s are spent waiting for "
            f"samples, for {_SLOW_RECORDS} log records: is the disk with data.train or "
            "teacher.cache slow?"
        )


class RankTimes:
    """Measure the time from the start of a step until this rank's pipeline work is done.

    Gradients are not reduced yet at that point. Data-parallel replicas wait for each other only
    afterwards, so a slow one stands out. On a GPU the times are events in its stream, and nothing
    waits for the measurement.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._data_seconds = 0.0
        self._marks: list[Any] = []

    def begin(self) -> None:
        """Mark the start of a step."""
        self._marks = [self._mark()]
        self._data_seconds = -time.perf_counter()

    def has_data(self) -> None:
        """Mark the arrival of the step's samples."""
        self._data_seconds += time.perf_counter()

    def drained(self) -> None:
        """Mark the end of this rank's pipeline work."""
        self._marks.append(self._mark())

    def _mark(self) -> Any:
        if not self._groups.platform.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spread(self) -> dict[str, float | int]:
        """Return median and slowest time of the last step over all ranks, and the data wait.

        Call it when the step's metrics have reached the host.

        Returns:
            rank_seconds (median), slowest_rank_seconds, slowest_rank, data_seconds (longest wait).

        Collectives:
            One all-gather of two numbers over the world.
        """
        start, stop = self._marks[0], self._marks[-1]
        is_cuda = self._groups.platform.is_cuda
        seconds = start.elapsed_time(stop) / 1000 if is_cuda else stop - start
        device = self._groups.platform.device
        local = torch.tensor([[seconds, self._data_seconds]], dtype=torch.float64, device=device)
        world = torch.distributed.group.WORLD if self._groups.world_size > 1 else None
        times, data_times = all_gather(local, world).view(-1, 2).T.tolist()
        return {
            "rank_seconds": statistics.median(times),
            "slowest_rank_seconds": max(times),
            "slowest_rank": times.index(max(times)),
            "data_seconds": max(data_times),
        }

"""Compare a live teacher with a cached one: GPU-hours, bytes, bandwidth and money."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_kd.config import RunConfig
from megatron_kd.planning.hardware import Cluster

HOUR, DAY, MONTH, TIB = 3600.0, 86400.0, 30 * 86400.0, 1 << 40
# Bytes of a record of a cache per kept entry: 1.6 to 1.9 as measured (tools/benchmarks/README.md:
# 70.1 bytes for 42.7 entries, 66.2 for 35.9; of random samples 46.8 for 28.3 ids, 22.0 for 11.9).
# A large value is assumed.
BYTES_PER_ENTRY = 1.85
# Largest number of students for which the break-even point is computed.
_MAX_STUDENTS = 10_000


@dataclass(frozen=True)
class Prices:
    """Hold prices in any currency; None where a price is not known."""

    gpu_hour: float | None = None
    tib_month: float | None = None


@dataclass(frozen=True)
class Budget:
    """Hold the cost of one student and of all of them.

    Hours are GPU-hours. Bytes and bytes per second are those of the whole cluster. Costs are None
    without prices.

    Attributes:
        break_even: number of students from which on a cache costs no more than a live teacher
            (in money where GPU-hours have a price, else in GPU-hours); None: never.
    """

    tokens: float
    steps: int
    students: int
    online_hours: float
    online_days: float
    teacher_hours_online: float
    cached_hours: float
    cached_days: float
    extraction_hours: float
    extraction_days: float
    bytes_per_token: float
    cache_bytes: float
    read_bandwidth: float
    read_bandwidth_per_node: float
    online_cost: float | None
    cached_cost: float | None
    break_even: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers by name."""
        return asdict(self)


def assumed_bytes_per_token(config: RunConfig, entries: float | None = None) -> float:
    """Return the bytes of a quantised record of a token.

    Args:
        config: the run file.
        entries: average number of kept entries of a token. None: all of them; top_p and repeated
            samples make them fewer.
    """
    return BYTES_PER_ENTRY * (entries or config.distill.num_draws or config.distill.top_k)


@dataclass(frozen=True)
class StepSeconds:
    """Hold the seconds of one step in different settings.

    Attributes:
        tokens: tokens of the step.
        online: with a live teacher.
        teacher: the teacher's part of `online`.
        cached: with a cached teacher.
        extraction: the teacher alone, when it fills a cache.
    """

    tokens: int
    online: float
    teacher: float
    cached: float
    extraction: float


@dataclass(frozen=True)
class TrainingPlan:
    """Hold the amount of training that a budget is made for.

    Attributes:
        tokens: tokens of each student.
        students: students that are trained one after the other.
        bytes_per_token: size of a cached target.
        readers: ranks of a replica that read its targets (the last stage's tensor group).
    """

    tokens: float
    students: int
    bytes_per_token: float
    readers: int


def make_budget(
    seconds: StepSeconds, cluster: Cluster, training: TrainingPlan, prices: Prices
) -> Budget:
    """Return the cost of training all students, with a live and with a cached teacher.

    Args:
        seconds: time of a step.
        cluster: its ranks are paid for.
        training: tokens and students.
        prices: a cache is paid for from its extraction until the last student is finished.
    """
    steps = max(1, round(training.tokens / seconds.tokens))
    hours = steps * cluster.ranks / HOUR  # GPU-hours of the run per second of a step
    cache_bytes = training.bytes_per_token * training.tokens
    costs = _Costs(seconds, steps, hours, cache_bytes, prices)
    read = training.bytes_per_token * seconds.tokens / seconds.cached * training.readers
    has_prices = prices.gpu_hour is not None
    return Budget(
        tokens=training.tokens,
        steps=steps,
        students=training.students,
        online_hours=seconds.online * hours,
        online_days=steps * seconds.online / DAY,
        teacher_hours_online=seconds.teacher * hours,
        cached_hours=seconds.cached * hours,
        cached_days=steps * seconds.cached / DAY,
        extraction_hours=seconds.extraction * hours,
        extraction_days=steps * seconds.extraction / DAY,
        bytes_per_token=training.bytes_per_token,
        cache_bytes=cache_bytes,
        read_bandwidth=read,
        read_bandwidth_per_node=read / cluster.nodes,
        online_cost=costs.online(training.students) if has_prices else None,
        cached_cost=costs.cached(training.students) if has_prices else None,
        break_even=costs.break_even(),
    )


@dataclass(frozen=True)
class _Costs:
    """Compute costs of students: money where GPU-hours have a price, else GPU-hours."""

    seconds: StepSeconds
    steps: int
    hours: float
    cache_bytes: float
    prices: Prices

    def online(self, students: int) -> float:
        """Return the cost with a live teacher."""
        gpu_hours = students * self.seconds.online * self.hours
        return gpu_hours * (1.0 if self.prices.gpu_hour is None else self.prices.gpu_hour)

    def cached(self, students: int) -> float:
        """Return the cost with a cached teacher, extraction and storage included."""
        step_seconds = self.seconds.extraction + students * self.seconds.cached
        gpu_hours = step_seconds * self.hours
        if self.prices.gpu_hour is None:
            return gpu_hours
        months = self.steps * step_seconds / MONTH
        storage = self.cache_bytes / TIB * months * (self.prices.tib_month or 0.0)
        return gpu_hours * self.prices.gpu_hour + storage

    def break_even(self) -> int | None:
        """Return the smallest number of students for which a cache costs no more."""
        for students in range(1, _MAX_STUDENTS + 1):
            if self.cached(students) <= self.online(students):
                return students
        return None

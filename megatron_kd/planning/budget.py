"""A live teacher against one stored once: GPU-hours, bytes, bandwidth, money, and from how many students on storing pays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_kd.config import RunConfig
from megatron_kd.planning.hardware import Cluster

HOUR, DAY, MONTH, TIB = 3600.0, 86400.0, 30 * 86400.0, 1 << 40
# Bytes of a kept entry in a cache, all of a record divided by its entries: 1.6 to 1.9 as measured (tools/benchmarks/README.md: 70.1
# bytes for 42.7 entries, 66.2 for 35.9; of random draws 46.8 for 28.3 ids, 22.0 for 11.9). The larger one is assumed.
BYTES_PER_ENTRY = 1.85


@dataclass(frozen=True)
class Prices:
    """gpu_hour and tib_month in any currency; None where it is not said."""

    gpu_hour: float | None = None
    tib_month: float | None = None


@dataclass(frozen=True)
class Budget:
    """One student and all of them. Hours are GPU-hours; bytes and bytes/s are of the whole cluster; costs None without prices.

    break_even: students from which on a cache costs no more (money where both prices are known, else GPU-hours); None: never.
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
        """Plain numbers."""
        return asdict(self)


def assumed_bytes_per_token(config: RunConfig, entries: float | None = None) -> float:
    """Of a quantised record. entries: kept of a token on average; None: all slots, which top_p and repeated draws make fewer."""
    return BYTES_PER_ENTRY * (entries or config.distill.num_draws or config.distill.top_k)


@dataclass(frozen=True)
class Steps:
    """Seconds of one step over `tokens` tokens: online, what of it is the teacher's, with a cached teacher, and of the teacher alone."""

    tokens: int
    online: float
    teacher: float
    cached: float
    extraction: float


def budget(
    steps: Steps,
    cluster: Cluster,
    *,
    tokens: float,
    readers: int,
    bytes_per_token: float,
    students: int,
    prices: Prices,
) -> Budget:
    """Of `students` trained one after the other on `tokens` tokens each.

    readers: ranks of a replica that read its targets (the last stage's tensor group). A cache is paid for from its extraction until the
    last student is done.
    """
    count = max(1, round(tokens / steps.tokens))
    hours = count * cluster.ranks / HOUR  # of a second a step
    size = bytes_per_token * tokens

    def costs(several: int) -> tuple[float, float]:
        """Live and stored: in money where GPU-hours have a price, else in GPU-hours."""
        live, stored = (
            several * steps.online * hours,
            (steps.extraction + several * steps.cached) * hours,
        )
        if prices.gpu_hour is None:
            return live, stored
        months = count * (steps.extraction + several * steps.cached) / MONTH
        return live * prices.gpu_hour, stored * prices.gpu_hour + size / TIB * months * (
            prices.tib_month or 0.0
        )

    costs_all = costs(students) if prices.gpu_hour is not None else (None, None)
    read = bytes_per_token * steps.tokens / steps.cached * readers
    return Budget(
        tokens=tokens,
        steps=count,
        students=students,
        online_hours=steps.online * hours,
        online_days=count * steps.online / DAY,
        teacher_hours_online=steps.teacher * hours,
        cached_hours=steps.cached * hours,
        cached_days=count * steps.cached / DAY,
        extraction_hours=steps.extraction * hours,
        extraction_days=count * steps.extraction / DAY,
        bytes_per_token=bytes_per_token,
        cache_bytes=size,
        read_bandwidth=read,
        read_bandwidth_per_node=read / cluster.nodes,
        online_cost=costs_all[0],
        cached_cost=costs_all[1],
        break_even=next(
            (several for several in range(1, 10_001) if costs(several)[1] <= costs(several)[0]),
            None,
        ),
    )

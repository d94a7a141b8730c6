"""Declared metrics, and the reduction of a step's reports on one rank and on two."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_kd.losses.token_metrics import TOKEN_METRICS
from megatron_kd.telemetry.metrics import (
    METRICS,
    REDUCTIONS,
    STEP_METRICS,
    metrics_reference,
    reduce_reports,
)

VERBS = (
    "all_",
    "gather",
    "scatter",
    "broadcast",
    "reduce",
    "barrier",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend",
)
COLLECTIVES = [
    name for name in dir(dist) if name.startswith(VERBS) and callable(getattr(dist, name))
]


def pair(total: float, count: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor([total, count], dtype=dtype)


def test_token_metrics_are_metrics_of_a_step() -> None:
    for metric in TOKEN_METRICS:
        assert STEP_METRICS[metric.name].unit == metric.unit
        assert STEP_METRICS[metric.name].description == metric.description
        assert STEP_METRICS[metric.name].reduction == "mean"


def test_the_reference_has_a_line_for_each_metric() -> None:
    header, rule, *lines = metrics_reference().splitlines()
    assert header == "| Metric | Unit | Reduction | Description |"
    assert rule == "|---|---|---|---|"
    assert len(lines) == len(METRICS)
    for line, metric in zip(lines, METRICS.values(), strict=True):
        cells = line.replace("\\|", "/").strip("| ").split(" | ")
        assert cells[0] == f"`{metric.name}`"
        assert cells[1] == metric.unit
        assert cells[2] == REDUCTIONS[metric.reduction]


def test_the_division_happens_once_over_unequal_microbatches() -> None:
    reports = [
        {"total_loss": pair(6.0, 3.0), "ce_loss": pair(2.0, 1.0, torch.float32)},
        {"total_loss": pair(1.0, 1.0)},
        {},
    ]
    before = [{name: value.clone() for name, value in report.items()} for report in reports]
    result = reduce_reports(reports, contribute=True, group=None, device="cpu")
    assert list(result) == list(STEP_METRICS)
    assert result["total_loss"] == 7 / 4  # the mean of means would be 1.5
    assert result["ce_loss"] == 2.0
    assert result["loss_tokens"] == 4.0
    assert result["kd_loss"] is None
    assert all(
        torch.equal(old[name], new[name])
        for old, new in zip(before, reports, strict=True)
        for name in old
    )


def test_fp64_precision_and_nan_are_kept() -> None:
    reports = [{"total_loss": pair(2.0**30 + 0.25, 1.0), "kl": pair(math.nan, 2.0)}] * 4
    result = reduce_reports(reports, contribute=True, group=None, device="cpu")
    assert result["total_loss"] == 2.0**30 + 0.25
    assert math.isnan(result["kl"])


def test_a_rank_that_does_not_contribute_adds_zeros() -> None:
    result = reduce_reports(
        [{"total_loss": pair(5.0, 2.0)}], contribute=False, group=None, device="cpu"
    )
    assert result["loss_tokens"] == 0.0
    assert result["total_loss"] is None


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"los": pair(1, 1)}, "unknown metric 'los'"),
        ({"tokens": pair(1, 1)}, "unknown metric 'tokens'"),
        ({"loss_tokens": pair(1, 1)}, "unknown metric 'loss_tokens'"),
        ({"kl": torch.ones(3, dtype=torch.float64)}, r"\[2\]"),
        ({"kl": torch.ones(2, dtype=torch.bfloat16)}, "fp32 or fp64"),
    ],
)
def test_a_malformed_report_is_refused(report: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_reports([report], contribute=True, group=None, device="cpu")


def _record_collectives() -> list[str]:
    """Record every torch.distributed collective called from now on in this process."""
    calls: list[str] = []

    def recording(name: str, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, recording(name, getattr(dist, name)))
    return calls


def _reduce_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    calls = _record_collectives()
    reports = [
        [{"total_loss": pair(6, 3), "kd_loss": pair(8, 2)}, {"total_loss": pair(1, 1)}],
        [{"total_loss": pair(10, 2, torch.float32)}],
    ][rank]
    both = reduce_reports(reports, contribute=True, group=dist.group.WORLD, device="cpu")
    calls_per_step = list(calls)
    first = reduce_reports(reports, contribute=rank == 0, group=dist.group.WORLD, device="cpu")
    try:
        reduce_reports(
            [{"oops": pair(1, 1)}] if rank == 1 else reports,
            contribute=True,
            group=dist.group.WORLD,
            device="cpu",
        )
        error = None
    except ValueError as caught:
        error = str(caught)
    Path(folder, f"rank{rank}.json").write_text(
        json.dumps({"both": both, "first": first, "calls": calls_per_step, "error": error})
    )
    dist.destroy_process_group()


def test_reduction_on_two_ranks(tmp_path: Path) -> None:
    ranks = mp.spawn(_reduce_on_rank, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 60
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not finish in 60 s"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert zero["calls"] == ["all_reduce"]
    assert one["calls"] == ["all_reduce"]
    assert zero["both"] == one["both"]
    assert zero["first"] == one["first"]
    assert zero["both"]["total_loss"] == 17 / 6
    assert zero["both"]["kd_loss"] == 4.0
    assert zero["both"]["loss_tokens"] == 6.0
    assert zero["both"]["kl"] is None
    assert zero["first"]["total_loss"] == 7 / 4
    assert zero["first"]["loss_tokens"] == 4.0
    assert "oops" in one["error"]
    assert "other rank" in zero["error"]

"""What a run looks at besides its loss: jumps, slow ranks, and operations that differ from run to run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.config import RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import full_weights, tiny, write_tokens
from tests.train.test_program import command, finish, rows, start, write_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]


def guard(limit: float | None = 0.5, *, stops: bool = False) -> Any:
    from megatron_kd.parallel.platform import use_cpu

    use_cpu()
    from megatron_kd.train.guards import SpikeGuard

    return SpikeGuard(limit, stops=stops)


def test_a_spike_is_above_the_median_of_the_steps_before() -> None:
    spikes = guard()
    losses = [3.0 + 0.01 * (step % 7) for step in range(30)]
    assert [spikes.check(step, loss) for step, loss in enumerate(losses)] == [None] * 30
    assert spikes.check(30, 3.4) is None
    found = spikes.check(31, 3.6)
    assert found is not None
    assert (
        "step 31: total_loss 3.6000 is 0.57 nats above the median of the 31 steps before" in found
    )
    # Spikes do not become the usual: the second of a row is one too.
    assert spikes.check(32, 3.6) is not None
    assert spikes.check(33, 3.02) is None


def test_it_is_silent_at_first_and_about_what_is_not_finite() -> None:
    spikes = guard()
    assert spikes.check(0, 3.0) is None
    assert spikes.check(1, 30.0) is None
    for step in range(2, 40):
        spikes.check(step, 3.0)
    assert spikes.check(40, math.nan) is None
    assert spikes.check(41, None) is None
    assert guard(None).check(0, 1e9) is None


def test_the_policy_may_stop_the_run() -> None:
    from megatron_kd.train.guards import LossSpikeError

    spikes = guard(stops=True)
    for step in range(20):
        spikes.check(step, 3.0)
    with pytest.raises(LossSpikeError, match="step 20: total_loss 9.0000 is 6.00 nats above"):
        spikes.check(20, 9.0)


def test_late_samples_are_told_once() -> None:
    from megatron_kd.parallel.platform import use_cpu

    use_cpu()
    from megatron_kd.train.guards import DataWaitGuard

    samples = DataWaitGuard()
    late, well = (
        {"data_seconds": 0.6, "slowest_rank_seconds": 1.0},
        {"data_seconds": 0.4, "slowest_rank_seconds": 1.0},
    )
    told = [samples.check(step, late) for step in range(30)]
    assert [step for step, said in enumerate(told) if said] == [9]
    assert "0.60 of 1.00 s" in str(told[9])
    assert samples.check(30, well) is None
    assert [bool(samples.check(step, late)) for step in range(31, 42)] == [False] * 9 + [
        True,
        False,
    ]


@pytest.mark.fault(8)
def test_a_run_that_jumps(tmp_path: Path) -> None:
    """A learning rate that blows the loss up after the warm-up: exit code 93, nothing saved after the jump."""
    tokens = write_tokens(tmp_path)
    run = write_run(
        tmp_path,
        "run",
        tokens,
        optimizer={"learning_rate": 8.0, "warmup_steps": 60, "clip_grad": 0.0},
        train={"steps": 100, "loss_spike": 0.5, "on_loss_spike": "stop"},
    )
    code, output = finish(start(command(run)))
    last = rows(tmp_path / "run")[-1]["step"]
    assert code == 93, output
    assert f"stopped: step {last}: total_loss" in output, output
    assert last > 20, output
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def slow_ranks(rendezvous: str, config: RunConfig) -> dict[str, float]:
    """The spread that is measured when rank 1 takes 0.2 s longer over its forward passes, and rank 0 waits 0.1 s for data."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train import step
    from megatron_kd.train.build import build_run

    run = build_run(config, rendezvous=rendezvous)
    step.train_step(run)
    rank, schedule, read = run.groups.rank, run.student.run_schedule, run.train_data.microbatches

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(0.2 * (rank == 1))
        return schedule(*given, **named)

    def late(consumed: int) -> Any:
        time.sleep(0.1 * (rank == 0))
        return read(consumed)

    run.student.run_schedule, run.train_data.microbatches = slowly, late
    step.train_step(run)
    found: dict[str, float] = run.times.spread()
    stop_groups()
    return found


@pytest.mark.fault(7)
def test_a_slow_rank_stands_out(tmp_path: Path, measured: Callable[[str], None]) -> None:
    for found in run_ranks(slow_ranks, 2, tiny(tmp_path / "run", write_tokens(tmp_path))):
        assert found["slowest_rank"] == 1
        assert found["slowest_rank_seconds"] >= 0.2
        measured(
            f"slow by 0.2 s: rank {found['slowest_rank']} named, {found['slowest_rank_seconds']:.2f} s"
        )
        assert 0.1 <= found["data_seconds"] < 0.2 <= 2 * found["rank_seconds"]


def deterministic(rendezvous: str, config: RunConfig) -> tuple[bool, bool, dict[str, torch.Tensor]]:
    """Whether torch and megatron-core were told, and the weights after three steps."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    run = build_run(config, rendezvous=rendezvous)
    for _ in range(3):
        train_step(run)
    told = torch.are_deterministic_algorithms_enabled(), run.student.config.deterministic_mode
    weights = full_weights(run.student.models)
    stop_groups()
    return *told, weights


@pytest.mark.slow
def test_deterministic_runs(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path)
    runs = [
        run_ranks(
            deterministic, 1, tiny(tmp_path / "run", tokens, train={"deterministic": wanted})
        )[0]
        for wanted in (True, True, False)
    ]
    assert [run[:2] for run in runs] == [(True, True), (True, True), (False, False)]
    assert all(torch.equal(runs[0][2][name], runs[1][2][name]) for name in runs[0][2])


def test_what_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_kd.config import ConfigError
    from megatron_kd.parallel.platform import start_platform

    for chosen in ("NVLS", "Ring,NVLSTree"):
        monkeypatch.setenv("NCCL_ALGO", chosen)
        with pytest.raises(ConfigError, match=f"NCCL_ALGO = '{chosen}' may sum in another order"):
            start_platform("cpu", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not start_platform("cpu").deterministic

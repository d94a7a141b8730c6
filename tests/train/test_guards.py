"""Detect loss spikes, slow data loading and slow ranks, and refuse what is not deterministic."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.config import ConfigError, RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import full_weights, tiny, write_tokens
from tests.train.test_program import command, finish, read_metrics, start, write_run

pytestmark = [pytest.mark.dist, pytest.mark.alone, pytest.mark.timeout(200)]


def guards() -> Any:
    """Import the module of the guards, prepared for a CPU."""
    from megatron_kd.parallel.platform import use_cpu

    use_cpu()
    from megatron_kd.train import guards

    return guards


def spike_guard(limit: float | None = 0.5, *, stops: bool = False) -> Any:
    return guards().SpikeGuard(limit, stops=stops)


def test_a_spike_is_above_the_median_of_the_steps_before() -> None:
    guard = spike_guard()
    losses = [3.0 + 0.01 * (step % 7) for step in range(30)]
    assert [guard.check(step, loss) for step, loss in enumerate(losses)] == [None] * 30
    assert guard.check(30, 3.4) is None
    warning = guard.check(31, 3.6)
    assert warning is not None
    assert (
        "step 31: total_loss 3.6000 is 0.57 nats above the median of the 31 steps before" in warning
    )
    # Spikes do not raise the median: the next equal loss is a spike too.
    assert guard.check(32, 3.6) is not None
    assert guard.check(33, 3.02) is None


def test_the_first_steps_and_nan_are_ignored() -> None:
    guard = spike_guard()
    assert guard.check(0, 3.0) is None
    assert guard.check(1, 30.0) is None
    for step in range(2, 40):
        guard.check(step, 3.0)
    assert guard.check(40, math.nan) is None
    assert guard.check(41, None) is None
    assert spike_guard(None).check(0, 1e9) is None


def test_the_policy_may_stop_the_run() -> None:
    guard = spike_guard(stops=True)
    for step in range(20):
        guard.check(step, 3.0)
    with pytest.raises(
        guards().LossSpikeError, match="step 20: total_loss 9.0000 is 6.00 nats above"
    ):
        guard.check(20, 9.0)


def test_slow_data_loading_is_reported_once() -> None:
    guard = guards().DataWaitGuard()
    slow = {"data_seconds": 0.6, "slowest_rank_seconds": 1.0}
    fast = {"data_seconds": 0.4, "slowest_rank_seconds": 1.0}
    warnings = [guard.check(step, slow) for step in range(30)]
    assert [step for step, warning in enumerate(warnings) if warning] == [9]
    assert "0.60 of 1.00 s" in str(warnings[9])
    assert guard.check(30, fast) is None
    again = [bool(guard.check(step, slow)) for step in range(31, 42)]
    assert again == [False] * 9 + [True, False]


@pytest.mark.fault(8)
def test_a_run_whose_loss_jumps(tmp_path: Path) -> None:
    """Stop with exit code 93 when a learning rate blows up the loss, and save nothing after it."""
    tokens = write_tokens(tmp_path)
    run = write_run(
        tmp_path,
        "run",
        tokens,
        optimizer={"learning_rate": 8.0, "warmup_steps": 60, "clip_grad": 0.0},
        train={"steps": 100, "loss_spike": 0.5, "on_loss_spike": "stop"},
    )
    code, output = finish(start(command(run)))
    last_step = read_metrics(tmp_path / "run")[-1]["step"]
    assert code == 93, output
    assert f"stopped: step {last_step}: total_loss" in output, output
    assert last_step > 20, output
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def slow_ranks(rendezvous: str, config: RunConfig) -> dict[str, float]:
    """Measure a step whose rank 1 takes 0.2 s longer, and whose rank 0 waits 0.1 s for data."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train import step
    from megatron_kd.train.build import build_run

    run = build_run(config, rendezvous=rendezvous)
    step.train_step(run)
    rank, schedule, read = run.groups.rank, run.student.run_pipeline, run.train_data.microbatches

    def slow_schedule(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2 * (rank == 1))
        return schedule(*args, **kwargs)

    def slow_read(consumed: int) -> Any:
        time.sleep(0.1 * (rank == 0))
        return read(consumed)

    run.student.run_pipeline, run.train_data.microbatches = slow_schedule, slow_read
    step.train_step(run)
    spread: dict[str, float] = run.times.spread()
    stop_groups()
    return spread


@pytest.mark.fault(7)
def test_a_slow_rank_stands_out(tmp_path: Path, measured: Callable[[str], None]) -> None:
    for spread in run_ranks(slow_ranks, 2, tiny(tmp_path / "run", write_tokens(tmp_path))):
        assert spread["slowest_rank"] == 1
        assert spread["slowest_rank_seconds"] >= 0.2
        measured(
            f"slow by 0.2 s: rank {spread['slowest_rank']} named, "
            f"{spread['slowest_rank_seconds']:.2f} s"
        )
        assert 0.1 <= spread["data_seconds"] < 0.2 <= 2 * spread["rank_seconds"]


def deterministic_run(
    rendezvous: str, config: RunConfig
) -> tuple[bool, bool, dict[str, torch.Tensor]]:
    """Return the modes of torch and megatron-core, and the weights after three steps."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    run = build_run(config, rendezvous=rendezvous)
    for _ in range(3):
        train_step(run)
    modes = torch.are_deterministic_algorithms_enabled(), run.student.config.deterministic_mode
    weights = full_weights(run.student.models)
    stop_groups()
    return *modes, weights


@pytest.mark.slow
def test_deterministic_runs(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path)
    runs = [
        run_ranks(
            deterministic_run,
            1,
            tiny(tmp_path / "run", tokens, train={"deterministic": deterministic}),
        )[0]
        for deterministic in (True, True, False)
    ]
    assert [run[:2] for run in runs] == [(True, True), (True, True), (False, False)]
    assert all(torch.equal(runs[0][2][name], runs[1][2][name]) for name in runs[0][2])


def test_algorithms_that_are_not_deterministic_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_kd.parallel.platform import start_platform

    for algorithms in ("NVLS", "Ring,NVLSTree"):
        monkeypatch.setenv("NCCL_ALGO", algorithms)
        message = f"NCCL_ALGO = '{algorithms}' may sum in another order"
        with pytest.raises(ConfigError, match=message):
            start_platform("cpu", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not start_platform("cpu").deterministic

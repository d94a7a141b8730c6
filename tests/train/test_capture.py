"""Capture a teacher's targets while it trains: the training and its curve do not change."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_kd.cache import CacheReader
from tests.helpers.forks import Ended, in_forks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny
from tests.layouts.layouts import Trained
from tests.train.capture_bench import (
    CHECKPOINTED,
    FILE_LIMIT,
    FULL,
    KILLS,
    STEPS,
    Bench,
    refusals,
    single_rank_calls,
)
from tests.train.capture_ranks import by_step, equal_targets, pair_of_ranks, records, shards_in
from tests.train.test_program import RATES, read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "dp2": {
        "optimizer": {"distributed": True},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
}


class SingleRank(NamedTuple):
    """Hold the results of the calls in one process, by name, and the bench they ran on."""

    bench: Bench
    results: dict[str, Ended]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> SingleRank:
    """Make every call that needs one rank, each in a fork of one process."""
    bench = Bench(tmp_path_factory.mktemp("capture"))
    calls = single_rank_calls(bench)
    results = run_ranks(in_forks, 1, list(calls.values()), timeout=400)[0]
    return SingleRank(bench, dict(zip(calls, results, strict=True)))


@pytest.fixture(scope="module")
def pair(single: SingleRank) -> tuple[dict[str, Trained], str]:
    """Make every run that needs two ranks; return them, and the error of the full disk."""
    bench, jobs = single.bench, {}
    for layout, settings in LAYOUTS.items():
        for name, capture in ((f"{layout}True", None), (f"{layout}False", {})):
            config = bench.config(name, capture=capture, batch={"micro_batch_size": 1}, **settings)
            jobs[name] = (config, STEPS, True)
    full = bench.config("full2", **FULL)
    results = run_ranks(pair_of_ranks, 2, list(jobs.values()), full, FILE_LIMIT)
    assert results[0][1] == f"rank 1: {results[1][1]}", "every rank reports the same error"
    return dict(zip(jobs, results[0][0], strict=True)), results[0][1]


def check_unchanged(plain: Trained, captured: Trained) -> None:
    assert len(plain.records) == STEPS
    assert plain.records == captured.records
    assert plain.validation == captured.validation
    assert plain.weights.keys() == captured.weights.keys()
    assert all(weight.equal(captured.weights[name]) for name, weight in plain.weights.items())


@pytest.mark.parametrize("name", ["plain", "recomputed", "sampled"])
def test_capture_does_not_change_the_training(name: str, single: SingleRank) -> None:
    """Capture each microbatch once, and none of an evaluation.

    That includes layers and heads that run a second time in the backward pass.
    """
    (plain, captured), calls = single.results[name].value
    check_unchanged(plain, captured)
    assert calls == STEPS * 2
    targets = by_step(single.bench.cache(f"{name}False"))
    assert sorted({step for step, _ in targets}) == list(range(STEPS))
    assert len(targets) == STEPS * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_capture_what_one_does(
    layout: str, single: SingleRank, pair: tuple[dict[str, Trained], str]
) -> None:
    """Compare within what layouts differ by; the training does not change."""
    check_unchanged(pair[0][f"{layout}True"], pair[0][f"{layout}False"])
    one = by_step(single.bench.cache("plainFalse"))
    two = by_step(single.bench.cache(f"{layout}False"))
    assert one.keys() == two.keys()
    for key, target in one.items():
        torch.testing.assert_close(two[key].entropy, target.entropy, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            two[key].logprobs[:, 0], target.logprobs[:, 0], rtol=0, atol=1e-4
        )


def test_records_equal_the_targets_of_the_step_s_checkpoint(single: SingleRank) -> None:
    captured = by_step(single.bench.cache("stepwise"))
    assert single.results["stepwise"].value == 0, single.results["stepwise"].output
    for step in range(1, STEPS):
        recomputed = single.results[f"recomputed{step}"]
        assert recomputed.value is not None, recomputed.output
        assert len(recomputed.value) == 4, recomputed.output
        assert all(equal_targets(captured[step, key], target) for key, target in recomputed.value)


def test_the_captured_teacher_learns(single: SingleRank) -> None:
    captured = by_step(single.bench.cache("stepwise"))
    first, last = (
        next(target for (step, _), target in captured.items() if step == number)
        for number in (0, STEPS - 1)
    )
    assert first.entropy is not None
    assert last.entropy is not None
    assert last.entropy.mean() < first.entropy.mean()


@pytest.mark.fault(1)
def test_killed_and_resumed(single: SingleRank) -> None:
    """Kill between a shard, its checkpoint and its publication.

    In the end there are the files of an uninterrupted run.
    """
    for name in ("whole", "broken"):
        assert single.results[name].value == 0, single.results[name].output
    for number in range(len(KILLS)):
        assert single.results[f"killed{number}"].signal == signal.SIGKILL
    uninterrupted, broken = single.bench.cache("whole"), single.bench.cache("broken")
    files = [
        {path.name: path.read_bytes() for path in cache.iterdir() if not path.name.startswith(".")}
        for cache in (uninterrupted, broken)
    ]
    assert files[0] == files[1]
    assert shards_in(broken)[1] == []
    assert len(records(uninterrupted)) == CHECKPOINTED * 4
    metrics = [
        [
            {key: value for key, value in record.items() if key not in RATES}
            for record in read_metrics(single.bench.folder / name)
        ]
        for name in ("whole", "broken")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.fault(1)
def test_shards_between_kills(single: SingleRank) -> None:
    (public0, hidden0), (public1, hidden1), (public2, hidden2), (public3, _) = (
        single.results[f"shards{number}"].value for number in range(len(KILLS))
    )
    assert not public0
    assert ".step-00000000-worker-00000.json.ready" in hidden0
    assert not public1
    assert len(hidden1) == 4
    assert len(public2) == len(hidden2) == 4
    # What was hidden when its checkpoint was complete is public after the next start.
    assert len(public3) == 8


def test_a_finished_run_captures_nothing_more(single: SingleRank) -> None:
    assert single.results["again"].value == 0
    assert not shards_in(single.bench.cache("again"))[0]


def test_a_student_of_captured_targets(single: SingleRank) -> None:
    """Start a student as its teacher started, on the same samples.

    At its first step the two agree; then the teacher is better.
    """
    assert single.results["student"].value == 0, single.results["student"].output
    metrics = read_metrics(single.bench.folder / "student")
    losses = [record["kd_loss"] for record in metrics if "split" not in record]
    assert len(losses) == STEPS
    assert abs(losses[0]) < 1e-6
    assert losses[-1] > 1e-4


def test_documented_commands(single: SingleRank) -> None:
    for number in range(2):
        result = single.results[f"documented{number}"]
        assert result.value == 0, result.output
    assert len(CacheReader(single.bench.cache("documented"))) == STEPS * 4
    metrics = read_metrics(single.bench.folder / "documented_run")
    assert all(record["kd_loss"] is not None for record in metrics if "split" not in record)


@pytest.mark.fault(8)
def test_a_step_that_is_not_finite_is_not_stored(single: SingleRank) -> None:
    """Continue a run that skips such a step."""
    assert single.results["poisoned"].value == 1, single.results["poisoned"].output
    steps = {step for step, _ in by_step(single.bench.cache("poisoned"))}
    assert steps == set(range(STEPS)) - {2}


@pytest.mark.fault(6)
def test_a_full_disk_stops_the_run(
    single: SingleRank, pair: tuple[dict[str, Trained], str]
) -> None:
    """Stop with the exit code for it; where one rank of two meets it, both stop with its error."""
    result = single.results["full"]
    message = "megatron_kd: stopped: targets cannot be written to capture.directory"
    assert result.value == 5, result.output
    assert result.output.count(message) == 1, result.output
    assert "File too large" in result.output
    assert "those up to the last checkpoint are kept" in result.output
    assert json.loads((single.bench.folder / "full/status.json").read_text())["state"] == "stopped"
    assert shards_in(single.bench.cache("full")) == ([], [])
    assert "File too large" in pair[1]
    assert shards_in(single.bench.cache("full2")) == ([], [])


def test_bad_input_is_one_sentence(single: SingleRank) -> None:
    for name, (_, sentence) in refusals(single.bench).items():
        result = single.results[name]
        errors = [
            line for line in result.output.splitlines() if line.startswith("megatron_kd: error:")
        ]
        assert result.value == 2, (name, result.output)
        assert len(errors) == 1, (name, result.output)
        assert sentence in errors[0], (name, result.output)


def test_captured_steps() -> None:
    section = tiny(
        Path("x"), "x", capture={"first_step": 3, "last_step": 11, "interval": 4}
    ).capture
    assert list(section.steps(100)) == [3, 7, 11]
    assert list(section.steps(8)) == [3, 7]
    assert list(tiny(Path("x"), "x").capture.steps(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"last_step \(2\) must be at least first_step \(3\)"):
        tiny(Path("x"), "x", capture={"first_step": 3, "last_step": 2})

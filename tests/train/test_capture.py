"""A teacher that is still training writes its targets: its training does not notice, and the records are what its weights say."""

from __future__ import annotations

import json
import re
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_kd.cache import CacheIdentity, CacheInUse, CacheReader, WrongCache
from megatron_kd.cache.background_writer import BackgroundWriter
from megatron_kd.cache.identity import write_identity
from megatron_kd.cache.staged import StagedWriter, reconcile
from megatron_kd.config import RunConfig, dump_toml
from megatron_kd.targets import TopSelection
from megatron_kd.targets.sparse import SparseTarget
from tests.helpers.forks import Ended, in_forks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import VOCAB, tiny, write_tokens
from tests.layouts.layouts import Trained
from tests.losses.cases import fresh_seed
from tests.train.capture_ranks import (
    by_step,
    counted,
    full_disk,
    killed,
    main,
    pair_of_ranks,
    poisoned,
    recomputed,
    records,
    same,
)
from tests.train.test_program import RATES, read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, CHECKPOINTED = 6, 9
SELECTION = {"top_k": 12, "top_p": 0.95}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "dp2": {
        "optimizer": {"distributed": True},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    },
}
# One long shard, and nothing else of which a file would grow.
FULL: dict[str, Any] = {
    "capture": {"shard_samples": 400},
    "train": {"steps": 60},
    "telemetry": {"log_interval": 60},
}


class Bench:
    """A folder with data, and the configs of runs that begin alike."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.valid = write_tokens(folder), write_tokens(folder, tokens=1500, seed=1)

    def config(
        self, name: str, *, capture: dict[str, Any] | None = None, **overrides: Any
    ) -> RunConfig:
        """capture: further keys of the section; None: no capture. One step a shard, fp32."""
        settings: dict[str, Any] = {
            "train": {"steps": STEPS, "evaluate_batches": 1},
            "distill": SELECTION,
            "data": {"valid": {"held_out": self.valid}},
        }
        if capture is not None:
            settings["capture"] = {
                "directory": str(self.cache(name)),
                "value_encoding": "fp32",
                "shard_samples": 1,
                **capture,
            }
        for section, keys in overrides.items():
            settings[section] = {**settings.get(section, {}), **keys}
        return tiny(self.folder / name, self.data, **settings)

    def cache(self, name: str) -> Path:
        return self.folder / f"{name}_cache"

    def write(self, name: str, **overrides: Any) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(dump_toml(self.config(name, **overrides)))
        return path


class Alone(NamedTuple):
    """Results of the calls in one process, by name, and the bench they ran on."""

    bench: Bench
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Everything that needs one rank: each call in a fork of one process."""
    bench = Bench(tmp_path_factory.mktemp("capture"))
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    slow = {
        "model": {"recompute": "full"},
        "distill": {"head_schedule": "recompute", "chunk_tokens": 20},
    }
    # With dropout: a random number more or less would change it.
    draws = {
        "distill": {"num_draws": 20, "top_k": 64, "top_p": 1.0},
        "model": {"hidden_dropout": 0.1},
    }
    for name, settings in (("plain", {}), ("recomputed", slow), ("drawn", draws)):
        jobs = [
            (bench.config(f"{name}{found is None}", capture=found, **settings), STEPS, True)
            for found in (None, {})
        ]
        calls[name] = counted, (jobs,)
    saved = {
        "capture": {"shard_samples": 8},
        "train": {"steps": CHECKPOINTED},
        "checkpoint": {"interval": 3, "keep_last": 9},
    }
    calls["whole"] = main, (bench.write("whole", **saved),)
    broken = bench.write("broken", **saved)
    # In a step with a finished shard before it; between what is captured and its checkpoint; between the checkpoint and the names.
    for number, (where, step) in enumerate(
        (("stepped", 2), ("staged", 2), ("saved", 5), ("stepped", 8))
    ):
        calls[f"killed{number}"] = killed, (broken, where, step)
        calls[f"left{number}"] = _seen, (bench.cache("broken"),)
    calls["broken"] = main, (broken,)
    calls["again"] = (
        main,
        (broken, "--capture.directory", str(bench.cache("again")), "--checkpoint.resume", "true"),
    )
    each = bench.config("each", capture={}, checkpoint={"interval": 1, "keep_last": 9})
    calls["each"] = (
        main,
        (bench.write("each", capture={}, checkpoint={"interval": 1, "keep_last": 9}),),
    )
    for step in range(1, STEPS):
        calls[f"recomputed{step}"] = (
            recomputed,
            (each, bench.folder / f"each/checkpoints/step-{step:08d}", step),
        )
    student = {
        "teacher": {"source": "cached", "cache": str(bench.cache("each"))},
        "distill": {"alpha": 0.5, "tail": "bucket"},
    }
    student["optimizer"] = {
        "learning_rate": 1e-4
    }  # with its teacher's it would make the same steps
    calls["student"] = main, (bench.write("student", **student),)
    calls["poisoned"] = (
        poisoned,
        (bench.config("poisoned", capture={}, train={"nonfinite": "skip"}), 2),
    )
    calls["full"] = full_disk, (bench.write("full", **FULL), 16_000)
    calls |= {
        name: (main, (bench.folder / "whole.toml", *overrides))
        for name, (overrides, _) in refused(bench).items()
    }
    calls |= {
        f"readme{number}": (main, tuple(words))
        for number, words in enumerate(readme_commands(bench))
    }
    ended = run_ranks(in_forks, 1, list(calls.values()), timeout=400)[0]
    return Alone(bench, dict(zip(calls, ended, strict=True)))


def _seen(cache: Path) -> tuple[list[str], list[str]]:
    """Names of the shards that are seen, and of those that wait."""
    names = sorted(path.name for path in cache.iterdir())
    return [name for name in names if name.startswith("step-")], [
        name for name in names if name.startswith(".step-")
    ]


def refused(bench: Bench) -> dict[str, tuple[list[str], str]]:
    """Name -> (overrides of a finished run's file, what the sentence must hold)."""
    fresh = ["--run.directory", str(bench.folder / "fresh")]
    changed = ["--train.seed", "8", "--checkpoint.allow_changes", "true"]
    return {
        "other run": (changed, "holds the targets of another training run (train.seed: was 7, is now 8)"),
        "other k": (["--distill.top_k", "9"], "selection: the cache has 'TopSelection(top_k=12"),
        "second": (fresh, "already holds targets of training steps up to 8, but training goes on at step 0"),
        "a file": ([*fresh, "--capture.directory", f"{bench.data}.bin"], "capture.directory cannot be written"),
        "late": ([*fresh, "--capture.first_step", "9"], "capture.first_step (9) must be less than train.steps (9)"),
        "dense": ([*fresh, "--distill.dense", "true", "--distill.top_k", "64", "--distill.top_p", "1.0"], "unset distill.dense"),
        "room": ([*fresh, "--capture.directory", str(bench.folder / "room"), "--train.steps", "1000000000", "--capture.shard_samples",
                  "1000000000000"], "MiB free, but a shard of each data-parallel rank may need"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pair(alone: Alone) -> tuple[dict[str, Trained], str]:
    """Everything that needs two ranks."""
    bench, jobs = alone.bench, {}
    for layout, settings in LAYOUTS.items():
        for name, found in ((f"{layout}True", None), (f"{layout}False", {})):
            jobs[name] = (
                bench.config(name, capture=found, batch={"micro_batch_size": 1}, **settings),
                STEPS,
                True,
            )
    results = run_ranks(
        pair_of_ranks, 2, list(jobs.values()), bench.config("full2", **FULL), 16_000
    )
    assert results[0][1] == f"rank 1: {results[1][1]}", "every rank is told the same"
    return dict(zip(jobs, results[0][0], strict=True)), results[0][1]


def unchanged(plain: Trained, captured: Trained) -> None:
    assert len(plain.records) == STEPS
    assert plain.records == captured.records
    assert plain.validation == captured.validation
    assert plain.weights.keys() == captured.weights.keys()
    assert all(weight.equal(captured.weights[name]) for name, weight in plain.weights.items())


@pytest.mark.parametrize("name", ["plain", "recomputed", "drawn"])
def test_one_process_trains_as_without(name: str, alone: Alone) -> None:
    """Also where layers and head run a second time in the backward: each microbatch is captured once, none of an evaluation."""
    (plain, captured), calls = alone.ended[name].value
    unchanged(plain, captured)
    assert calls == STEPS * 2
    found = by_step(alone.bench.cache(f"{name}False"))
    assert sorted({step for step, _ in found}) == list(range(STEPS))
    assert len(found) == STEPS * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_without(
    layout: str, alone: Alone, pair: tuple[dict[str, Trained], str]
) -> None:
    """And capture what one process captures, within what layouts differ by."""
    unchanged(pair[0][f"{layout}True"], pair[0][f"{layout}False"])
    one, two = (
        by_step(alone.bench.cache("plainFalse")),
        by_step(alone.bench.cache(f"{layout}False")),
    )
    assert one.keys() == two.keys()
    for place, target in one.items():
        torch.testing.assert_close(two[place].entropy, target.entropy, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            two[place].logprobs[:, 0], target.logprobs[:, 0], rtol=0, atol=1e-4
        )


def test_records_are_what_the_checkpoint_of_their_step_says(alone: Alone) -> None:
    found = by_step(alone.bench.cache("each"))
    assert alone.ended["each"].value == 0, alone.ended["each"].output
    for step in range(1, STEPS):
        wanted = alone.ended[f"recomputed{step}"]
        assert wanted.value is not None, wanted.output
        assert len(wanted.value) == 4, wanted.output
        assert all(same(found[step, key], target) for key, target in wanted.value)
    first, last = (
        next(target for (step, _), target in found.items() if step == wanted)
        for wanted in (0, STEPS - 1)
    )
    assert first.entropy is not None, "it learns"
    assert last.entropy is not None, "it learns"
    assert last.entropy.mean() < first.entropy.mean(), "it learns"


@pytest.mark.fault(1)
def test_killed_and_resumed(alone: Alone) -> None:
    """SIGKILL at the points between a shard, its checkpoint and its name: in the end the files of an uninterrupted run."""
    for name in ("whole", "broken"):
        assert alone.ended[name].value == 0, alone.ended[name].output
    assert all(alone.ended[f"killed{number}"].signal == signal.SIGKILL for number in range(4))
    (seen0, waiting0), (seen1, waiting1), (seen2, waiting2), (seen3, _) = (
        alone.ended[f"left{number}"].value for number in range(4)
    )
    assert not seen0
    assert ".step-00000000-worker-00000.json.ready" in waiting0
    assert not seen1
    assert len(waiting1) == 4
    assert len(seen2) == len(waiting2) == 4
    assert len(seen3) == 8, (
        "what was hidden when its checkpoint was complete is seen after the next start"
    )
    whole, broken = alone.bench.cache("whole"), alone.bench.cache("broken")
    files = {
        path.name: path.read_bytes() for path in whole.iterdir() if not path.name.startswith(".")
    }
    assert files == {
        path.name: path.read_bytes() for path in broken.iterdir() if not path.name.startswith(".")
    }
    assert _seen(broken)[1] == []
    assert len(records(whole)) == CHECKPOINTED * 4
    strip = [
        [
            {k: v for k, v in row.items() if k not in RATES}
            for row in read_metrics(alone.bench.folder / name)
        ]
        for name in ("whole", "broken")
    ]
    assert strip[0] == strip[1]
    # A finished run goes nowhere, with or without what it has captured.
    assert alone.ended["again"].value == 0
    assert not _seen(alone.bench.cache("again"))[0]


def test_a_student_of_what_was_captured(alone: Alone) -> None:
    """It begins as its teacher began and reads the same samples: at its first step the two agree, then the teacher is ahead."""
    assert alone.ended["student"].value == 0, alone.ended["student"].output
    losses = [
        row["kd_loss"] for row in read_metrics(alone.bench.folder / "student") if "split" not in row
    ]
    assert len(losses) == STEPS
    assert abs(losses[0]) < 1e-6
    assert losses[-1] > 1e-4


def readme_commands(bench: Bench) -> list[list[str]]:
    """The README's commands for a capturing teacher and its student, as the program's arguments: run file, overrides."""
    settings = {"distill": {"top_k": 64, "top_p": 1.0}}
    files = {
        f"{name}.toml": bench.write(f"readme_{name}", **settings) for name in ("teacher", "run")
    }
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
        if "--capture" in block
    ]
    found = []
    for line in block.splitlines():
        command, words = line.split(" --config ")
        assert command == "torchrun --nproc-per-node 8 -m megatron_kd.pretrain"
        run_file, *overrides = shlex.split(words)
        found.append(
            [
                files[run_file],
                *[str(bench.cache("readme")) if word == "cache/" else word for word in overrides],
            ]
        )
    return found


def test_the_readme_s_commands(alone: Alone) -> None:
    for number in range(2):
        assert alone.ended[f"readme{number}"].value == 0, alone.ended[f"readme{number}"].output
    assert len(CacheReader(alone.bench.cache("readme"))) == STEPS * 4
    assert all(
        row["kd_loss"] is not None
        for row in read_metrics(alone.bench.folder / "readme_run")
        if "split" not in row
    )


@pytest.mark.fault(8)
def test_a_step_that_is_not_finite_is_not_stored(alone: Alone) -> None:
    """And does not stop a run that goes on without it."""
    assert alone.ended["poisoned"].value == 1, alone.ended["poisoned"].output
    assert {step for step, _ in by_step(alone.bench.cache("poisoned"))} == set(range(STEPS)) - {2}


@pytest.mark.fault(6)
def test_a_full_disk_stops_the_run(alone: Alone, pair: tuple[dict[str, Trained], str]) -> None:
    """In one process with the exit code for it; where one rank of two meets it, both stop with its sentence."""
    ended = alone.ended["full"]
    assert ended.value == 5, ended.output
    assert (
        ended.output.count("megatron_kd: stopped: targets cannot be written to capture.directory")
        == 1
    ), ended.output
    assert "File too large" in ended.output
    assert "those up to the last checkpoint are kept" in ended.output
    assert json.loads((alone.bench.folder / "full/status.json").read_text())["state"] == "stopped"
    assert _seen(alone.bench.cache("full")) == ([], [])
    assert "File too large" in pair[1]
    assert _seen(alone.bench.cache("full2")) == ([], [])


def test_bad_input_is_one_sentence(alone: Alone) -> None:
    for name, (_, sentence) in refused(alone.bench).items():
        ended = alone.ended[name]
        told = [
            line for line in ended.output.splitlines() if line.startswith("megatron_kd: error:")
        ]
        assert ended.value == 2, (name, ended.output)
        assert len(told) == 1, (name, ended.output)
        assert sentence in told[0], (name, ended.output)


IDENTITY = CacheIdentity("0" * 64, None, VOCAB, 5, TopSelection(3), "fp32")


def sample(seed: int) -> tuple[torch.Tensor, SparseTarget]:
    """Tokens [5] and a target [5, 3]."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, order = (
        torch.randn(5, VOCAB, generator=generator).log_softmax(-1).sort(descending=True)
    )
    target = SparseTarget(
        order[:, :3].int(), logprobs[:, :3].contiguous(), logprobs[:, 3:].logsumexp(-1)
    )
    return torch.randint(0, VOCAB, (5,), generator=generator), target


def staged(directory: Path, shard_steps: int = 2) -> StagedWriter:
    write_identity(directory, IDENTITY)
    return StagedWriter(directory, IDENTITY, worker=0, shard_steps=shard_steps)


def test_shards_of_whole_steps(tmp_path: Path) -> None:
    """Two steps a shard; what comes again in a shard stands there once, and of several shards the latest step is read."""
    seed = fresh_seed()
    tokens, early = sample(seed)
    late = sample(seed + 1)[1]
    writer = staged(tmp_path)
    for step, target in ((0, early), (1, late), (5, late), (6, early)):
        writer.add(step, tokens, target)
        writer.add(step, *sample(seed + 10 + step))
    assert not list(tmp_path.glob("step-*"))
    writer.stage()
    writer.publish()
    writer.close()
    places = [(first, last) for first, last, _, _ in records(tmp_path)]
    assert places == [(0, 1)] * 3 + [(5, 6)] * 3
    assert same(CacheReader(tmp_path).get(tokens), late)


def test_what_has_a_name_is_never_removed(tmp_path: Path) -> None:
    writer = staged(tmp_path)
    for step in range(6):
        writer.add(step, *sample(fresh_seed()))
    with pytest.raises(CacheInUse, match="is being written by process"):
        staged(tmp_path)
    writer.stage()
    writer.publish()
    writer.add(6, *sample(fresh_seed()))
    writer.stage()
    writer.close()  # a checkpoint may have been written since
    assert len(CacheReader(tmp_path)) == 6
    with pytest.raises(
        WrongCache, match=r"steps up to 5, but training goes on at step 3 .* from step 2 on"
    ):
        reconcile(tmp_path, 3)
    assert len(CacheReader(tmp_path)) == 6, "hidden steps from 3 on are made again"
    assert not list(tmp_path.glob(".step-*")), "hidden steps from 3 on are made again"
    reconcile(tmp_path, 6)


def test_an_interrupted_publication_is_completed(tmp_path: Path) -> None:
    writer = staged(tmp_path)
    for step in range(4):
        writer.add(step, *sample(fresh_seed()))
    writer.stage()
    writer.close()
    name = "step-00000000-worker-00000.arrow"
    (tmp_path / f".{name}.ready").rename(tmp_path / name)
    reconcile(tmp_path, 4)
    assert len(CacheReader(tmp_path)) == 4
    assert not list(tmp_path.glob(".step-*"))


def test_memory_of_the_queue_is_bounded(tmp_path: Path) -> None:
    """While nothing can be written `put` waits; then all of it arrives."""
    writer, gate = staged(tmp_path, shard_steps=100), threading.Event()
    add, most = writer.add, []

    def slow(*arguments: Any) -> None:
        assert gate.wait(60)
        most.append(background._bytes)
        add(*arguments)

    writer.add = slow  # type: ignore[method-assign]
    tokens, target = sample(fresh_seed())
    batch = tokens.unsqueeze(0), target.map(lambda t: t.unsqueeze(1))
    size = sum(t.nbytes for t in (batch[0], *batch[1].tensors()))
    background = BackgroundWriter(writer, max_bytes=3 * size)

    def give() -> None:
        for step in range(20):
            background.put(step, batch[0] * 0 + step, batch[1])

    giver = threading.Thread(target=give)
    giver.start()
    giver.join(0.3)
    assert giver.is_alive()
    assert background._bytes == 3 * size
    gate.set()
    giver.join(60)
    background.stage()
    background.publish()
    background.close()
    assert background.problem is None
    assert len(CacheReader(tmp_path)) == 20
    assert max(most) == 3 * size


def test_a_failed_writer_takes_everything_and_says_why(tmp_path: Path) -> None:
    """Whatever goes wrong in the thread: nobody waits for it."""
    background = BackgroundWriter(staged(tmp_path), max_bytes=1)
    tokens, target = sample(fresh_seed())
    for step in range(5):
        background.put(step, tokens.unsqueeze(0) + VOCAB, target.map(lambda t: t.unsqueeze(1)[:3]))
    background.stage()
    background.publish()
    background.close()
    assert background.problem is not None
    assert "ValueError: tokens (5,) with a target (3, 3)" in background.problem
    assert not list(tmp_path.glob("*step-*"))


def test_steps() -> None:
    section = tiny(
        Path("x"), "x", capture={"first_step": 3, "last_step": 11, "interval": 4}
    ).capture
    assert list(section.steps(100)) == [3, 7, 11]
    assert list(section.steps(8)) == [3, 7]
    assert list(tiny(Path("x"), "x").capture.steps(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"last_step \(2\) must be at least first_step \(3\)"):
        tiny(Path("x"), "x", capture={"first_step": 3, "last_step": 2})

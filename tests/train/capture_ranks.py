"""Run captured trainings in other processes, for the tests of capture."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd.cache import CacheReader
from megatron_kd.cache.decode import decode
from megatron_kd.config import RunConfig
from megatron_kd.targets.sparse import SparseTarget
from tests.layouts.layouts import Trained, run_all

# (first step, last step of the shard, worker, key) -> payload
Records = dict[tuple[int, int, str, bytes], bytes]


def records(cache: Path) -> Records:
    """Return every record of every published shard."""
    payloads: Records = {}
    for shard in CacheReader(cache).shards:
        worker = shard.info.file.split("-")[-1]
        for number in range(shard.num_batches):
            batch = shard.batch(number)
            for index in range(batch.num_rows):
                record = shard.record(batch, number, index)
                assert shard.info.step is not None
                assert shard.info.last_step is not None
                position = (shard.info.step, shard.info.last_step, worker, record.key)
                assert position not in payloads
                payloads[position] = record.payload
    return payloads


def by_step(cache: Path) -> dict[tuple[int, bytes], SparseTarget]:
    """Return (step, key) -> target of a cache whose shards hold one step each.

    A sample of a step is in one shard only.
    """
    targets: dict[tuple[int, bytes], SparseTarget] = {}
    for (first, last, _, key), payload in records(cache).items():
        assert first == last
        assert (first, key) not in targets
        targets[first, key] = decode(payload)
    return targets


def shards_in(cache: Path) -> tuple[list[str], list[str]]:
    """Return the names of published shards, and of those that are still hidden."""
    names = sorted(path.name for path in cache.iterdir())
    return [name for name in names if name.startswith("step-")], [
        name for name in names if name.startswith(".step-")
    ]


def run_program(run_file: Path, *overrides: str) -> int:
    """Run the program, and return its exit code."""
    from megatron_kd.pretrain import main

    return main(["--config", str(run_file), *overrides])


def run_killed(run_file: Path, position: str, step: int) -> None:
    """Run the program, with SIGKILL at `position` ("stepped", "staged", "saved") of `step`."""
    from megatron_kd.train.capture import LiveCapture

    name = {"stepped": "end_step", "staged": "stage", "saved": "publish"}[position]
    kills_before = position == "saved"
    method, begin_step, current = getattr(LiveCapture, name), LiveCapture.begin_step, {"step": -1}

    def recording_step(self: Any, number: int) -> None:
        current["step"] = number
        begin_step(self, number)

    def killing(self: Any) -> None:
        # The writing thread must have reached the same point every time.
        while current["step"] == step and self._writer._bytes:
            time.sleep(0.001)
        if kills_before and current["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        method(self)
        if current["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    LiveCapture.begin_step = recording_step  # type: ignore[method-assign]
    setattr(LiveCapture, name, killing)
    run_program(run_file)


def run_with_full_disk(run_file: Path, limit: int) -> int:
    """Run the program where no file may be longer than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return run_program(run_file)


def captured_calls(jobs: list[tuple[RunConfig, int, bool]]) -> tuple[list[Trained], int]:
    """Run `run_all` in one process; also return how many microbatches a writer got."""
    from megatron_kd.cache.background_writer import BackgroundWriter

    steps = []
    original = BackgroundWriter.put

    def put(self: BackgroundWriter, step: int, tokens: Tensor, target: SparseTarget) -> None:
        steps.append(step)
        original(self, step, tokens, target)

    BackgroundWriter.put = put  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        return run_all(f"file://{folder}/rendezvous", jobs), len(steps)


def poisoned_steps(config: RunConfig, step: int) -> int:
    """Set an output weight to NaN at `step`; return how many steps were skipped."""
    from megatron_kd.models.gpt_model import output_weight
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    run = build_run(config)
    weight = output_weight(run.student.models[-1]).data
    while run.progress.step < config.train.steps:
        valid_weight = weight.clone()
        if run.progress.step == step:
            weight[7] = torch.nan
        if not train_step(run).updated:
            weight.copy_(valid_weight)
    run.save()
    run.capture.close()
    stop_groups()
    return run.progress.nonfinite_steps


def recomputed_targets(
    config: RunConfig, checkpoint: Path, step: int
) -> list[tuple[bytes, SparseTarget]]:
    """Return the targets of `checkpoint` for the samples that the run reads at `step`, by key."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.targets.sample_keys import key_from_words
    from megatron_kd.train.build import build_run

    teacher = config.teacher.model_copy(update={"source": "online", "checkpoint": checkpoint})
    # The checkpoint was trained without a teacher.
    checkpoint_section = config.checkpoint.model_copy(update={"allow_changes": True})
    run = build_run(
        config.model_copy(
            update={
                "teacher": teacher,
                "capture": type(config.capture)(),
                "checkpoint": checkpoint_section,
            }
        )
    )
    batches = run.train_data.microbatches(step * config.batch.global_batch_size)
    targets = run.teacher.targets(batches)
    by_key = []
    for batch, target in zip(batches, targets, strict=True):
        assert isinstance(target, SparseTarget)
        by_key += [
            (key_from_words(key), target.map(lambda tensor, n=number: tensor[:, n]))
            for number, key in enumerate(batch.sample_keys)
        ]  # type: ignore[misc]
    stop_groups()
    return by_key


def one_full_disk(rendezvous: str, config: RunConfig, limit: int) -> str:
    """Run two replicas, of which the second may write no long file; return this rank's error."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.capture import CaptureError
    from megatron_kd.train.step import train_step

    run = build_run(config, rendezvous=f"{rendezvous}-full")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if run.groups.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    message = "no error"
    try:
        while run.progress.step < config.train.steps:
            train_step(run)
        run.save()
    except CaptureError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        run.capture.close()
        stop_groups()
    return message


def pair_of_ranks(
    rendezvous: str, jobs: list[tuple[RunConfig, int, bool]], full: RunConfig, limit: int
) -> tuple[list[Trained], str]:
    """Make all runs that need two ranks, in one world."""
    return run_all(rendezvous, jobs), one_full_disk(rendezvous, full, limit)


def equal_targets(one: SparseTarget, other: SparseTarget) -> bool:
    """Return True if two targets are equal to the bit."""
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return (one.temperature, one.sampled) == (other.temperature, other.sampled) and all(
        a.equal(b) for a, b in pairs
    )

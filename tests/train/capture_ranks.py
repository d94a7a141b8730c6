"""What the tests of live capture do in other processes, which import this module."""

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
    """Every record of every shard that can be seen."""
    found: Records = {}
    for shard in CacheReader(cache).shards:
        worker = shard.info.file.split("-")[-1]
        for number in range(shard.num_batches):
            batch = shard.batch(number)
            for row in range(batch.num_rows):
                record = shard.record(batch, number, row)
                assert shard.info.step is not None
                assert shard.info.last_step is not None
                place = (shard.info.step, shard.info.last_step, worker, record.key)
                assert place not in found
                found[place] = record.payload
    return found


def by_step(cache: Path) -> dict[tuple[int, bytes], SparseTarget]:
    """(step, key) -> target, of a cache whose shards hold one step each; a sample of a step stands in one shard only."""
    found: dict[tuple[int, bytes], SparseTarget] = {}
    for (first, last, _, key), payload in records(cache).items():
        assert first == last
        assert (first, key) not in found
        found[first, key] = decode(payload)
    return found


def main(run_file: Path, *overrides: str) -> int:
    """The program."""
    from megatron_kd.pretrain import main as pretrain

    return pretrain(["--config", str(run_file), *overrides])


def killed(run_file: Path, where: str, step: int) -> None:
    """The program with SIGKILL at `where` ("stepped", "staged", "saved") of `step`."""
    from megatron_kd.train.capture import LiveCapture

    name = {"stepped": "end_step", "staged": "stage", "saved": "publish"}[where]
    before, after = where == "saved", where != "saved"
    real, seen = getattr(LiveCapture, name), {"step": -1}
    begin_step = LiveCapture.begin_step

    def noted(self: Any, number: int) -> None:
        seen["step"] = number
        begin_step(self, number)

    def fatal(self: Any) -> None:
        while (
            seen["step"] == step and self._writer._bytes
        ):  # the thread must have reached the same point every time
            time.sleep(0.001)
        if before and seen["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self)
        if after and seen["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    LiveCapture.begin_step = noted  # type: ignore[method-assign]
    setattr(LiveCapture, name, fatal)
    main(run_file)


def full_disk(run_file: Path, limit: int) -> int:
    """The program where no file may be longer than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(run_file)


def counted(jobs: list[tuple[RunConfig, int, bool]]) -> tuple[list[Trained], int]:
    """`run_all` in one process, and how many microbatches were handed to a writer."""
    from megatron_kd.cache.background_writer import BackgroundWriter

    calls = []
    real = BackgroundWriter.put

    def put(self: BackgroundWriter, step: int, tokens: Tensor, target: SparseTarget) -> None:
        calls.append(step)
        real(self, step, tokens, target)

    BackgroundWriter.put = put  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        return run_all(f"file://{folder}/rendezvous", jobs), len(calls)


def poisoned(config: RunConfig, step: int) -> int:
    """A run whose output weight is not a number at `step`: how many steps did not reach the weights."""
    from megatron_kd.models.gpt_model import output_weight
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    run = build_run(config)
    weight = output_weight(run.student.models[-1]).data
    while run.progress.step < config.train.steps:
        good = weight.clone()
        if run.progress.step == step:
            weight[7] = torch.nan
        if not train_step(run).updated:
            weight.copy_(good)
    run.save()
    run.capture.close()
    stop_groups()
    return run.progress.nonfinite_steps


def recomputed(config: RunConfig, checkpoint: Path, step: int) -> list[tuple[bytes, SparseTarget]]:
    """What the teacher at `checkpoint` says of the samples that the run reads at `step`, by key."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.targets.sample_keys import key_from_words
    from megatron_kd.train.build import build_run

    teacher = config.teacher.model_copy(update={"source": "online", "checkpoint": checkpoint})
    checkpoint_section = config.checkpoint.model_copy(
        update={"allow_changes": True}
    )  # it has learnt without a teacher
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
    found = []
    for batch, target in zip(batches, targets, strict=True):
        assert isinstance(target, SparseTarget)
        found += [
            (key_from_words(key), target.map(lambda t, n=n: t[:, n]))
            for n, key in enumerate(batch.sample_keys)
        ]  # type: ignore[misc]
    stop_groups()
    return found


def one_full_disk(rendezvous: str, config: RunConfig, limit: int) -> str:
    """Two replicas, of which the second may write no long file: what each of them is told."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.capture import CaptureError
    from megatron_kd.train.step import train_step

    run = build_run(config, rendezvous=f"{rendezvous}-full")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if run.groups.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    told = "nothing"
    try:
        while run.progress.step < config.train.steps:
            train_step(run)
        run.save()
    except CaptureError as error:
        told = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        run.capture.close()
        stop_groups()
    return told


def pair_of_ranks(
    rendezvous: str, jobs: list[tuple[RunConfig, int, bool]], full: RunConfig, limit: int
) -> tuple[list[Trained], str]:
    """All that needs two ranks, in one world."""
    return run_all(rendezvous, jobs), one_full_disk(rendezvous, full, limit)


def same(one: SparseTarget, other: SparseTarget) -> bool:
    """To the bit."""
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return (one.temperature, one.sampled) == (other.temperature, other.sampled) and all(
        a.equal(b) for a, b in pairs
    )

"""Write the targets of training steps: hidden until a checkpoint, with bounded memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.cache import CacheIdentity, CacheInUse, CacheReader, WrongCache
from megatron_kd.cache.background_writer import BackgroundWriter
from megatron_kd.cache.identity import write_identity
from megatron_kd.cache.staged import StagedWriter, reconcile
from megatron_kd.targets import TopSelection
from megatron_kd.targets.sparse import SparseTarget
from tests.helpers.tiny import VOCAB
from tests.losses.cases import fresh_seed
from tests.train.capture_ranks import equal_targets, records

IDENTITY = CacheIdentity("0" * 64, None, VOCAB, 5, TopSelection(3), "fp32")


def sample(seed: int) -> tuple[torch.Tensor, SparseTarget]:
    """Return tokens [5] and a target [5, 3]."""
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
    """Write two steps per shard.

    A sample that is repeated in a shard is stored once; of several shards the latest step is read.
    """
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
    positions = [(first, last) for first, last, _, _ in records(tmp_path)]
    assert positions == [(0, 1)] * 3 + [(5, 6)] * 3
    assert equal_targets(CacheReader(tmp_path).get(tokens), late)


def test_published_shards_are_never_removed(tmp_path: Path) -> None:
    writer = staged(tmp_path)
    for step in range(6):
        writer.add(step, *sample(fresh_seed()))
    with pytest.raises(CacheInUse, match="is being written by process"):
        staged(tmp_path)
    writer.stage()
    writer.publish()
    writer.add(6, *sample(fresh_seed()))
    writer.stage()
    writer.close()  # a checkpoint may have been written in the meantime
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
    """Block `put` while nothing can be written; then everything arrives."""
    writer, gate = staged(tmp_path, shard_steps=100), threading.Event()
    add, sizes = writer.add, []

    def slow(*arguments: Any) -> None:
        assert gate.wait(60)
        sizes.append(background._bytes)
        add(*arguments)

    writer.add = slow  # type: ignore[method-assign]
    tokens, target = sample(fresh_seed())
    batch = tokens.unsqueeze(0), target.map(lambda t: t.unsqueeze(1))
    size = sum(t.nbytes for t in (batch[0], *batch[1].tensors()))
    background = BackgroundWriter(writer, max_bytes=3 * size)

    def put_all() -> None:
        for step in range(20):
            background.put(step, batch[0] * 0 + step, batch[1])

    producer = threading.Thread(target=put_all)
    producer.start()
    producer.join(0.3)
    assert producer.is_alive()
    assert background._bytes == 3 * size
    gate.set()
    producer.join(60)
    background.stage()
    background.publish()
    background.close()
    assert background.problem is None
    assert len(CacheReader(tmp_path)) == 20
    assert max(sizes) == 3 * size


def test_a_failed_writer_discards_and_reports(tmp_path: Path) -> None:
    """Do not block the training after an error in the thread."""
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

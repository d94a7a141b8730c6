"""Prepare targets of coming steps: in a thread from a cache, in the drain from a model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from megatron_kd.cache import MissingTarget
from megatron_kd.config import ConfigError
from megatron_kd.data.batches import Microbatch
from megatron_kd.targets.sample_keys import key_from_words
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.runtime.cached_teacher import CachedTeacher
from megatron_kd.teacher.runtime.drain import DrainTeacher
from megatron_kd.teacher.teacher import Teacher

CPU = torch.device("cpu")


def microbatch(seed: int) -> Microbatch:
    """Return two samples of five tokens."""
    tokens = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(tokens.shape)
    return Microbatch.of(tokens, tokens, mask, torch.arange(2), within_documents=False)


def target_of(keys: Sequence[bytes]) -> SparseTarget:
    """Return a target [5, 2, 1] whose ids tell the samples apart."""
    ids = torch.tensor([int.from_bytes(key[:2], "big") for key in keys], dtype=torch.int32)
    indices = ids.expand(5, len(keys)).unsqueeze(-1).contiguous()
    return SparseTarget(indices, torch.zeros(indices.shape))


def expected(batch: Microbatch) -> torch.Tensor:
    return target_of([key_from_words(key) for key in batch.sample_keys]).indices


class Reader:
    """Hold the samples of some microbatches; count and delay the reads."""

    def __init__(self, *batches: Microbatch) -> None:
        self.keys = {key_from_words(key) for batch in batches for key in batch.sample_keys}
        self.reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        return [number for number, key in enumerate(keys) if key not in self.keys]

    def get_many(self, keys: Sequence[bytes]) -> SparseTarget:
        assert self.gate.wait(60)
        self.reads += 1
        if self.missing(keys):
            raise MissingTarget("the cache has no sample")
        return target_of(keys)


def upcoming(*batches: Microbatch) -> Future[list[Microbatch]]:
    future: Future[list[Microbatch]] = Future()
    future.set_result(list(batches))
    return future


def cached(reader: Reader, **settings: Any) -> CachedTeacher:
    options = {"device": CPU, "decodes": True, **settings}
    return CachedTeacher(reader, **options)  # type: ignore[arg-type]


class LiveTeacher(Teacher):
    """Give targets by key, and note how many microbatches each call has."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[SparseTarget]:
        self.calls.append(len(microbatches))
        return [
            target_of([key_from_words(key) for key in batch.sample_keys]) for batch in microbatches
        ]


def test_a_prefetched_step_is_decoded_once() -> None:
    batch = microbatch(0)
    reader = Reader(batch)
    teacher = cached(reader)
    teacher.prefetch(upcoming(batch), step=4)
    teacher.wait_for_prefetch(4)
    (target,) = teacher.targets([batch], step=4)
    assert torch.equal(target.indices, expected(batch))
    assert reader.reads == 1


def test_decoding_does_not_hold_up_the_caller() -> None:
    batch = microbatch(0)
    reader = Reader(batch)
    reader.gate.clear()
    teacher = cached(reader)
    teacher.prefetch(upcoming(batch), step=1)
    assert reader.reads == 0
    reader.gate.set()
    assert teacher.targets([batch], step=1)[0] is not None


def test_another_step_than_the_prefetched_one_is_read() -> None:
    first, second = microbatch(0), microbatch(1)
    teacher = cached(Reader(first, second))
    teacher.prefetch(upcoming(first), step=1)
    (target,) = teacher.targets([second], step=2)
    assert torch.equal(target.indices, expected(second))


def test_held_out_data_does_not_use_up_the_prefetched_step() -> None:
    batch, held_out = microbatch(0), microbatch(1)
    reader = Reader(batch, held_out)
    teacher = cached(reader)
    teacher.prefetch(upcoming(batch), step=1)
    (target,) = teacher.targets([held_out])
    assert torch.equal(target.indices, expected(held_out))
    assert teacher.targets([batch], step=1)[0] is not None
    assert reader.reads == 2


def test_missing_training_data_is_an_error() -> None:
    teacher = cached(Reader())
    teacher.prefetch(upcoming(microbatch(0)), step=1)
    teacher.wait_for_prefetch(1)
    with pytest.raises(ConfigError, match=r"teacher.cache: .*tools/cache_teacher.py"):
        teacher.targets([microbatch(0)], step=1)


def test_missing_held_out_data_has_no_target() -> None:
    known, unknown = microbatch(0), microbatch(1)
    targets = cached(Reader(known)).targets([known, unknown])
    assert targets[0] is not None
    assert targets[1] is None


def test_the_fallback_serves_missing_samples() -> None:
    known, unknown = microbatch(0), microbatch(1)
    live = LiveTeacher()
    teacher = cached(Reader(known), fallback=live, decodes=False)
    teacher.prefetch(upcoming(known, unknown), step=1)
    targets = teacher.targets([known, unknown], step=1)
    assert torch.equal(targets[1].indices, expected(unknown))
    assert live.calls == [1]


def test_ranks_without_the_last_stage_do_not_decode() -> None:
    batch = microbatch(0)
    reader = Reader(batch)
    teacher = cached(reader, decodes=False)
    teacher.prefetch(upcoming(batch), step=1)
    assert teacher.targets([batch], step=1) == [None]
    assert reader.reads == 0


def test_the_drain_computes_the_coming_step() -> None:
    batch, live = microbatch(0), LiveTeacher()
    teacher = DrainTeacher(live, CPU)
    teacher.prefetch(upcoming(batch), step=2)
    teacher.on_drained()
    assert live.calls == [1]
    (target,) = teacher.targets([batch], step=2)
    assert torch.equal(target.indices, expected(batch))
    assert live.calls == [1]


def test_validation_between_drain_and_step_is_computed_at_once() -> None:
    batch, held_out, live = microbatch(0), microbatch(1), LiveTeacher()
    teacher = DrainTeacher(live, CPU)
    teacher.prefetch(upcoming(batch), step=2)
    teacher.on_drained()
    (target,) = teacher.targets([held_out])
    assert torch.equal(target.indices, expected(held_out))
    teacher.targets([batch], step=2)
    assert live.calls == [1, 1]


def test_the_last_step_has_no_work_in_its_drain() -> None:
    live = LiveTeacher()
    teacher = DrainTeacher(live, CPU)
    teacher.prefetch(None, step=5)
    teacher.on_drained()
    assert live.calls == []

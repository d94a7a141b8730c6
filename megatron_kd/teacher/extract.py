"""Run a teacher once over a data set and store its targets, shard by shard.

Shard i holds the samples i * n .. (i + 1) * n - 1 of the data in the order in which they are cut,
whoever writes it: writer w of W takes the shards with i mod W = w. So a job that was killed can
continue with any number of writers, and its records are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_kd.cache import (
    CacheIdentity,
    CacheInUse,
    CacheReader,
    CacheWriter,
    MissingTarget,
    WrongCache,
)
from megatron_kd.cache.shard import Shard
from megatron_kd.cache.writer import lock_writer
from megatron_kd.config import RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.data.prefix_samples import PrefixSamples
from megatron_kd.parallel.collectives import from_rank_zero, raise_together
from megatron_kd.targets.sample_keys import KEY_BYTES, sample_key
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.runtime.targets import cache_identity
from megatron_kd.teacher.source import TeacherInputs, teacher_source
from megatron_kd.teacher.teacher import Teacher

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups


@dataclass(frozen=True)
class ShardPlan:
    """Assign samples to shards.

    Attributes:
        parts: the prefixes of the data.
        shard_samples: samples of one shard.
        first_samples: store no more than these; None: all.
    """

    parts: Sequence[PrefixSamples]
    shard_samples: int
    first_samples: int | None = None

    @property
    def num_samples(self) -> int:
        """Return the number of samples of all shards together."""
        total = sum(map(len, self.parts))
        return total if self.first_samples is None else min(total, self.first_samples)

    @property
    def num_shards(self) -> int:
        """Return the number of shards of the complete cache."""
        return -(-self.num_samples // self.shard_samples)

    def samples(self, shard: int) -> list[torch.Tensor]:
        """Return the marked tokens int64 [S] of the samples of a shard (see `TokenDataset`)."""
        start = shard * self.shard_samples
        stop = min(start + self.shard_samples, self.num_samples)
        return [self.sample(number) for number in range(start, stop)]

    def end_keys(self, shard: int) -> tuple[bytes, bytes]:
        """Return the keys of the first and the last sample of a shard."""
        start = shard * self.shard_samples
        stop = min(start + self.shard_samples, self.num_samples)
        return sample_key(self.sample(start)), sample_key(self.sample(stop - 1))

    def sample(self, number: int) -> torch.Tensor:
        """Return the marked tokens int64 [S] of a sample."""
        for part in self.parts:
            if number < len(part):
                return part.read(number)["marked_tokens"]
            number -= len(part)
        raise IndexError(number)


@dataclass(frozen=True)
class Extraction:
    """Describe how this process stores targets.

    Attributes:
        plan: which sample belongs to which shard.
        directory: the cache.
        identity: of the cache.
        writes: this rank writes; one rank of each model-parallel group does.
        worker: number of this writer.
        micro_batch_size: samples of one forward pass.
        num_microbatches: forward passes of one pipeline schedule.
        device: where the teacher runs.
    """

    plan: ShardPlan
    directory: Path
    identity: CacheIdentity
    writes: bool
    worker: int
    micro_batch_size: int
    num_microbatches: int
    device: torch.device


def build_extraction(
    config: RunConfig, inputs: TeacherInputs, groups: Groups, *, value_encoding: str
) -> tuple[Teacher, CacheIdentity]:
    """Build the teacher of a run file, ready to be stored, and the identity of its cache.

    Args:
        config: the run.
        inputs: its checked teacher.
        groups: of the run.
        value_encoding: how the cache stores log-probabilities.

    Collectives:
        Over the world.
    """
    source = teacher_source(config)
    digest = source.weights_digest(inputs)
    teacher = source.build_for_extraction(inputs, groups)
    assert digest is not None
    identity = cache_identity(config, inputs, teacher=digest, value_encoding=value_encoding)
    return teacher, identity


def finished_shards(directory: Path, plan: ShardPlan, identity: CacheIdentity) -> set[int]:
    """Return the numbers of the plan's shards that are complete in `directory`. No collective.

    A shard that ends earlier than in the plan, as the last one of fewer samples does, is not
    complete.

    Raises:
        WrongCache: the cache belongs to something else, or a shard begins with another sample than
            the plan's.
        CorruptCache: a file of the cache is damaged.
    """
    try:
        shards = CacheReader(directory, expect=identity).shards
    except MissingTarget:
        return set()
    numbers = ((_shard_number(shard, plan), shard) for shard in shards)
    return {
        number
        for number, shard in numbers
        if number < plan.num_shards and _is_complete(shard, plan, number)
    }


def _shard_number(shard: Shard, plan: ShardPlan) -> int:
    """Return the number in a shard's file name; plan.num_shards if it has none."""
    name = shard.path.rsplit("/", 1)[-1].removesuffix(".arrow")
    return int(name.removeprefix("shard-")) if name.startswith("shard-") else plan.num_shards


def _is_complete(shard: Shard, plan: ShardPlan, number: int) -> bool:
    first, last = plan.end_keys(number)
    keys = b"".join(joined for _, joined in shard.keys())
    if not keys.startswith(first):
        raise WrongCache(
            f"{shard.path} begins with the sample {keys[:KEY_BYTES].hex()}, this command's shard "
            f"{number} with {first.hex()}: it was made from other data or with another "
            "--shard-samples; use those again, or another folder"
        )
    return any(keys[start : start + KEY_BYTES] == last for start in range(0, len(keys), KEY_BYTES))


@contextmanager
def sole_writer(directory: Path, worker: int, *, writes: bool) -> Iterator[None]:
    """Lock the file of writer `worker` in `directory` inside `with`, on ranks that write.

    Args:
        directory: the cache.
        worker: number of this writer.
        writes: this rank writes.

    Raises:
        CacheInUse: on every rank, naming its process, if another job holds it.

    Collectives:
        Over the world.
    """
    lock, problem = None, None
    if writes:
        try:
            lock = lock_writer(directory / f".job-{worker:05d}.lock")
        except CacheInUse as error:
            problem = str(error)
    try:
        raise_together(problem, CacheInUse)
        yield
    finally:
        if lock is not None:
            lock.release()


def agree_on_finished(directory: Path, plan: ShardPlan, identity: CacheIdentity) -> set[int]:
    """Return `finished_shards` as rank 0 sees them, or raise its error on every rank.

    Collectives:
        One broadcast over the world.
    """
    return from_rank_zero(lambda: finished_shards(directory, plan, identity))


def extract_shard(teacher: Teacher, extraction: Extraction, shard: int) -> int:
    """Store one shard, and return the number of its tokens.

    Collective over the teacher's model-parallel ranks, which all call it alike.
    """
    samples = extraction.plan.samples(shard)
    within_documents = extraction.identity.document_attention == "within"
    batches = list(
        make_microbatches(samples, extraction.micro_batch_size, extraction.device, within_documents)
    )
    writer = None
    if extraction.writes:
        writer = CacheWriter(
            extraction.directory, extraction.identity, worker=extraction.worker, shard=shard
        )
    try:
        for start in range(0, len(batches), extraction.num_microbatches):
            _store(teacher, batches[start : start + extraction.num_microbatches], writer)
        if writer is not None:
            writer.close()
            writer = None
    finally:
        if writer is not None:
            writer.abandon()
    return len(samples) * samples[0].numel()


SampleBatch = tuple[list[torch.Tensor], Microbatch]


def _store(teacher: Teacher, batches: Sequence[SampleBatch], writer: CacheWriter | None) -> None:
    """Run the teacher on some batches and write their targets."""
    targets = teacher.targets([microbatch for _, microbatch in batches])
    if writer is None:
        return
    for (samples, _), target in zip(batches, targets, strict=True):
        assert isinstance(target, SparseTarget)
        local = target.map(torch.Tensor.cpu)
        for number, marked_tokens in enumerate(samples):
            writer.add(marked_tokens, _sample_target(local, number))


def _sample_target(target: SparseTarget, number: int) -> SparseTarget:
    """Return [S, K], one sample of a target [S, B, K]."""
    return target.map(lambda tensor: tensor[:, number])


def make_microbatches(
    samples: list[torch.Tensor], size: int, device: torch.device, within_documents: bool
) -> Iterator[SampleBatch]:
    """Yield samples `size` at a time, with their microbatch.

    Args:
        samples: marked tokens int64 [S].
        size: samples of a microbatch; the last sample fills up the last one.
        device: where the microbatches go.
        within_documents: tokens see their own document only.
    """
    for start in range(0, len(samples), size):
        batch_samples = samples[start : start + size]
        filling = [batch_samples[-1]] * (size - len(batch_samples))
        marked_tokens = torch.stack([*batch_samples, *filling])
        microbatch = Microbatch.of(
            marked_tokens,
            torch.full_like(marked_tokens, -100),
            torch.zeros(marked_tokens.shape),
            torch.arange(start, start + size),
            within_documents=within_documents,
        )
        yield batch_samples, microbatch.to(device)

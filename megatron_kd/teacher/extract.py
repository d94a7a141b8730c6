"""Running a teacher once over a data set and storing what it says, shard by shard.

Shard i holds the samples i * n .. (i + 1) * n - 1 of the data in the order in which they are cut, whoever writes it: writer w of
W takes the shards with i mod W = w. So a job that was killed goes on with any number of writers, and its records are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_kd.cache import (
    CacheIdentity,
    CacheInUse,
    CacheReader,
    CacheWriter,
    MissingTarget,
    WrongCache,
)
from megatron_kd.cache.writer import lock_writer
from megatron_kd.data.batches import Microbatch
from megatron_kd.data.prefix_samples import PrefixSamples
from megatron_kd.parallel.collectives import from_rank_zero, raise_together
from megatron_kd.targets.keys import KEY_BYTES, sample_key
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.source import TeacherSource


@dataclass(frozen=True)
class ShardPlan:
    """Which samples go into which shard. parts: the prefixes of the data; first_samples: no more than these; None: all."""

    parts: Sequence[PrefixSamples]
    shard_samples: int
    first_samples: int | None = None

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        whole = sum(map(len, self.parts))
        return whole if self.first_samples is None else min(whole, self.first_samples)

    @property
    def num_shards(self) -> int:
        """Shards of the complete cache."""
        return -(-self.num_samples // self.shard_samples)

    def samples(self, shard: int) -> list[torch.Tensor]:
        """Tokens int64 [S] of the samples of a shard, as `TokenDataset` names them."""
        start = shard * self.shard_samples
        return [
            self.sample(number)
            for number in range(start, min(start + self.shard_samples, self.num_samples))
        ]

    def ends(self, shard: int) -> tuple[bytes, bytes]:
        """Names of the first and the last sample of a shard."""
        start = shard * self.shard_samples
        return sample_key(self.sample(start)), sample_key(
            self.sample(min(start + self.shard_samples, self.num_samples) - 1)
        )

    def sample(self, number: int) -> torch.Tensor:
        """Tokens int64 [S] of a sample."""
        for part in self.parts:
            if number < len(part):
                return part.read(number)["marked_tokens"]
            number -= len(part)
        raise IndexError(number)


def finished_shards(directory: Path, plan: ShardPlan, identity: CacheIdentity) -> set[int]:
    """Numbers of the plan's shards that are complete in `directory`. No collective.

    A shard that ends earlier than in the plan, as the last one of fewer samples does, is not complete.

    Raises:
        WrongCache: the cache is of something else, or a shard begins with another sample than the plan's. CorruptCache.
    """
    try:
        shards = CacheReader(directory, expect=identity).shards
    except MissingTarget:
        return set()
    found = set()
    for shard in shards:
        name = shard.path.rsplit("/", 1)[-1].removesuffix(".arrow")
        number = int(name.removeprefix("shard-")) if name.startswith("shard-") else plan.num_shards
        if number >= plan.num_shards:
            continue
        first, last = plan.ends(number)
        keys = b"".join(joined for _, joined in shard.keys())
        if not keys.startswith(first):
            raise WrongCache(
                f"{shard.path} begins with the sample {keys[:KEY_BYTES].hex()}, this command's shard {number} with {first.hex()}: it was "
                "made from other data or with another --shard-samples; use those again, or another folder"
            )
        if any(keys[start : start + KEY_BYTES] == last for start in range(0, len(keys), KEY_BYTES)):
            found.add(number)
    return found


@contextmanager
def sole_writer(directory: Path, worker: int, *, writes: bool) -> Iterator[None]:
    """Holds the place of writer `worker` in `directory` for a whole job, on ranks that write. Collective over the world.

    CacheInUse on every rank where another job has it, naming its process.
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
    """`finished_shards` as rank 0 sees them. One broadcast over the world; rank 0's errors are every rank's."""
    return from_rank_zero(lambda: finished_shards(directory, plan, identity))


def extract(
    teacher: TeacherSource,
    plan: ShardPlan,
    shards: Sequence[int],
    directory: Path,
    identity: CacheIdentity,
    *,
    writes: bool,
    worker: int,
    micro_batch_size: int,
    num_microbatches: int,
    device: torch.device,
    done: Callable[[int], None] = lambda tokens: None,
    finished: Callable[[int], None] = lambda shard: None,
) -> None:
    """Write `shards`. Collective over the teacher's model-parallel ranks, which all call it alike; `writes` is true on one of them.

    micro_batch_size: samples of one forward pass; num_microbatches: passes of one pipeline schedule. done: told
    of tokens; finished: of shards.
    """
    for shard in shards:
        samples = plan.samples(shard)
        batches = list(
            microbatches(samples, micro_batch_size, device, identity.document_attention == "within")
        )
        writer = CacheWriter(directory, identity, worker=worker, shard=shard) if writes else None
        try:
            for start in range(0, len(batches), num_microbatches):
                group = batches[start : start + num_microbatches]
                found = teacher.targets([batch for _, batch in group])
                for (rows, _), target in zip(group, found, strict=True):
                    if writer is not None:
                        assert isinstance(target, SparseTarget)
                        _add(writer, rows, target)
                done(sum(len(rows) for rows, _ in group) * samples[0].numel())
            if writer is not None:
                writer.close()
                writer = None
            finished(shard)
        finally:
            if writer is not None:
                writer.abandon()


def microbatches(
    samples: list[torch.Tensor], size: int, device: torch.device, within_documents: bool
) -> Iterator[tuple[list[torch.Tensor], Microbatch]]:
    """Samples in passes of `size`, with the passes; the last one is filled up with its last sample."""
    for start in range(0, len(samples), size):
        rows = samples[start : start + size]
        named = torch.stack([*rows, *[rows[-1]] * (size - len(rows))])
        batch = Microbatch.of(
            named,
            torch.full_like(named, -100),
            torch.zeros(named.shape),
            torch.arange(start, start + size),
            within_documents=within_documents,
        )
        yield rows, batch.to(device)


def _add(writer: CacheWriter, rows: list[torch.Tensor], target: SparseTarget) -> None:
    """target [S, B, K] of B >= len(rows) samples."""
    local = target.map(lambda t: t.cpu())
    for number, tokens in enumerate(rows):
        writer.add(tokens, local.map(lambda t, number=number: t[:, number]))  # type: ignore[misc]

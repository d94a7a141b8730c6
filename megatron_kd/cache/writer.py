"""Write a cache: records into shards, which are committed one by one under one lock per writer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_kd.cache.encode import encode
from megatron_kd.cache.identity import CacheIdentity, CacheInUse, write_identity
from megatron_kd.cache.shard import Record, ShardWriter
from megatron_kd.storage.directory_lock import DirectoryLock, DirectoryLockedError
from megatron_kd.targets.sample import SampleSelection
from megatron_kd.targets.sample_keys import sample_key
from megatron_kd.targets.sparse import SparseTarget


def lock_writer(path: Path) -> DirectoryLock:
    """Lock the folder of `path` for one writer.

    `path` is the lock file; each writer's name has its own.
    The operating system frees the lock when the process ends.

    Raises:
        CacheInUse: another process holds the lock; the message names it.
    """
    try:
        return DirectoryLock(path.parent, file_name=path.name, heartbeat=None)
    except DirectoryLockedError as error:
        owner = error.owner or "a process that did not record its name"
        raise CacheInUse(
            f"{path.parent} is being written by {owner}: wait for it, stop it, or write elsewhere"
        ) from error


class CacheWriter:
    """Add samples to the cache in `directory`.

    As a context manager it commits the open shard at its end, and drops it after an error.

    Args:
        directory: created where it is missing; may hold shards of the same identity.
        identity: of the cache.
        worker: number of this writer; concurrent writers need different numbers.
        shard: write this one shard, replacing it; None: new shards of `shard_samples` samples one
            after the other.
        shard_samples: samples per shard.
        step: the teacher's training step, stored with every shard.

    Raises:
        WrongCache: the directory holds something else.
        CacheInUse: another process, which the message names, writes as this worker.
        OSError: the disk is full, or not writable; finished shards stay, the open one is removed.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: CacheIdentity,
        *,
        worker: int = 0,
        shard: int | None = None,
        shard_samples: int = 4096,
        step: int | None = None,
    ) -> None:
        if worker < 0 or shard_samples < 1 or (shard is not None and shard < 0):
            raise ValueError(
                f"worker ({worker}) and shard ({shard}) count from 0, shard_samples "
                f"({shard_samples}) from 1"
            )
        self.directory, self.identity, self.step = Path(directory), identity, step
        self._worker, self._fixed, self._shard_samples = worker, shard, shard_samples
        self._open: ShardWriter | None = None
        self._added: set[bytes] = set()
        write_identity(self.directory, identity)
        self._lock = lock_writer(self.directory / f".writer-{worker:05d}.lock")
        # Remove the leftovers of a writer that was killed.
        for leftover in self.directory.glob(f".{self._prefix}*.partial-*"):
            leftover.unlink()

    @property
    def _prefix(self) -> str:
        return (
            f"shard-{self._fixed:08d}" if self._fixed is not None else f"worker-{self._worker:05d}-"
        )

    def _new_shard(self) -> ShardWriter:
        name = self._prefix
        if self._fixed is None:
            numbers = [
                int(path.stem.rsplit("-", 1)[1]) for path in self.directory.glob(f"{name}*.arrow")
            ]
            name += f"{max(numbers, default=-1) + 1:06d}"
        return ShardWriter(self.directory, name, self.identity, step=self.step)

    def add(self, tokens: Tensor, target: SparseTarget) -> None:
        """Add one sample, unless this shard holds it already.

        Args:
            tokens: int [S].
            target: [S, K].

        Raises:
            ValueError: the sample does not fit the cache's identity.
        """
        check_sample(tokens, target, self.identity)
        key = sample_key(tokens)
        if key in self._added:
            return
        record = make_record(key, target, self.identity)
        if self._open is None:
            self._open = self._new_shard()
        self._open.add(record)
        self._added.add(key)
        if self._fixed is None and self._open.records >= self._shard_samples:
            self._commit()

    def _commit(self) -> None:
        if self._open is not None:
            self._open.commit()
            self._open = None
            self._added.clear()

    def close(self) -> None:
        """Commit the open shard and release the lock."""
        try:
            self._commit()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop the open shard and release the lock."""
        if self._open is not None:
            self._open.discard()
            self._open = None
        self._lock.release()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def check_sample(tokens: Tensor, target: SparseTarget, identity: CacheIdentity) -> None:
    """Raise ValueError unless tokens [S] and target [S, K] fit a cache of this identity."""
    if tokens.shape != (identity.sequence_length,) or target.indices.shape[0] != len(tokens):
        raise ValueError(
            f"tokens {tuple(tokens.shape)} with a target {tuple(target.indices.shape)}: this "
            "cache holds samples of "
            f"{identity.sequence_length} tokens with K entries each"
        )
    if int(target.indices.max()) >= identity.vocab_size:
        raise ValueError(
            f"id {int(target.indices.max())} is past the vocabulary of {identity.vocab_size} ids"
        )


def make_record(key: bytes, target: SparseTarget, identity: CacheIdentity) -> Record:
    """Return the record of a sample.

    Args:
        key: of the sample.
        target: [S, K], on any device.
        identity: of the cache.

    Raises:
        ValueError: the target cannot be stored.
    """
    payload = encode(
        target.map(lambda t: t.detach().cpu()),
        value_encoding=identity.value_encoding,
        num_draws=_draws(identity),
    )
    return Record(key, target.indices.shape[0], payload)


def _draws(identity: CacheIdentity) -> int | None:
    """Return num_draws from the text of a sampled selection; None for another selection."""
    text = str(identity.selection)
    if not text.startswith(f"{SampleSelection.__name__}(num_draws="):
        return None
    return int(text.split("=", 1)[1].split(",", 1)[0])

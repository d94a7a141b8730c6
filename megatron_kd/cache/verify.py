"""Summarize, verify, repair and merge whole caches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_kd.cache.decode import decode
from megatron_kd.cache.identity import (
    IDENTITY_FILE,
    CacheError,
    CacheIdentity,
    CorruptCache,
    parse_identity,
    write_identity,
)
from megatron_kd.cache.reader import CacheFiles, CacheReader, check_record
from megatron_kd.cache.sample_record import BadRecordError
from megatron_kd.cache.shard import Record, Shard, ShardWriter, parse_info
from megatron_kd.cache.writer import lock_writer
from megatron_kd.storage.atomic_files import file_digest


@dataclass
class CacheStatistics:
    """Hold sums over the tokens of some records.

    Attributes:
        samples: number of records.
        tokens: number of tokens.
        bytes: of the payloads.
        entries: kept entries of all tokens.
        mass: sum of the kept mass.
        entropy: sum of the teacher's entropy, nats.
        kept: [K + 1], tokens by number of entries.
    """

    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    entries: int = 0
    mass: float = 0.0
    entropy: float = 0.0
    kept: list[int] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Count one record."""
        target = decode(record.payload)
        used = (target.indices >= 0).sum(1).numpy()
        counts = np.bincount(used, minlength=max(len(self.kept), target.indices.shape[1] + 1))
        counts[: len(self.kept)] += np.array(self.kept, dtype=np.int64)
        self.kept = counts.tolist()
        self.samples += 1
        self.tokens += record.tokens
        self.bytes += len(record.payload)
        self.entries += int(used.sum())
        self.mass += float(target.logprobs.double().exp().sum())
        self.entropy += (
            float(target.entropy.double().sum()) if target.entropy is not None else float("nan")
        )

    def summary(self) -> dict[str, float]:
        """Return means per token."""
        tokens = max(self.tokens, 1)
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / tokens,
            "entries_per_token": self.entries / tokens,
            "kept_mass": self.mass / tokens,
            "entropy": self.entropy / tokens,
        }


def iterate_records(reader: CacheReader) -> Iterator[Record]:
    """Yield every record of the cache, shard by shard, after comparing its checksum."""
    for shard in reader.shards:
        yield from _iterate_shard(shard)


def _iterate_shard(shard: Shard) -> Iterator[Record]:
    for number in range(shard.num_batches):
        batch = shard.batch(number)
        for record_number in range(batch.num_rows):
            yield shard.record(batch, number, record_number)


def statistics(reader: CacheReader, samples: int | None = None) -> CacheStatistics:
    """Return the statistics of the first `samples` records; None: of all."""
    sums = CacheStatistics()
    for number, record in enumerate(iterate_records(reader)):
        if number == samples:
            break
        sums.add(record)
    return sums


def verify(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Read every byte of a cache.

    Returns:
        What is wrong by shard name (or file name), and the files that belong to no finished shard.
    """
    storage = CacheFiles(directory)
    names = storage.list()
    problems: dict[str, str] = {}
    try:
        identity = parse_identity(storage.read(IDENTITY_FILE), storage.path(IDENTITY_FILE))
    except CacheError as error:
        return {IDENTITY_FILE: str(error)}, []
    described = set()
    for name in names:
        if name.endswith(".json") and name != IDENTITY_FILE and not name.startswith("."):
            described.add(name.removesuffix(".json") + ".arrow")
            try:
                _verify_shard(storage, directory, name, identity)
            except CacheError as error:
                problems[name.removesuffix(".json")] = str(error)
    unfinished = [
        name
        for name in names
        if (name.endswith(".arrow") and name not in described) or ".partial-" in name
    ]
    return problems, unfinished


def _verify_shard(storage: CacheFiles, directory: Path, name: str, identity: CacheIdentity) -> None:
    info = parse_info(storage.read(name), storage.path(name))
    path = directory / info.file
    if not path.exists():
        raise CorruptCache(f"{path} is missing")
    digest, damage = file_digest(path), None
    try:
        _verify_records(Shard(str(path), storage.open(info.file), info, identity))
    except CorruptCache as error:
        damage = error
    if digest != info.sha256:
        raise CorruptCache(
            f"{path}: SHA-256 {digest}, expected {info.sha256}; "
            f"{damage or 'each of its records is intact'}"
        )
    if damage is not None:
        raise damage


def _verify_records(shard: Shard) -> None:
    path, info, identity = shard.path, shard.info, shard.identity
    num_records = 0
    for record in _iterate_shard(shard):
        num_records += 1
        try:
            check_record(record, identity)
        except BadRecordError as error:
            raise CorruptCache(f"{path}: record {record.key.hex()}: {error}") from error
    if num_records != info.records:
        raise CorruptCache(f"{path}: {num_records} records, expected {info.records}")


def remove_shard(directory: Path, shard: str) -> None:
    """Remove a damaged shard, so that the next extraction writes it again.

    Its description is removed first.
    """
    for ending in (".json", ".arrow"):
        (directory / f"{shard}{ending}").unlink(missing_ok=True)


def merge(sources: list[Path], directory: Path) -> int:
    """Gather finished shards of caches of the same identity in `directory`, under new names.

    Args:
        sources: the caches.
        directory: the merged cache, new or of the same identity.

    Returns:
        The number of added shards.

    Raises:
        WrongCache: the identities differ; nothing has been copied.
        CorruptCache: a shard is damaged.
    """
    readers = [CacheReader(source) for source in sources]
    for reader in readers[1:]:
        reader.identity.check(readers[0].identity, reader.storage.name)
    write_identity(directory, readers[0].identity)
    lock = lock_writer(directory / ".merge.lock")
    try:
        first_number = len(list(directory.glob("merged-*.arrow")))
        count = 0
        known_keys = set(CacheReader(directory).keys())
        for reader in readers:
            for shard in reader.shards:
                count += _copy(
                    shard,
                    directory,
                    f"merged-{first_number + count:06d}",
                    reader.identity,
                    known_keys,
                )
        return count
    finally:
        lock.release()


def _copy(
    shard: Shard, directory: Path, name: str, identity: CacheIdentity, known_keys: set[bytes]
) -> int:
    """Copy a shard's records that are not known yet; return the number of written shards.

    Where shards have training steps, which distinguish them, all records are copied.
    """
    if shutil.disk_usage(directory).free < shard.info.bytes:
        raise OSError(28, f"no space for {shard.path} in {directory}")
    writer = ShardWriter(directory, name, identity, step=shard.info.step)
    try:
        for record in _iterate_shard(shard):
            if record.key not in known_keys or shard.info.step is not None:
                writer.add(record)
                known_keys.add(record.key)
        if not writer.records:
            writer.discard()
            return 0
        writer.commit(last_step=shard.info.last_step)
        return 1
    except BaseException:
        writer.discard()
        raise

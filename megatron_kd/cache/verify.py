"""Looking at a cache as a whole: what it holds, whether it is sound, and several made into one."""

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
    """Sums over the tokens looked at. kept: [K + 1], tokens by number of entries."""

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
        """Means per token."""
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
    """Every record of the cache, shard by shard, its checksum compared."""
    for shard in reader.shards:
        yield from _records_of(shard)


def _records_of(shard: Shard) -> Iterator[Record]:
    for number in range(shard.num_batches):
        batch = shard.batch(number)
        for row in range(batch.num_rows):
            yield shard.record(batch, number, row)


def statistics(reader: CacheReader, samples: int | None = None) -> CacheStatistics:
    """Of the first `samples` records; None: of all."""
    found = CacheStatistics()
    for number, record in enumerate(iterate_records(reader)):
        if number == samples:
            break
        found.add(record)
    return found


def verify(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Reads every byte. Returns what is wrong with which file, and files that belong to no finished shard."""
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
    strays = [
        name
        for name in names
        if (name.endswith(".arrow") and name not in described) or ".partial-" in name
    ]
    return problems, strays


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
            f"{path}: SHA-256 {digest}, expected {info.sha256}; {damage or 'each of its records is sound'}"
        )
    if damage is not None:
        raise damage


def _verify_records(shard: Shard) -> None:
    path, info, identity = shard.path, shard.info, shard.identity
    found = 0
    for record in _records_of(shard):
        found += 1
        try:
            check_record(record, identity)
        except BadRecordError as error:
            raise CorruptCache(f"{path}: record {record.key.hex()}: {error}") from error
    if found != info.records:
        raise CorruptCache(f"{path}: {found} records, expected {info.records}")


def remove_shard(directory: Path, shard: str) -> None:
    """Remove a bad shard, so that the next extraction writes it again; its description goes first."""
    for ending in (".json", ".arrow"):
        (directory / f"{shard}{ending}").unlink(missing_ok=True)


def merge(sources: list[Path], directory: Path) -> int:
    """Gather finished shards of caches of the same identity in `directory`, under new names. Returns the number of shards.

    WrongCache where they differ, before anything is copied; CorruptCache for a shard that is not sound.
    """
    readers = [CacheReader(source) for source in sources]
    for reader in readers[1:]:
        reader.identity.check(readers[0].identity, reader.storage.name)
    write_identity(directory, readers[0].identity)
    lock = lock_writer(directory / ".merge.lock")
    try:
        start = len(list(directory.glob("merged-*.arrow")))
        count = 0
        seen = set(CacheReader(directory).keys())
        for reader in readers:
            for shard in reader.shards:
                count += _copy(
                    shard, directory, f"merged-{start + count:06d}", reader.identity, seen
                )
        return count
    finally:
        lock.release()


def _copy(
    shard: Shard, directory: Path, name: str, identity: CacheIdentity, seen: set[bytes]
) -> int:
    """A shard's records that are not yet there (all of them where shards have training steps, which tell them apart)."""
    if shutil.disk_usage(directory).free < shard.info.bytes:
        raise OSError(28, f"no space for {shard.path} in {directory}")
    writer = ShardWriter(directory, name, identity, step=shard.info.step)
    try:
        for record in _records_of(shard):
            if record.key not in seen or shard.info.step is not None:
                writer.add(record)
                seen.add(record.key)
        if not writer.records:
            writer.discard()
            return 0
        writer.commit(last_step=shard.info.last_step)
        return 1
    except BaseException:
        writer.discard()
        raise

"""Reading a cache: a sample's target by the sample's tokens, from local files or any fsspec URL."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from megatron_kd.cache.decode import decode, decode_many
from megatron_kd.cache.identity import (
    IDENTITY_FILE,
    CacheIdentity,
    CorruptCache,
    MissingTarget,
    parse_identity,
)
from megatron_kd.cache.sample_record import BadRecordError
from megatron_kd.cache.shard import Record, Shard, ShardInfo, parse_info, readable
from megatron_kd.targets.keys import KEY_BYTES, sample_key
from megatron_kd.targets.sparse import SparseTarget

OPEN_BATCHES = 256  # record batches kept at hand; they are views of a memory map


class CacheFiles:
    """The files of one folder: a path, or a URL that fsspec knows (s3://, gs://, memory://, ...)."""

    def __init__(self, directory: str | Path) -> None:
        self.name = str(directory).rstrip("/")
        self._remote: Any = None
        if "://" in self.name:
            import fsspec  # only those who name a URL need it

            self._remote, self._root = fsspec.core.url_to_fs(self.name)

    def list(self) -> list[str]:
        """Names in the folder, sorted; MissingTarget where there is no such folder."""
        try:
            paths = (
                self._remote.ls(self._root, detail=False)
                if self._remote
                else [str(path) for path in Path(self.name).iterdir()]
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingTarget(f"there is no teacher cache at {self.name}") from error
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def path(self, name: str) -> str:
        """For messages."""
        return f"{self.name}/{name}"

    def read(self, name: str) -> bytes:
        """The content of a small file; CorruptCache where it is missing."""
        try:
            if self._remote:
                return bytes(self._remote.cat_file(f"{self._root}/{name}"))
            return Path(self.name, name).read_bytes()
        except OSError as error:
            raise CorruptCache(f"{self.path(name)} cannot be read: {error}") from error

    def open(self, name: str) -> pa.NativeFile:
        """A large file: mapped into memory where it is local."""
        with readable(self.path(name)):
            if self._remote:
                return pa.PythonFile(self._remote.open(f"{self._root}/{name}", "rb"), mode="r")
            return pa.memory_map(str(Path(self.name, name)), "r")


class RecordPosition(NamedTuple):
    """Where a record is."""

    shard: int
    batch: int
    row: int


def read_identity(storage: CacheFiles) -> CacheIdentity:
    """What a cache is, from its one small file. MissingTarget where there is none, CorruptCache."""
    if IDENTITY_FILE not in storage.list():
        raise MissingTarget(
            f"there is no teacher cache at {storage.name}: it has no {IDENTITY_FILE}"
        )
    return parse_identity(storage.read(IDENTITY_FILE), storage.path(IDENTITY_FILE))


class CacheReader:
    """Targets by the tokens they belong to. Threads may share it; processes each open their own.

    Opening reads the keys of every record (28 bytes a sample stay in memory) and each shard's size, not its content; every
    record's checksum is compared when it is read. Shards that were not finished do not exist for it. Where several shards
    hold a sample, the one of the latest training step is read.

    Args:
        directory: a path, or a URL for fsspec.
        expect: what the cache must be; None: whatever it is.
    Raises:
        MissingTarget: there is no cache. WrongCache: it is of something else; every difference is named. CorruptCache.
    """

    def __init__(self, directory: str | Path, *, expect: CacheIdentity | None = None) -> None:
        self.storage = CacheFiles(directory)
        self.identity = read_identity(self.storage)
        if expect is not None:
            self.identity.check(expect, self.storage.name)
        names = self.storage.list()
        infos = [
            name
            for name in names
            if name.endswith(".json") and name != IDENTITY_FILE and not name.startswith(".")
        ]
        self.shards = [self._open_shard(name, set(names)) for name in infos]
        self._index()
        self._batches: OrderedDict[tuple[int, int], pa.RecordBatch] = OrderedDict()
        self._guard = Lock()

    def _open_shard(self, name: str, names: set[str]) -> Shard:
        info: ShardInfo = parse_info(self.storage.read(name), self.storage.path(name))
        if info.file not in names:
            raise CorruptCache(
                f"{self.storage.path(info.file)} is missing, but {name} says it holds {info.records} records"
            )
        return Shard(
            self.storage.path(info.file), self.storage.open(info.file), info, self.identity
        )

    def _index(self) -> None:
        """Keys of all records in order, and where each is: the last shard by (step, name) first among equal keys."""
        order = sorted(
            range(len(self.shards)), key=lambda n: (self.shards[n].info.step or 0, n), reverse=True
        )
        keys, places = [], []
        for number in order:
            shard, found = self.shards[number], 0
            for batch, joined in shard.keys():
                count = len(joined) // KEY_BYTES
                keys.append(np.frombuffer(joined, dtype="<u8").reshape(-1, 2))
                rows = np.arange(count, dtype=np.int32)
                places.append(
                    np.stack(
                        [np.full(count, number, np.int32), np.full(count, batch, np.int32), rows], 1
                    )
                )
                found += count
            if found != shard.info.records:
                raise CorruptCache(f"{shard.path}: {found} records, expected {shard.info.records}")
        words: NDArray[np.uint64] = (
            np.concatenate(keys) if keys else np.zeros((0, 2), dtype=np.uint64)
        )
        order_of = np.lexsort(
            (words[:, 1], words[:, 0])
        )  # stable: among equal keys the latest stays first
        # Halves apart: a search in a column of both would copy the column.
        self._firsts, self._seconds = words[order_of, 0], words[order_of, 1]
        self._places = (
            np.concatenate(places)[order_of] if places else np.zeros((0, 3), dtype=np.int32)
        )

    def __len__(self) -> int:
        return len(self._firsts)

    def find(self, keys: Sequence[bytes]) -> list[RecordPosition | None]:
        """Where the record of each key is; None where there is none."""
        wanted = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
        starts = np.searchsorted(self._firsts, wanted[:, 0]).tolist()
        return [
            self._from(start, *halves)
            for start, halves in zip(starts, wanted.tolist(), strict=True)
        ]

    def _from(self, start: int, first: int, second: int) -> RecordPosition | None:
        """The place of a key, whose first half stands from `start` on if anywhere."""
        while start < len(self) and self._firsts[start] == first:
            if self._seconds[start] == second:
                return RecordPosition(*self._places[start].tolist())
            start += 1
        return None

    def missing(self, keys: Iterable[bytes]) -> list[int]:
        """Positions in `keys` of those that the cache does not hold."""
        return [position for position, place in enumerate(self.find(list(keys))) if place is None]

    def record(self, key: bytes) -> Record:
        """The record of `key`, its checksum compared. MissingTarget, CorruptCache."""
        return self._record(key, self.find([key])[0])

    def _record(self, key: bytes, place: RecordPosition | None) -> Record:
        if place is None:
            raise MissingTarget(
                f"{self.storage.name} holds no target for the sample {key.hex()} among its {len(self)}: it was made from other data, "
                "with another tokenizer or another sequence length"
            )
        shard = self.shards[place.shard]
        record = shard.record(self._batch(place), place.batch, place.row)
        if record.key != key:
            raise CorruptCache(
                f"{shard.path}: record {place.row} of batch {place.batch} is {record.key.hex()}, expected {key.hex()}"
            )
        return record

    def keys(self) -> Iterator[bytes]:
        """The names of all samples, in order; twice where two shards hold one."""
        return (
            np.array(halves).tobytes() for halves in zip(self._firsts, self._seconds, strict=True)
        )

    def _batch(self, place: RecordPosition) -> pa.RecordBatch:
        at = place.shard, place.batch
        with self._guard:
            if at in self._batches:
                self._batches.move_to_end(at)
                return self._batches[at]
            batch = self.shards[place.shard].batch(place.batch)
            self._batches[at] = batch
            if len(self._batches) > OPEN_BATCHES:
                self._batches.popitem(last=False)
            return batch

    def get(self, tokens: Tensor) -> SparseTarget:
        """The target [S, K] of the sample with these tokens, int [S]. MissingTarget, CorruptCache."""
        return self.get_many([sample_key(tokens)]).map(lambda tensor: tensor[:, 0])

    def get_many(self, keys: Sequence[bytes]) -> SparseTarget:
        """The targets [S, B, K] of B samples by their `sample_key`s, K the widest of theirs. MissingTarget, CorruptCache."""
        records = [
            self._record(key, place) for key, place in zip(keys, self.find(keys), strict=True)
        ]
        try:
            targets = decode_many([record.payload for record in records])
        except BadRecordError as error:
            for record in records:
                self._check(record)
            raise CorruptCache(
                f"{self.storage.name}: records {', '.join(key.hex() for key in keys)}: {error}"
            ) from error
        if (
            any(record.tokens != targets.indices.shape[1] for record in records)
            or int(targets.indices.max()) >= self.identity.vocab_size
        ):
            for record in records:
                self._check(record)
        return targets.map(lambda tensor: tensor.transpose(0, 1))

    def _check(self, record: Record) -> None:
        """CorruptCache naming this record, if it is the bad one."""
        try:
            check_record(record, self.identity)
        except BadRecordError as error:
            raise CorruptCache(
                f"{self.storage.name}: record {record.key.hex()}: {error}"
            ) from error


def check_record(record: Record, identity: CacheIdentity) -> SparseTarget:
    """The target [S, K] of a record that fits its cache; BadRecordError for another."""
    target = decode(record.payload)
    tokens, last = target.indices.shape[0], int(target.indices.max())
    if tokens != record.tokens or last >= identity.vocab_size:
        raise BadRecordError(
            f"it has {tokens} tokens and ids up to {last}, expected {record.tokens} tokens and ids below {identity.vocab_size}"
        )
    return target

"""Read a cache: a sample's target by the sample's tokens, from local files or any fsspec URL."""

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
from megatron_kd.targets.sample_keys import KEY_BYTES, sample_key
from megatron_kd.targets.sparse import SparseTarget

OPEN_BATCHES = 256  # Record batches kept open; they are views of a memory map.


class CacheFiles:
    """Access the files of one folder: a path, or a URL of fsspec (s3://, gs://, memory://, ...)."""

    def __init__(self, directory: str | Path) -> None:
        self.name = str(directory).rstrip("/")
        self._remote: Any = None
        if "://" in self.name:
            import fsspec  # Needed for URLs only.

            self._remote, self._root = fsspec.core.url_to_fs(self.name)

    def list(self) -> list[str]:
        """Return the sorted names in the folder; raise MissingTarget without such a folder."""
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
        """Return the path of a file for messages."""
        return f"{self.name}/{name}"

    def read(self, name: str) -> bytes:
        """Return the content of a small file; raise CorruptCache where it cannot be read."""
        try:
            if self._remote:
                return bytes(self._remote.cat_file(f"{self._root}/{name}"))
            return Path(self.name, name).read_bytes()
        except OSError as error:
            raise CorruptCache(f"{self.path(name)} cannot be read: {error}") from error

    def open(self, name: str) -> pa.NativeFile:
        """Open a large file; a local one is mapped into memory."""
        with readable(self.path(name)):
            if self._remote:
                return pa.PythonFile(self._remote.open(f"{self._root}/{name}", "rb"), mode="r")
            return pa.memory_map(str(Path(self.name, name)), "r")


class RecordPosition(NamedTuple):
    """Locate a record.

    Attributes:
        shard: index in `CacheReader.shards`.
        batch: number of the record batch in the shard.
        number: of the record in the batch.
    """

    shard: int
    batch: int
    number: int


def read_identity(storage: CacheFiles) -> CacheIdentity:
    """Return what a cache is, from its one small file.

    Raises:
        MissingTarget: there is no cache. CorruptCache: the file is invalid.
    """
    if IDENTITY_FILE not in storage.list():
        raise MissingTarget(
            f"there is no teacher cache at {storage.name}: it has no {IDENTITY_FILE}"
        )
    return parse_identity(storage.read(IDENTITY_FILE), storage.path(IDENTITY_FILE))


class CacheReader:
    """Read targets by the tokens they belong to.

    Threads may share a reader; processes each open their own. Opening reads the keys of every
    record (28 bytes a sample stay in memory) and each shard's size, not its content; every record's
    checksum is compared when it is read. Unfinished shards are ignored. Where several shards hold a
    sample, the one of the latest training step is read.

    Args:
        directory: a path, or a URL for fsspec.
        expect: what the cache must be; None: no check.

    Raises:
        MissingTarget: there is no cache.
        WrongCache: it is of something else; every difference is named.
        CorruptCache: a file is missing or damaged.
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
                f"{self.storage.path(info.file)} is missing, but {name} says it holds "
                f"{info.records} records"
            )
        return Shard(
            self.storage.path(info.file), self.storage.open(info.file), info, self.identity
        )

    def _index(self) -> None:
        """Index the keys of all records in order.

        Among equal keys the record of the last shard by (step, name) comes first.
        """
        newest_first = sorted(
            range(len(self.shards)), key=lambda n: (self.shards[n].info.step or 0, n), reverse=True
        )
        keys, places = [], []
        for number in newest_first:
            shard, num_records = self.shards[number], 0
            for batch, joined in shard.keys():
                count = len(joined) // KEY_BYTES
                keys.append(np.frombuffer(joined, dtype="<u8").reshape(-1, 2))
                records = np.arange(count, dtype=np.int32)
                places.append(
                    np.stack(
                        [
                            np.full(count, number, np.int32),
                            np.full(count, batch, np.int32),
                            records,
                        ],
                        1,
                    )
                )
                num_records += count
            if num_records != shard.info.records:
                raise CorruptCache(
                    f"{shard.path}: {num_records} records, expected {shard.info.records}"
                )
        words: NDArray[np.uint64] = (
            np.concatenate(keys) if keys else np.zeros((0, 2), dtype=np.uint64)
        )
        # The sort is stable: among equal keys the latest stays first.
        key_order = np.lexsort((words[:, 1], words[:, 0]))
        # Two arrays: a search in one column of a joint array would copy the column.
        self._firsts, self._seconds = words[key_order, 0], words[key_order, 1]
        self._places = (
            np.concatenate(places)[key_order] if places else np.zeros((0, 3), dtype=np.int32)
        )

    def __len__(self) -> int:
        return len(self._firsts)

    def find(self, keys: Sequence[bytes]) -> list[RecordPosition | None]:
        """Return the position of each key's record; None where there is none."""
        words = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
        starts = np.searchsorted(self._firsts, words[:, 0]).tolist()
        return [
            self._search(start, *halves)
            for start, halves in zip(starts, words.tolist(), strict=True)
        ]

    def _search(self, start: int, first: int, second: int) -> RecordPosition | None:
        """Return the position of a key; `start` is the first index of its first half."""
        while start < len(self) and self._firsts[start] == first:
            if self._seconds[start] == second:
                return RecordPosition(*self._places[start].tolist())
            start += 1
        return None

    def missing(self, keys: Iterable[bytes]) -> list[int]:
        """Return the indices in `keys` of those that the cache does not hold."""
        return [index for index, position in enumerate(self.find(list(keys))) if position is None]

    def record(self, key: bytes) -> Record:
        """Return the record of `key` after comparing its checksum.

        Raises:
            MissingTarget: there is no such record. CorruptCache: it is damaged.
        """
        return self._record(key, self.find([key])[0])

    def _record(self, key: bytes, position: RecordPosition | None) -> Record:
        if position is None:
            raise MissingTarget(
                f"{self.storage.name} holds no target for the sample {key.hex()} among its "
                f"{len(self)}: it was made from other data, "
                "with another tokenizer or another sequence length"
            )
        shard = self.shards[position.shard]
        record = shard.record(self._batch(position), position.batch, position.number)
        if record.key != key:
            raise CorruptCache(
                f"{shard.path}: record {position.number} of batch {position.batch} is "
                f"{record.key.hex()}, expected {key.hex()}"
            )
        return record

    def keys(self) -> Iterator[bytes]:
        """Return the keys of all samples in order; twice where two shards hold one."""
        return (
            np.array(halves).tobytes() for halves in zip(self._firsts, self._seconds, strict=True)
        )

    def _batch(self, position: RecordPosition) -> pa.RecordBatch:
        batch_id = position.shard, position.batch
        with self._guard:
            if batch_id in self._batches:
                self._batches.move_to_end(batch_id)
                return self._batches[batch_id]
            batch = self.shards[position.shard].batch(position.batch)
            self._batches[batch_id] = batch
            if len(self._batches) > OPEN_BATCHES:
                self._batches.popitem(last=False)
            return batch

    def get(self, tokens: Tensor) -> SparseTarget:
        """Return the target [S, K] of the sample with these tokens, int [S].

        Raises:
            MissingTarget: there is no such sample. CorruptCache: its record is damaged.
        """
        return self.get_many([sample_key(tokens)]).map(lambda tensor: tensor[:, 0])

    def get_many(self, keys: Sequence[bytes]) -> SparseTarget:
        """Return the targets of B samples by their `sample_key`s.

        Returns:
            [S, B, K], K the largest of theirs.

        Raises:
            MissingTarget: a sample is missing. CorruptCache: a record is damaged.
        """
        records = [
            self._record(key, position) for key, position in zip(keys, self.find(keys), strict=True)
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
        """Raise CorruptCache that names this record if it is the damaged one."""
        try:
            check_record(record, self.identity)
        except BadRecordError as error:
            raise CorruptCache(
                f"{self.storage.name}: record {record.key.hex()}: {error}"
            ) from error


def check_record(record: Record, identity: CacheIdentity) -> SparseTarget:
    """Return the target [S, K] of a record that fits its cache; else raise BadRecordError."""
    target = decode(record.payload)
    tokens, last = target.indices.shape[0], int(target.indices.max())
    if tokens != record.tokens or last >= identity.vocab_size:
        raise BadRecordError(
            f"it has {tokens} tokens and ids up to {last}, expected {record.tokens} tokens and "
            f"ids below {identity.vocab_size}"
        )
    return target

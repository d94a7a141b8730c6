"""One shard: an Arrow IPC file of records, and the small file beside it that says it is complete. See FORMAT.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pyarrow as pa

from megatron_kd.cache.identity import FORMAT, SCHEMA_VERSION, CacheIdentity, CorruptCache
from megatron_kd.storage.atomic_files import file_digest, sync_path, write_atomically
from megatron_kd.targets.keys import KEY_BYTES

BATCH_RECORDS = 64
SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
        pa.field("payload", pa.binary(), nullable=False),
    ]
)


class Record(NamedTuple):
    """key: of the sample. tokens: its length. payload: see `encode`."""

    key: bytes
    tokens: int
    payload: bytes


@dataclass(frozen=True)
class ShardInfo:
    """The file beside a complete shard. step: of the teacher's training, where it was caught while training; last_step: the last
    of the steps that it holds, where they are several.
    """

    file: str
    bytes: int
    sha256: str
    records: int
    tokens: int
    step: int | None = None
    last_step: int | None = None


def record_crc(key: bytes, tokens: int, payload: bytes | memoryview) -> int:
    """CRC-32 over key, tokens (little-endian int32) and payload."""
    return crc32(payload, crc32(tokens.to_bytes(4, "little", signed=True), crc32(key)))


class ShardWriter:
    """Writes `<name>.arrow` under a temporary name; `commit` gives it its name and describes it in `<name>.json`."""

    def __init__(
        self, directory: Path, name: str, identity: CacheIdentity, *, step: int | None = None
    ) -> None:
        self.directory, self.name, self.step = directory, name, step
        self.records = self.tokens = 0
        self.temporary = directory / f".{name}.arrow.partial-{os.getpid()}"
        metadata = {
            "format": FORMAT,
            "schema_version": str(SCHEMA_VERSION),
            "identity": identity.to_json(),
            "shard": name,
        }
        self._pending: list[Record] = []
        self._sink = pa.OSFile(str(self.temporary), "wb")
        self._file = pa.ipc.new_file(self._sink, SCHEMA.with_metadata(metadata))

    def add(self, record: Record) -> None:
        """Append a record."""
        self._pending.append(record)
        self.records += 1
        self.tokens += record.tokens
        if len(self._pending) == BATCH_RECORDS:
            self._write_batch()

    def _write_batch(self) -> None:
        if not self._pending:
            return
        keys, tokens, payloads = zip(*self._pending, strict=True)
        crcs = [record_crc(*record) for record in self._pending]
        columns = [keys, tokens, crcs, payloads]
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)
        ]
        self._file.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._pending.clear()

    def finish(self, *, last_step: int | None = None) -> ShardInfo:
        """Write what is open and make it durable, still under the temporary name."""
        self._write_batch()
        self._file.close()
        self._sink.close()
        sync_path(self.temporary)
        return ShardInfo(
            f"{self.name}.arrow",
            self.temporary.stat().st_size,
            file_digest(self.temporary),
            self.records,
            self.tokens,
            self.step,
            last_step,
        )

    def commit(self, *, last_step: int | None = None) -> ShardInfo:
        """Make the shard durable and visible."""
        info = self.finish(last_step=last_step)
        (self.directory / f"{self.name}.json").unlink(
            missing_ok=True
        )  # never describe one file and hold another
        os.replace(self.temporary, self.directory / info.file)
        sync_path(self.directory)
        write_atomically(self.directory / f"{self.name}.json", info_bytes(info))
        return info

    def discard(self) -> None:
        """Leave nothing behind."""
        for stream in (self._file, self._sink):
            try:
                stream.close()
            except OSError:  # a full disk says so again
                pass
        self.temporary.unlink(missing_ok=True)


def info_bytes(info: ShardInfo) -> bytes:
    """The content of the file beside a shard."""
    return (json.dumps(asdict(info), indent=2) + "\n").encode()


def parse_info(data: bytes, path: str) -> ShardInfo:
    """What the file beside a shard says; CorruptCache for anything else."""
    try:
        content: dict[str, Any] = json.loads(data)
        info = ShardInfo(**content)
        name = path.rsplit("/", 1)[-1].removesuffix(".json")
        if info.file != f"{name}.arrow" or not all(
            isinstance(n, int) for n in (info.bytes, info.records, info.tokens)
        ):
            raise ValueError(f"it names {info.file!r}, expected '{name}.arrow'")
        return info
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptCache(f"{path} does not describe the shard beside it: {error}") from error


class Shard:
    """A complete shard, open for reading through `source` (a memory map or any other Arrow input file)."""

    def __init__(
        self, path: str, source: pa.NativeFile, info: ShardInfo, identity: CacheIdentity
    ) -> None:
        self.path, self.info, self.identity = path, info, identity
        if source.size() != info.bytes:
            raise CorruptCache(
                f"{path}: {source.size()} bytes, expected {info.bytes}: the file was cut or replaced"
            )
        with readable(self.path):
            self._reader = pa.ipc.open_file(source)
            schema = self._reader.schema
            if not schema.equals(SCHEMA):
                raise CorruptCache(
                    f"{path}: columns {schema.names}, expected {SCHEMA.names} with their types"
                )
            said = {
                key: value.decode(errors="replace")
                for key, value in (schema.metadata or {}).items()
            }
        told, name = said.get(b"identity", ""), info.file.removesuffix(".arrow")
        if told != identity.to_json():
            raise CorruptCache(
                f"{path}: a shard of another cache: it says {told}, expected {identity.to_json()}"
            )
        # Two files of one size that changed places: the records say which samples they are, but not of which training step.
        if said.get(b"shard", name) != name:
            raise CorruptCache(
                f"{path}: it was written as {said[b'shard']!r}, expected {name!r}: a file was renamed or replaced"
            )
        self.num_batches = self._reader.num_record_batches

    def batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`, its structure checked."""
        with readable(self.path):
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise CorruptCache(f"{self.path}: batch {number} has empty fields")
            return batch

    def keys(self) -> Iterator[tuple[int, bytes]]:
        """(batch, the keys of its records back to back) of every batch."""
        for number in range(self.num_batches):
            column = self.batch(number).column(0)
            start = column.offset * KEY_BYTES
            yield number, column.buffers()[1][start : start + len(column) * KEY_BYTES].to_pybytes()

    def record(self, batch: pa.RecordBatch, number: int, row: int) -> Record:
        """Record `row` of batch `number`; CorruptCache where its checksum is not the one stored."""
        key, tokens, crc, payload = (batch.column(place)[row].as_py() for place in range(4))
        found = record_crc(key, tokens, payload)
        if found != crc:
            raise CorruptCache(
                f"{self.path}: record {row} of batch {number} (key {key.hex()}): checksum {found:08x}, expected {crc:08x}"
            )
        return Record(key, tokens, payload)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns Arrow's errors into CorruptCache with the file's name."""
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        MemoryError,
        UnicodeError,
    ) as error:  # the last: a column by a name of other bytes
        raise CorruptCache(f"{path} is not a readable Arrow file: {error}") from error

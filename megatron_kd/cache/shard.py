"""Write and read a shard: an Arrow IPC file of records, and a small file that says it is complete.

See FORMAT.md.
"""

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
from megatron_kd.targets.sample_keys import KEY_BYTES

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
    """Hold one stored sample.

    Attributes:
        key: of the sample.
        tokens: length of the sample.
        payload: see `encode`.
    """

    key: bytes
    tokens: int
    payload: bytes


@dataclass(frozen=True)
class ShardInfo:
    """Hold the content of the file beside a complete shard.

    Attributes:
        file: name of the Arrow file.
        bytes: its size.
        sha256: its digest, hex.
        records: number of records.
        tokens: sum of their lengths.
        step: the teacher's training step, where it was captured while training.
        last_step: the last step that the shard holds, where there are several.
    """

    file: str
    bytes: int
    sha256: str
    records: int
    tokens: int
    step: int | None = None
    last_step: int | None = None


def record_crc(key: bytes, tokens: int, payload: bytes | memoryview) -> int:
    """Return the CRC-32 over key, tokens (little-endian int32) and payload."""
    return crc32(payload, crc32(tokens.to_bytes(4, "little", signed=True), crc32(key)))


class ShardWriter:
    """Write `<name>.arrow` under a temporary name; `commit` renames it and writes `<name>.json`.

    Args:
        directory: the cache.
        name: of the shard.
        identity: of the cache, stored in the file.
        step: the teacher's training step, or None.
    """

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
        """Write pending records and make the file durable, still under the temporary name."""
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
        # An old description must never stand beside the new file.
        (self.directory / f"{self.name}.json").unlink(missing_ok=True)
        os.replace(self.temporary, self.directory / info.file)
        sync_path(self.directory)
        write_atomically(self.directory / f"{self.name}.json", info_bytes(info))
        return info

    def discard(self) -> None:
        """Remove the temporary file."""
        for stream in (self._file, self._sink):
            try:
                stream.close()
            except OSError:  # A full disk fails again.
                pass
        self.temporary.unlink(missing_ok=True)


def info_bytes(info: ShardInfo) -> bytes:
    """Return the content of the file beside a shard."""
    return (json.dumps(asdict(info), indent=2) + "\n").encode()


def parse_info(data: bytes, path: str) -> ShardInfo:
    """Return the content of the file beside a shard; raise CorruptCache for anything else."""
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
    """Read a complete shard.

    Args:
        path: of the Arrow file, for messages.
        source: the open file: a memory map or any other Arrow input file.
        info: content of the file beside it.
        identity: of the cache.

    Raises:
        CorruptCache: the file does not match `info` or `identity`.
    """

    def __init__(
        self, path: str, source: pa.NativeFile, info: ShardInfo, identity: CacheIdentity
    ) -> None:
        self.path, self.info, self.identity = path, info, identity
        if source.size() != info.bytes:
            raise CorruptCache(
                f"{path}: {source.size()} bytes, expected {info.bytes}: the file was cut or "
                "replaced"
            )
        with readable(self.path):
            self._reader = pa.ipc.open_file(source)
            schema = self._reader.schema
            if not schema.equals(SCHEMA):
                raise CorruptCache(
                    f"{path}: columns {schema.names}, expected {SCHEMA.names} with their types"
                )
            metadata = {
                key: value.decode(errors="replace")
                for key, value in (schema.metadata or {}).items()
            }
        shard_identity, name = metadata.get(b"identity", ""), info.file.removesuffix(".arrow")
        if shard_identity != identity.to_json():
            raise CorruptCache(
                f"{path}: a shard of another cache: it says {shard_identity}, expected "
                f"{identity.to_json()}"
            )
        # Detects swapped files of one size: records name their sample, but not their training step.
        if metadata.get(b"shard", name) != name:
            raise CorruptCache(
                f"{path}: it was written as {metadata[b'shard']!r}, expected {name!r}: a file "
                "was renamed or replaced"
            )
        self.num_batches = self._reader.num_record_batches

    def batch(self, number: int) -> pa.RecordBatch:
        """Return record batch `number` after checking its structure."""
        with readable(self.path):
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise CorruptCache(f"{self.path}: batch {number} has empty fields")
            return batch

    def keys(self) -> Iterator[tuple[int, bytes]]:
        """Yield the number of every batch and the keys of its records, back to back."""
        for number in range(self.num_batches):
            column = self.batch(number).column(0)
            start = column.offset * KEY_BYTES
            yield number, column.buffers()[1][start : start + len(column) * KEY_BYTES].to_pybytes()

    def record(self, batch: pa.RecordBatch, batch_number: int, number: int) -> Record:
        """Return record `number` of a batch; raise CorruptCache where its checksum differs."""
        key, tokens, crc, payload = (batch.column(column)[number].as_py() for column in range(4))
        actual = record_crc(key, tokens, payload)
        if actual != crc:
            raise CorruptCache(
                f"{self.path}: record {number} of batch {batch_number} (key {key.hex()}): "
                f"checksum {actual:08x}, expected {crc:08x}"
            )
        return Record(key, tokens, payload)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Convert Arrow's errors to CorruptCache with the file's name."""
    try:
        yield
    # UnicodeError: the name of a column has other bytes.
    except (pa.ArrowException, OSError, MemoryError, UnicodeError) as error:
        raise CorruptCache(f"{path} is not a readable Arrow file: {error}") from error

"""Describe what a cache holds, and compare it with what a run expects before step 0."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_kd.cache.encode import VALUE_ENCODINGS
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.targets.select import Selection

FORMAT, SCHEMA_VERSION = "megatron_kd teacher cache", 1
IDENTITY_FILE = "cache.json"


class CacheError(Exception):
    """Report a problem of a cache in one sentence."""


class WrongCache(CacheError):  # noqa: N818 (public name)
    """Report a cache that was made for something else."""


class CorruptCache(CacheError):  # noqa: N818 (public name)
    """Report bytes that are not those that were written.

    The message names file, record, and the expected and the actual value.
    """


class MissingTarget(CacheError):  # noqa: N818 (public name)
    """Report a sample that the cache does not hold."""


class CacheInUse(CacheError):  # noqa: N818 (public name)
    """Report, and name, another process that writes to the cache."""


@dataclass(frozen=True)
class CacheIdentity:
    """Hold everything that decides what a record means.

    Two caches with the same identity are parts of one.

    Attributes:
        teacher: digest of its weights, hex; for a teacher captured while training, of its run.
        tokenizer: digest of its vocabulary, hex; None where none is known.
        vocab_size: true number of ids.
        sequence_length: tokens of a sample.
        selection: how entries were chosen; a selection object stands for its text.
        value_encoding: see `encode`.
        teacher_step: the teacher's training step; None where each shard has its own.
        document_attention: "across": tokens attend to earlier documents of the sample; "within": to
            their own document only.
    """

    teacher: str
    tokenizer: str | None
    vocab_size: int
    sequence_length: int
    selection: str | Selection
    value_encoding: str = "quantized"
    teacher_step: int | None = None
    document_attention: str = "across"

    def __post_init__(self) -> None:
        if not isinstance(self.selection, str):
            object.__setattr__(self, "selection", repr(self.selection))
        if self.value_encoding not in VALUE_ENCODINGS:
            raise ValueError(
                f"value_encoding must be one of {', '.join(VALUE_ENCODINGS)}, not "
                f"{self.value_encoding!r}"
            )
        if self.vocab_size < 1 or self.sequence_length < 1:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) and sequence_length ({self.sequence_length}) "
                "must be at least 1"
            )
        if self.document_attention not in ("across", "within"):
            raise ValueError(
                f'document_attention must be "across" or "within", not {self.document_attention!r}'
            )

    def to_json(self) -> str:
        """Return one line with sorted keys: the same identity is the same text."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> CacheIdentity:
        """Return the identity in `content`; raise ValueError for a missing or unknown field."""
        names = {field.name for field in fields(CacheIdentity)}
        if set(content) != names:
            raise ValueError(f"fields {sorted(set(content) ^ names)} are missing or unknown")
        return CacheIdentity(**content)

    def check(self, expected: CacheIdentity, path: str) -> None:
        """Raise WrongCache that names every field in which this identity differs.

        Args:
            expected: the identity to compare with.
            path: the cache that has this identity.
        """
        differences = [
            f"{field.name}: the cache has {actual!r}, expected {required!r}"
            for field in fields(self)
            if (actual := getattr(self, field.name)) != (required := getattr(expected, field.name))
        ]
        if differences:
            raise WrongCache(
                f"{path} was made for something else ({'; '.join(differences)}): use another "
                "cache, or make one for this run"
            )


def write_identity(directory: Path, identity: CacheIdentity) -> None:
    """Write cache.json; several writers may do so at once.

    Raises:
        WrongCache: `directory` already holds something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / IDENTITY_FILE
    if path.exists():
        parse_identity(path.read_bytes(), str(path)).check(identity, str(directory))
        return
    content = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "identity": json.loads(identity.to_json()),
    }
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def parse_identity(data: bytes, path: str) -> CacheIdentity:
    """Return the identity in the content of cache.json; raise CorruptCache for anything else."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT or content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"it says {content['format']!r} version {content['schema_version']}, expected "
                f"{FORMAT!r} version {SCHEMA_VERSION}"
            )
        return CacheIdentity.from_dict(content["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCache(f"{path} does not describe a teacher cache: {error}") from error

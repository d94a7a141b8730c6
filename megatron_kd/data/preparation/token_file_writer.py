"""Write one token file from arrays of ids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.data.token_files import index_header
from megatron_kd.storage.atomic_files import write_atomically


class TokenFileWriter:
    """Write one .bin/.idx/.json set that appears under its names only when it is complete.

    Use as a context manager. Without `commit`, or after an exception, no file remains.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = dtype
        self.num_tokens = 0
        self.max_id = -1
        self._lengths: list[np.ndarray] = []
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.prefix.with_name(f".{self.prefix.name}.bin.partial-{os.getpid()}")
        self._bin = open(self._temporary, "wb")  # noqa: SIM115  closed in __exit__

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return sum(map(len, self._lengths))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: integer [sum(lengths)], the documents back to back.
            lengths: integer [documents], tokens of each.

        Raises:
            ValueError: the lengths do not sum to the tokens, or an id does not fit `dtype`.
        """
        if int(lengths.sum()) != len(tokens):
            raise ValueError(
                f"lengths sum to {int(lengths.sum())}, but there are {len(tokens)} tokens"
            )
        if not len(tokens):
            return
        if tokens.min() < 0 or tokens.max() > np.iinfo(self.dtype).max:
            raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(lengths.astype("<i4"))
        self.num_tokens += len(tokens)
        self.max_id = max(self.max_id, int(tokens.max()))

    def commit(self, **description: Any) -> dict[str, Any]:
        """Publish the files and return the content of the .json.

        This is `description` with tokens, documents, max_id and dtype. The old index is removed
        first and the new one written last, so that an interruption never pairs an index with
        tokens of another file.
        """
        description |= {
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "max_id": self.max_id,
            "dtype": self.dtype.name,
        }
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(self._temporary, f"{self.prefix}.bin")
        write_atomically(f"{self.prefix}.json", (json.dumps(description, indent=2) + "\n").encode())
        write_atomically(f"{self.prefix}.idx", self._index())
        return description

    def _index(self) -> bytes:
        lengths = np.concatenate([*self._lengths, np.empty(0, "<i4")])
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        offsets = (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8")
        header = index_header(self.dtype, len(lengths), len(lengths) + 1)
        marks = np.arange(len(lengths) + 1, dtype="<i8")
        return b"".join((header, lengths.tobytes(), offsets.tobytes(), marks.tobytes()))

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bin.close()
        self._temporary.unlink(missing_ok=True)

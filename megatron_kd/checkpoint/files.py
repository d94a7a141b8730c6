"""Record the size and digest of each file of a distributed checkpoint while torch writes it."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_kd.checkpoint.manifest import DigestingStream, FileRecord

COMMON = "common.pt"
# Content of metadata.json that megatron-core expects.
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DigestingFiles(FileSystem):
    """Provide the files that torch's writers write to.

    Attributes:
        written: record of every complete and durable file, by name.
    """

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """Yield a stream that must be written from start to end; at its end the file is durable.

        Raises:
            OSError: writing failed; it names the file.
        """
        if mode not in ("wb", "xb"):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        try:
            with open(path, mode) as raw:
                digesting = DigestingStream(cast(BinaryIO, raw), path)
                try:
                    yield cast(io.IOBase, digesting)
                except RuntimeError as error:
                    # After a full disk torch's writer raises an error about its own file and line.
                    raise digesting.error or error from error
                os.fsync(digesting.fileno())
        except OSError as error:
            raise (
                error if error.filename else OSError(error.errno, error.strerror, str(path))
            ) from error
        self.written[path.name] = digesting.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a complete file its name."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

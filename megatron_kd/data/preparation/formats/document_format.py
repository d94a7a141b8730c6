"""Define the interface of an input format.

Work is cut according to the files, never to the number of processes, so that the result is the same
for any number of them. datatrove's readers are not used: they drop empty documents, which
Megatron's own tool marks in the index, distribute whole files only, and skip broken lines without
reporting their position.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

_COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """Identify one input file.

    Attributes:
        key: path relative to the input it was found under, with forward slashes.
        path: path of the file.
        size: bytes.
        stamp: modification and status change times in nanoseconds, which detect a changed file.
    """

    key: str
    path: Path
    size: int
    stamp: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Unit:
    """Identify a part of one file.

    Attributes:
        file: the file.
        format: name of its format.
        start: first byte, or another position that the format defines.
        end: end of the part (exclusive).
        size: bytes of the file that the part stands for.
    """

    file: TextFile
    format: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Document:
    """Hold one document, or the reason why it has no text.

    Attributes:
        name: name of the document, which does not depend on how work is cut.
        line: line or record of the unit, from 1; 0 if the document is a whole file.
        text: None if the document cannot be used.
        problem: why there is no text.
    """

    name: str
    line: int
    text: str | None
    problem: str = ""


@dataclass
class LineCounter:
    """Count the lines or records of a unit that have been read, empty ones included."""

    lines: int = 0


class DocumentFormat:
    """Read the documents of one format; the base class of all formats.

    Attributes:
        name: value of --format.
        suffixes: endings of file names, without that of a compression.
        internal: the format cannot be chosen with --format.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    internal: ClassVar[bool] = False

    def units(self, file: TextFile, target_bytes: int) -> list[Unit]:
        """Cut a file into units of about `target_bytes`; by default it is one unit.

        Raises:
            ConfigError: the file cannot be read.
        """
        return [Unit(file, self.name, 0, file.size, file.size)]

    def documents(self, unit: Unit, text_key: str, counter: LineCounter) -> Iterator[Document]:
        """Yield the documents of one unit in order.

        Args:
            unit: a part of a file, made by `units`.
            text_key: key or column of the text.
            counter: incremented for each line or record that is read.
        """
        raise NotImplementedError

    def lines_before(self, unit: Unit) -> int:
        """Return the lines of the file before the first that belongs to the unit."""
        return 0


def is_compressed(path: Path) -> bool:
    """Return whether the name of a file ends like that of a compressed one."""
    return path.suffix.lower() in _COMPRESSED_SUFFIXES


def open_file(path: Path) -> IO[bytes]:
    """Open the bytes of a file, decompressed if its name says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        import pyarrow

        compressed = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(compressed, _BUFFER_BYTES)
    return open(path, "rb", buffering=_BUFFER_BYTES)


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__

"""Documents in files: text (one document a file), JSON lines and Parquet (one a row), compressed or not.

Work is cut by what the files are, never by how many processes there are, so that the outcome is the same for any number of them.
datatrove's readers are not used for this: they leave out empty documents, which Megatron's own tool marks in the index, deal out
whole files only, and pass over broken lines without saying where they are.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from megatron_kd.config import ConfigError

FORMATS = ("auto", "text", "jsonl", "parquet")
_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SMALLEST, _LARGEST, _PIECES = 1_000_000, 32_000_000, 64
_MOST_FILES = 4096
_ROWS, _ROWS_BYTES, _KEYS_NAMED = 1024, 32_000_000, 6


@dataclass(frozen=True)
class TextFile:
    """One file; `key` is its path relative to the input it was found under, with forward slashes; `stamp` tells whether it changed."""

    key: str
    path: Path
    size: int
    stamp: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Unit:
    """A part of one file: the lines that begin in bytes [start, end), row groups start .. end - 1, or the whole file.

    format: "text", "jsonl", "lines" (whole lines of JSON) or "parquet"; size: bytes of the file that it stands for.
    """

    file: TextFile
    format: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Document:
    """name: of the document, independent of how work is cut. line: 1 for the first of its unit; 0 for a whole file.
    text: None where `problem` says why there is none.
    """

    name: str
    line: int
    text: str | None
    problem: str = ""


def find_text_files(
    inputs: Sequence[str | Path], patterns: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[TextFile]:
    """The files among `inputs` (files, globs, or folders searched to the bottom), each once, in an order that depends only on names.

    Args:
        inputs: in this order; files are taken as they are; `patterns` and `exclude` apply inside folders.
        patterns: a file is taken when its name matches one of them.
        exclude: a file is left out when its name, or that of a folder on its relative path, matches one of them.

    Raises:
        ConfigError: an input does not exist, or nothing was found.
    """
    found: dict[str, TextFile] = {}
    for item in (path for given in inputs for path in _expand(given)):
        relative = (
            [Path(item.name)]
            if item.is_file()
            else sorted(_walk(item, patterns, exclude), key=Path.as_posix)
        )
        root = item.parent if item.is_file() else item
        for name in relative:
            path = root / name
            status = path.stat()
            file = TextFile(
                name.as_posix(), path, status.st_size, (status.st_mtime_ns, status.st_ctime_ns)
            )
            found.setdefault(os.path.realpath(path), file)
    if not found:
        raise ConfigError(
            f"no file matches {' '.join(patterns)} in {', '.join(map(str, inputs))}: change the input or the pattern"
        )
    return list(found.values())


def _expand(given: str | Path) -> list[Path]:
    if Path(given).exists():
        return [Path(given)]
    matches = sorted(map(Path, glob.glob(str(given), recursive=True)), key=Path.as_posix)
    if not matches:
        raise ConfigError(f"the input {given} does not exist: give files, folders or globs of text")
    return matches


def _walk(root: Path, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    """Relative paths of the matching regular files under `root`; links to folders are not followed."""

    def left_out(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in exclude)

    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not left_out(name)]
        for name in names:
            path = Path(folder, name)
            if (
                any(fnmatch(name, pattern) for pattern in patterns)
                and not left_out(name)
                and path.is_file()
            ):
                yield path.relative_to(root)


def unchanged(file: TextFile) -> bool:
    """Whether the file is what it was when it was found."""
    try:
        status = file.path.stat()
    except OSError:
        return False
    return (status.st_size, (status.st_mtime_ns, status.st_ctime_ns)) == (file.size, file.stamp)


def format_of(path: Path, wanted: str = "auto") -> str:
    """ "text", "jsonl", "parquet", or what was wanted; ConfigError where a name ending in .json leaves it open."""
    if wanted != "auto":
        return wanted
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last == ".json":
        raise ConfigError(
            f"{path} may be JSON lines or one document of text: say which with --format jsonl or --format text"
        )
    return "jsonl" if last in _LINES else "parquet" if last == ".parquet" else "text"


def make_pieces(
    files: Sequence[TextFile], wanted: str = "auto", piece_bytes: int | None = None
) -> list[list[Unit]]:
    """Cut the files into pieces of work of about equal size, in order.

    A compressed file is one piece: what is in its middle can only be reached by reading its beginning.

    Raises:
        ConfigError: a Parquet file that cannot be read, or an unclear format.
    """
    target = piece_bytes or min(
        max(sum(file.size for file in files) // _PIECES, _SMALLEST), _LARGEST
    )
    pieces: list[list[Unit]] = []
    small: list[Unit] = []
    size = 0
    for file in files:
        units = _units(file, format_of(file.path, wanted), target)
        alone = len(units) > 1 or file.size >= target
        if small and (alone or len(small) >= _MOST_FILES or size + file.size > target):
            pieces.append(small)
            small, size = [], 0
        if alone:
            pieces += [[unit] for unit in units]
        else:
            small.extend(units)
            size += file.size
    return pieces + ([small] if small else [])


def _units(file: TextFile, format: str, target: int) -> list[Unit]:
    if format == "parquet":
        return _row_groups(file, target)
    if format == "text" or file.path.suffix.lower() in _COMPRESSED or not file.size:
        return [Unit(file, format, 0, file.size, file.size)]
    starts = range(0, file.size, target)
    return [
        Unit(file, format, start, min(start + target, file.size), min(target, file.size - start))
        for start in starts
    ]


def _row_groups(file: TextFile, target: int) -> list[Unit]:
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_metadata(file.path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file.path} is not a Parquet file ({error}): repair it, or leave it out with --exclude"
        ) from error
    units, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= target or group == metadata.num_row_groups - 1:
            units.append(Unit(file, "parquet", start, group + 1, size))
            start, size = group + 1, 0
    return units


def documents(
    unit: Unit, text_key: str, count_line: Callable[[], None] = lambda: None
) -> Iterator[Document]:
    """The documents of one unit, in order. `count_line` is called once for each line or row that is read, empty ones included."""
    read = {
        "text": _text_document,
        "jsonl": _line_documents,
        "lines": _line_documents,
        "parquet": _row_documents,
    }[unit.format]
    line = 0

    def count() -> None:
        nonlocal line
        line += 1
        count_line()

    try:
        yield from read(unit, text_key, count)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        yield Document(
            f"{unit.file.key}:damaged",
            line + 1,
            None,
            f"cannot be read from here on: {_one_line(error)}",
        )


def _text_document(unit: Unit, text_key: str, count: Callable[[], None]) -> Iterator[Document]:
    with open_file(unit.file.path) as stream:
        data = stream.read()
    try:
        yield Document(unit.file.key, 0, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield Document(unit.file.key, 0, None, f"not UTF-8 at byte {error.start}")


def _line_documents(unit: Unit, text_key: str, count: Callable[[], None]) -> Iterator[Document]:
    compressed, line = unit.file.path.suffix.lower() in _COMPRESSED, 0
    loads = fast_loads()
    with open_file(unit.file.path) as stream:
        offset = 0
        if unit.start:
            stream.seek(unit.start - 1)
            offset = unit.start - 1 + _skip_line(stream, unit.end - unit.start + 1)
        while compressed or offset < unit.end:
            data = stream.readline()
            if not data:
                return
            line += 1
            count()
            name, offset = f"{unit.file.key}:{offset}", offset + len(data)
            if not data.isspace():
                text, problem = (
                    _text_of(data, text_key, loads) if unit.format == "jsonl" else _whole_line(data)
                )
                data = b""  # a line can be as long as memory is large
                yield Document(name, line, text, problem)


def _skip_line(stream: IO[bytes], most: int) -> int:
    """Bytes up to the end of a line, or `most` and more where it goes on that long; no long line is held."""
    skipped = 0
    while skipped < most:
        part = stream.readline(1 << 20)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            break
    return skipped


def _row_documents(unit: Unit, text_key: str, count: Callable[[], None]) -> Iterator[Document]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(unit.file.path) as file:
        if text_key not in file.schema_arrow.names:
            raise ValueError(
                f"no column {text_key!r} (it has {', '.join(file.schema_arrow.names)})"
            )
        row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        line = 0
        # Few rows at a time where rows are long.
        count_here = sum(
            file.metadata.row_group(group).num_rows for group in range(unit.start, unit.end)
        )
        rows = min(_ROWS, max(1, _ROWS_BYTES * count_here // max(1, unit.size)))
        for batch in file.iter_batches(
            rows, row_groups=list(range(unit.start, unit.end)), columns=[text_key]
        ):
            for text in batch.column(0).to_pylist():
                line, row = line + 1, row + 1
                count()
                good = isinstance(text, str)
                yield Document(
                    f"{unit.file.key}:{row - 1}",
                    line,
                    text if good else None,
                    "" if good else "no text in this row",
                )


def fast_loads() -> Callable[[bytes], Any]:
    """orjson's reader where it is installed: the same values, several times faster."""
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads


def _whole_line(data: bytes) -> tuple[str | None, str]:
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return None, "not UTF-8"


def _text_of(data: bytes, text_key: str, loads: Callable[[bytes], Any]) -> tuple[str | None, str]:
    """The text of one JSON line, or None and the reason."""
    try:
        row = loads(data)
    except ValueError:
        # Again with the standard library: it takes a few things more (NaN, a byte order mark) and says what is wrong.
        try:
            row = json.loads(data)
        except UnicodeDecodeError:
            return None, "not UTF-8"
        except (ValueError, RecursionError) as error:
            return None, f"not JSON: {_one_line(error)}"
    if not isinstance(row, dict):
        return None, "no JSON object"
    if text_key not in row:
        keys = ", ".join(map(repr, list(row)[:_KEYS_NAMED])) + (
            ", ..." if len(row) > _KEYS_NAMED else ""
        )
        return None, f"no key {text_key!r}" + (f", it has {keys}" if row else "")
    text = row[text_key]
    if not isinstance(text, str):
        return None, f"{text_key!r} is not a string"
    try:
        # JSON can hold half of a surrogate pair, which is no text.
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        return None, f"{text_key!r} holds half of a surrogate pair"
    return text, ""


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name says that it is compressed."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(
            pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 1 << 20
        )
    return open(path, "rb", buffering=1 << 20)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Find input files, cut them into pieces of work, and read their documents."""

from __future__ import annotations

import glob
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.data.discovery import implementations
from megatron_kd.data.preparation import formats
from megatron_kd.data.preparation.formats.document_format import (
    Document,
    DocumentFormat,
    LineCounter,
    TextFile,
    Unit,
    is_compressed,
    one_line,
)

FORMATS: dict[str, DocumentFormat] = {
    format_type.name: format_type() for format_type in implementations(formats, DocumentFormat)
}
FORMAT_CHOICES = ("auto", *(name for name, one in FORMATS.items() if not one.internal))
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES, _NUM_PIECES = 1_000_000, 32_000_000, 64
_MAX_FILES_PER_PIECE = 4096


def find_text_files(
    inputs: Sequence[str | Path], patterns: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[TextFile]:
    """Find the input files, each once, in an order that depends only on names.

    Args:
        inputs: files, globs, or folders that are searched recursively, in this order. `patterns`
            and `exclude` apply inside folders only.
        patterns: a file is taken if its name matches one of them.
        exclude: a file is left out if its name, or that of a folder on its relative path, matches
            one of them.

    Returns:
        The files.

    Raises:
        ConfigError: an input does not exist, or no file matches.
    """
    files: dict[str, TextFile] = {}
    for item in (path for pattern in inputs for path in _expand(pattern)):
        if item.is_file():
            root, names = item.parent, [Path(item.name)]
        else:
            root, names = item, sorted(_walk(item, patterns, exclude), key=Path.as_posix)
        for name in names:
            path = root / name
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_ctime_ns)
            file = TextFile(name.as_posix(), path, status.st_size, stamp)
            files.setdefault(os.path.realpath(path), file)
    if not files:
        raise ConfigError(
            f"no file matches {' '.join(patterns)} in {', '.join(map(str, inputs))}: "
            "change the input or the pattern"
        )
    return list(files.values())


def _expand(pattern: str | Path) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    matches = sorted(map(Path, glob.glob(str(pattern), recursive=True)), key=Path.as_posix)
    if not matches:
        raise ConfigError(
            f"the input {pattern} does not exist: give files, folders or globs of text"
        )
    return matches


def _walk(root: Path, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    """Yield relative paths of the matching regular files; links to folders are not followed."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _matches(name, exclude)]
        for name in names:
            path = Path(folder, name)
            if _matches(name, patterns) and not _matches(name, exclude) and path.is_file():
                yield path.relative_to(root)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def unchanged(file: TextFile) -> bool:
    """Return whether the file has the size and times that it had when it was found."""
    try:
        status = file.path.stat()
    except OSError:
        return False
    return (status.st_size, (status.st_mtime_ns, status.st_ctime_ns)) == (file.size, file.stamp)


def format_of(path: Path, choice: str = "auto") -> DocumentFormat:
    """Return the chosen format, or the one that the suffix of a file stands for.

    Raises:
        ConfigError: a name ending in .json does not decide it.
    """
    if choice != "auto":
        return FORMATS[choice]
    suffix = (path.with_suffix("") if is_compressed(path) else path).suffix.lower()
    if suffix == ".json":
        raise ConfigError(
            f"{path} may be JSON lines or one document of text: "
            "say which with --format jsonl or --format text"
        )
    return next((one for one in FORMATS.values() if suffix in one.suffixes), FORMATS["text"])


def make_pieces(
    files: Sequence[TextFile], format_choice: str = "auto", piece_bytes: int | None = None
) -> list[list[Unit]]:
    """Cut the files into pieces of work of about equal size, in order.

    Args:
        files: the input.
        format_choice: name of a format, or "auto" for the one of each file's suffix.
        piece_bytes: size of a piece; None for a size that suits the input.

    Returns:
        The units of each piece.

    Raises:
        ConfigError: a file cannot be read, or its format is unclear.
    """
    default = sum(file.size for file in files) // _NUM_PIECES
    target = piece_bytes or min(max(default, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
    pieces: list[list[Unit]] = []
    small: list[Unit] = []
    size = 0
    for file in files:
        units = format_of(file.path, format_choice).units(file, target)
        is_large = len(units) > 1 or file.size >= target
        is_full = len(small) >= _MAX_FILES_PER_PIECE or size + file.size > target
        if small and (is_large or is_full):
            pieces.append(small)
            small, size = [], 0
        if is_large:
            pieces += [[unit] for unit in units]
        else:
            small.extend(units)
            size += file.size
    return pieces + ([small] if small else [])


def documents(unit: Unit, text_key: str, counter: LineCounter | None = None) -> Iterator[Document]:
    """Yield the documents of one unit in order.

    A file that cannot be read to its end yields a last document without text.

    Args:
        unit: a part of a file.
        text_key: key or column of the text.
        counter: counts the lines or records that are read, empty ones included.
    """
    counter = counter or LineCounter()
    try:
        yield from FORMATS[unit.format].documents(unit, text_key, counter)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        yield Document(
            f"{unit.file.key}:damaged",
            counter.lines + 1,
            None,
            f"cannot be read from here on: {one_line(error)}",
        )


def lines_before(unit: Unit) -> int:
    """Return the lines of a unit's file before its first line."""
    return FORMATS[unit.format].lines_before(unit)

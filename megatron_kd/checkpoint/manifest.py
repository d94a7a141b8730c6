"""Record size and SHA-256 of a checkpoint's files while they are written, and verify them later.

`manifest.json` lists every file of the folder except itself and `commit.json`. `commit.json` is
written last of all and holds the manifest's own digest, so that a change of any byte of any file is
detected. Names in a manifest are plain: no file outside the folder is ever opened, and links are
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_kd.storage.atomic_files import sync_path

MANIFEST, COMMIT = "manifest.json", "commit.json"
STALE_SECONDS = 3.0  # How long a network file system may show an old view of a folder.
_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.=+-]{0,199}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
_THREADS = 4


class DamagedCheckpointError(ValueError):
    """Report a checkpoint that differs from what was written.

    The message is one sentence with the file and the expected and the actual value.
    """


@dataclass(frozen=True)
class FileRecord:
    """Hold size and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


class DigestingStream:
    """Write a file from start to end, and know its size and digest without reading it again.

    A failure names the file and is kept in `error`: a caller of `write` in C++ may raise another
    one.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._digest, self._bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self._path))
            raise self.error from error
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._bytes

    def flush(self) -> None:
        """Pass everything to the operating system."""
        self._stream.flush()

    def close(self) -> None:
        """Keep the file open: its opener makes it durable first."""

    def fileno(self) -> int:
        """Return the file descriptor after flushing.

        Callers use it to make the file durable.
        """
        self._stream.flush()
        return self._stream.fileno()

    def record(self) -> FileRecord:
        """Return the record of the bytes written so far."""
        return FileRecord(self._bytes, self._digest.hexdigest())


def write_file(folder: Path, name: str, data: bytes) -> FileRecord:
    """Write a durable file that must not exist; an OSError names it."""
    try:
        with open(folder / name, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise (
            error if error.filename else OSError(error.errno, error.strerror, str(folder / name))
        ) from error
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def seal(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest, then commit.json. Every file must be durable already."""
    for name in files:
        _check_name(name)
    content = {
        "format": 1,
        "digest": "sha256",
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    manifest = write_file(folder, MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    sync_path(folder)
    write_file(folder, COMMIT, (json.dumps({"manifest_sha256": manifest.sha256}) + "\n").encode())
    sync_path(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Return the files that the folder must hold, by name.

    Raises:
        DamagedCheckpointError: manifest.json or commit.json is missing or damaged.
    """
    commit = _read_small(folder, COMMIT)
    data = _read_small(folder, MANIFEST)
    try:
        expected = json.loads(commit)["manifest_sha256"]
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise DamagedCheckpointError(
                f"{folder / MANIFEST} has SHA-256 {digest}, {COMMIT} says {expected}"
            )
        content = json.loads(data, object_pairs_hook=_without_repeats)
        if content["format"] != 1 or content["digest"] != "sha256":
            raise ValueError(
                f"format {content['format']!r} with digest {content['digest']!r} is not known"
            )
        return {name: _record(name, entry) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedCheckpointError):
            raise
        raise DamagedCheckpointError(
            f"{folder / MANIFEST} or {COMMIT} beside it is not a list of files and digests "
            f"({error})"
        ) from error


def _record(name: str, entry: Any) -> FileRecord:
    _check_name(name)
    record = FileRecord(**entry)
    if type(record.bytes) is not int or record.bytes < 0 or not _DIGEST.fullmatch(record.sha256):
        raise ValueError(f"{name} has no size and SHA-256")
    return record


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in (".", "..", MANIFEST, COMMIT):
        raise DamagedCheckpointError(
            f"a file of a checkpoint cannot be called {name[:200]!r}: names are plain, without "
            "folders"
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _read_small(folder: Path, name: str) -> bytes:
    try:
        descriptor = _open(folder / name)
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder / name} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(
            f"{folder / name} cannot be read ({error.strerror or error})"
        ) from error


def _open(path: Path) -> int:
    """Open a regular file, but no link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file")
    return descriptor


def verify(
    folder: Path,
    *,
    share: tuple[int, int] = (0, 1),
    patience: float = 0.0,
    from_disk: bool = False,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> list[str]:
    """Return what is wrong with the checkpoint in `folder`, a sentence each.

    Args:
        folder: the step folder.
        share: (i, n): compare the digests of the i-th part of the files only, of n of about the
            same size; names and sizes of all.
        patience: seconds to retry while names and sizes differ: a network file system may lag
            behind.
        from_disk: drop the files from the operating system's cache before they are read.
        progress: called with the number of bytes read, from any of several threads; an error that
            it raises ends the verification.

    Returns:
        [] where every byte is the one written.
    """
    deadline = time.monotonic() + patience
    while True:
        files, problems = _compare_sizes(folder)
        if not problems or time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    if problems:
        return problems
    names = _part(files, *share)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        results = pool.map(
            lambda name: _compare(folder / name, files[name], from_disk, progress), names
        )
        return [problem for problem in results if problem is not None]


def file_problem(folder: Path, name: str) -> str | None:
    """Return what is wrong with one file, or with the manifest that should list it; else None."""
    try:
        record = read_manifest(folder).get(name)
    except DamagedCheckpointError as error:
        return str(error)
    return (
        f"{folder / name} is not in {MANIFEST}"
        if record is None
        else _compare(folder / name, record, False, lambda _bytes: None)
    )


def _compare_sizes(folder: Path) -> tuple[dict[str, FileRecord], list[str]]:
    """Return the manifest, and the problems of the files' names and sizes."""
    try:
        files = read_manifest(folder)
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except DamagedCheckpointError as error:
        return {}, [str(error)]
    except OSError as error:
        return {}, [f"{folder} cannot be read ({error.strerror or error})"]
    problems = []
    for name, record in files.items():
        if name not in present:
            problems.append(f"{folder / name} is missing")
        elif not stat.S_ISREG(present[name].st_mode):
            problems.append(f"{folder / name} is not a regular file")
        elif present[name].st_size != record.bytes:
            problems.append(
                f"{folder / name} has {present[name].st_size} bytes, expected {record.bytes}"
            )
    extra = sorted(present.keys() - files.keys() - {MANIFEST, COMMIT})
    problems += [f"{folder / name} is not a file of this checkpoint" for name in extra]
    return files, problems


def _part(files: Mapping[str, FileRecord], index: int, count: int) -> list[str]:
    """Return the names of part `index` of `count`; the largest files are distributed first."""
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(name)
        sizes[smallest] += files[name].bytes
    return parts[index]


def _compare(
    path: Path, record: FileRecord, from_disk: bool, progress: Callable[[int], None]
) -> str | None:
    try:
        descriptor = _open(path)
        try:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            digest = hashlib.sha256()
            while data := os.read(descriptor, _CHUNK):
                digest.update(data)
                progress(len(data))
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    if digest.hexdigest() == record.sha256:
        return None
    return f"{path} has SHA-256 {digest.hexdigest()}, expected {record.sha256}"


def wait_for_folder(folder: Path, patience: float = STALE_SECONDS) -> None:
    """Wait until this machine sees a folder that another one may have made.

    Returns after `patience` seconds in any case.
    """
    deadline = time.monotonic() + patience
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)


def wait_for_sizes(
    folder: Path, files: Mapping[str, FileRecord], patience: float = STALE_SECONDS
) -> None:
    """Wait until this machine sees every file, which another one may have written, in its size.

    Args:
        folder: of the checkpoint.
        files: expected records by name.
        patience: seconds to wait.

    Raises:
        OSError: naming the first file that does not appear.
    """
    deadline = time.monotonic() + patience
    for name, record in files.items():
        while (size := _size(folder / name)) != record.bytes:
            if time.monotonic() > deadline:
                raise OSError(
                    0,
                    f"it has {size} bytes here, {record.bytes} were written: "
                    "is run.directory shared by all machines?",
                    str(folder / name),
                )
            time.sleep(0.05)


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None


def summarize_problems(problems: Iterable[str]) -> str:
    """Return the first problem, and how many more there are."""
    first, *others = problems
    return f"{first}; and {len(others)} more" if others else first

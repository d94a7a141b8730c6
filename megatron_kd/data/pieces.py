"""From pieces of text to one token file, so that work survives any interruption and no interruption mixes two jobs.

Each piece of work ends as files in `<output>.pieces/`: the ids and document lengths of each split, and a note that comes last and
says what they were made from. A note that fits is kept, anything else is made again. When all notes are there the pieces are put
together, in order, under the final names. No step holds more than one batch of documents and one piece's lengths.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config.durable import sync_path, write_atomically
from megatron_kd.config.run import ConfigError
from megatron_kd.data.documents import Document, Unit, documents
from megatron_kd.data.encode import Encoder
from megatron_kd.data.indexed import index_header
from megatron_kd.data.tokenizer import encoding_digest, load_tokenizer

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 2_000_000
_COPIED = 1 << 20
_LISTED = 20
_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Job:
    """All that decides what is written.

    tokenizer, end_of_document, pattern: see `load_tokenizer`; encoding: its `encoding_digest`. splits: (name, fraction); the first
    takes what no other takes. append_eod: end every document with end_of_document. strict: stop at a document without text.
    """

    tokenizer: str
    encoding: str
    splits: tuple[tuple[str, float], ...]
    append_eod: bool = True
    text_key: str = "text"
    end_of_document: str | None = None
    pattern: str | None = None
    strict: bool = False

    def digest(self, pieces: Sequence[Sequence[Unit]]) -> str:
        """sha256 (hex) of this job over these pieces; it changes when an input file does."""
        own = asdict(self) | {"tokenizer": None, "strict": None}
        units = [(u.file.key, u.file.size, u.file.stamp, u.format, u.start, u.end) for piece in pieces for u in piece]
        return hashlib.sha256(json.dumps([own, units]).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class PieceNote:
    """What one piece holds. Per split: documents with ids, ids, bytes of text, largest id, and bytes of its two files.

    lines: per unit, for the line numbers of the units after it. problems: (file, unit, line, reason) of documents without text.
    """

    made_from: str
    documents: list[int]
    tokens: list[int]
    text_bytes: list[int]
    max_id: list[int]
    sizes: list[list[int]]
    size: int
    empty: int = 0
    lines: list[int] = field(default_factory=list)
    problems: list[list[Any]] = field(default_factory=list)
    num_problems: int = 0


def choose_split(key: str, splits: Sequence[tuple[str, float]]) -> int:
    """Index of the split that the document named `key` belongs to: a function of the name alone."""
    if len(splits) == 1:
        return 0
    point = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    for index, (_, fraction) in enumerate(splits[1:], start=1):
        if point < fraction:
            return index
        point -= fraction
    return 0


@lru_cache(maxsize=1)
def _encoder(tokenizer: str, encoding: str, end_of_document: str | None, pattern: str | None) -> tuple[Encoder, int | None]:
    vocabulary, info = load_tokenizer(tokenizer, end_of_document=end_of_document, pattern=pattern)
    if encoding_digest(tokenizer, vocabulary) != encoding:
        raise ConfigError(f"{tokenizer} changed while it was in use: run the same command again")
    return Encoder(vocabulary), info.end_of_document


def piece_path(folder: Path, number: int, ending: str) -> Path:
    """`folder`/piece-<number>.<ending>."""
    return folder / f"piece-{number:06}.{ending}"


def find_note(folder: Path, number: int, made_from: str, num_splits: int) -> PieceNote | None:
    """The note of a finished piece of this very job; None where the piece is to be made."""
    try:
        note = PieceNote(**json.loads(piece_path(folder, number, "json").read_text(encoding="utf-8")))
        sizes = [[os.path.getsize(piece_path(folder, number, f"{s}.{kind}")) for kind in ("ids", "lengths")] for s in range(num_splits)]
    except (OSError, ValueError, TypeError):
        return None
    return note if note.made_from == made_from and note.sizes == sizes else None


def encode_piece(number: int, piece: Sequence[Unit], job: Job, folder: Path) -> PieceNote:
    """Tokenise one piece and leave its files and its note in `folder`, which must exist.

    Raises:
        ConfigError: strict, and a document has no text; or a document of more than 2^31 - 1 ids.
        OSError: the files cannot be written; nothing of them stays.
    """
    encoder, end = _encoder(job.tokenizer, job.encoding, job.end_of_document, job.pattern)
    suffix = encoder.vocabulary.dtype.type(end).tobytes() if job.append_eod else b""
    count = len(job.splits)
    note = PieceNote(job.digest([piece]), [0] * count, [0] * count, [0] * count, [-1] * count, [], sum(unit.size for unit in piece))
    temporary = [[piece_path(folder, number, f"{s}.{kind}.partial-{os.getpid()}") for kind in ("ids", "lengths")] for s in range(count)]
    files = [[open(path, "wb") for path in pair] for pair in temporary]  # noqa: SIM115
    try:
        for batch in _batches(_readable(piece, job, note)):
            encoded = encoder.encode([text for _, text in batch])
            for split in range(count):
                chosen = [(text, ids) for (own, text), ids in zip(batch, encoded, strict=True) if own == split]
                _write(chosen, suffix, encoder.vocabulary.dtype, files[split], note, split)
        for split, pair in enumerate(files):
            note.sizes.append([stream.tell() for stream in pair])
            for stream, source, kind in zip(pair, temporary[split], ("ids", "lengths"), strict=True):
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(source, piece_path(folder, number, f"{split}.{kind}"))
        write_atomically(piece_path(folder, number, "json"), json.dumps(asdict(note)).encode())
    finally:
        for stream, path in ((s, p) for pair, paths in zip(files, temporary, strict=True) for s, p in zip(pair, paths, strict=True)):
            try:
                stream.close()
            except OSError:  # what could not be written is why we are here
                pass
            path.unlink(missing_ok=True)
    return note


def _readable(piece: Sequence[Unit], job: Job, note: PieceNote) -> Iterator[tuple[int, str]]:
    """(split, text) of every document with text; the others and the lines are counted in `note`."""
    for place, unit in enumerate(piece):
        note.lines.append(0)

        def count() -> None:
            note.lines[-1] += 1

        for document in documents(unit, job.text_key, count):
            if document.text is None:
                _note_problem(document, place, unit, job, note)
            else:
                yield choose_split(document.name, job.splits), document.text


def _note_problem(document: Document, place: int, unit: Unit, job: Job, note: PieceNote) -> None:
    if job.strict:
        line = document.line + _lines_before(unit) if document.line else 0
        where = f"{unit.file.path}:{line}" if line else f"{unit.file.path}"
        raise ConfigError(f"{where} cannot be used ({document.problem}): repair it, --exclude its file, or leave out --strict")
    note.num_problems += 1
    if len(note.problems) < _LISTED:
        note.problems.append([str(unit.file.path), place, document.line, document.problem])


def _lines_before(unit: Unit) -> int:
    """Lines of a .jsonl file before the first that begins in this unit."""
    if unit.format != "jsonl" or not unit.start:
        return 0
    lines, left = 0, unit.start - 1
    with open(unit.file.path, "rb") as stream:
        while left:
            block = stream.read(min(left, _COPIED))
            if not block:
                break
            left -= len(block)
            lines += block.count(b"\n")
    return lines + 1


def _batches(found: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for item in found:
        batch.append(item)
        characters += len(item[1])
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(chosen: Sequence[tuple[str, bytes]], suffix: bytes, dtype: np.dtype, files: Sequence[Any], note: PieceNote, split: int) -> None:
    """Append documents to one split. As in Megatron's own tool, an empty document gets no end and a length of 0."""
    if not chosen:
        return
    size = dtype.itemsize
    lengths = np.array([(len(ids) + len(suffix)) // size if ids else 0 for _, ids in chosen], dtype=np.int64)
    if lengths.max() > _MAX_TOKENS:
        raise ConfigError(f"a document of {lengths.max()} ids is longer than an index can say ({_MAX_TOKENS}): cut it into several")
    data = b"".join(ids + suffix for _, ids in chosen if ids)
    files[0].write(data)
    files[1].write(lengths.astype("<i4").tobytes())
    note.empty += int((lengths == 0).sum())
    note.documents[split] += int((lengths > 0).sum())
    note.tokens[split] += len(data) // size
    note.text_bytes[split] += sum(len(text.encode("utf-8")) for text, _ in chosen)
    if data:
        note.max_id[split] = max(note.max_id[split], int(np.frombuffer(data, dtype).max()))


def publish(prefix: Path, dtype: np.dtype, ids: Sequence[Path], lengths: Sequence[Path], description: dict[str, Any]) -> None:
    """Put files of ids and of document lengths together as `prefix`.bin, .idx and .json, each complete or absent.

    The old index goes first and the new one comes last, so that an interruption never pairs an index with foreign tokens.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = {kind: prefix.with_name(f".{prefix.name}.{kind}.partial-{os.getpid()}") for kind in ("bin", "idx")}
    try:
        with open(temporary["bin"], "wb") as target:
            for path in ids:
                with open(path, "rb") as source:
                    shutil.copyfileobj(source, target, _COPIED)
            target.flush()
            os.fsync(target.fileno())
        with open(temporary["idx"], "wb") as target:
            for block in _index_blocks(dtype, lengths):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        for ending in ("idx", "roles"):
            Path(f"{prefix}.{ending}").unlink(missing_ok=True)
        os.replace(temporary["bin"], f"{prefix}.bin")
        write_atomically(f"{prefix}.json", (json.dumps(description, indent=2) + "\n").encode())
        os.replace(temporary["idx"], f"{prefix}.idx")
        sync_path(prefix.parent)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _index_blocks(dtype: np.dtype, paths: Sequence[Path]) -> Iterator[bytes]:
    """An .idx file in blocks: header, lengths and offsets of sequences, and per document the sequences up to its end."""

    def blocks() -> Iterator[np.ndarray]:
        for path in paths:
            with open(path, "rb") as stream:
                while data := stream.read(_COPIED):
                    yield np.frombuffer(data, "<i4")

    num_documents = sum(map(len, blocks()))
    num_sequences = sum(int((block > 0).sum()) for block in blocks())
    yield index_header(dtype, num_sequences, num_documents + 1)
    for block in blocks():
        yield block[block > 0].tobytes()
    start = 0
    for block in blocks():
        ends = start + np.cumsum(block[block > 0], dtype=np.int64)
        yield ((ends - block[block > 0]) * dtype.itemsize).astype("<i8").tobytes()
        start = int(ends[-1]) if len(ends) else start
    yield np.zeros(1, "<i8").tobytes()
    start = 0
    for block in blocks():
        marks = start + np.cumsum(block > 0, dtype=np.int64)
        yield marks.astype("<i8").tobytes()
        start = int(marks[-1]) if len(marks) else start


def numbered_problems(pieces: Sequence[Sequence[Unit]], notes: Sequence[PieceNote]) -> Iterator[str]:
    """`file:line: reason` of each listed document without text, with lines counted from the start of the file."""
    before: dict[Path, int] = {}
    for piece, note in zip(pieces, notes, strict=True):
        starts = []
        for unit, lines in zip(piece, note.lines, strict=True):
            starts.append(before.get(unit.file.path, 0))
            before[unit.file.path] = starts[-1] + lines
        for file, place, line, reason in note.problems:
            yield f"{file}:{starts[place] + line}: {reason}" if line else f"{file}: {reason}"


def first_problems(pieces: Sequence[Sequence[Unit]], notes: Sequence[PieceNote]) -> list[str]:
    """The first few of `numbered_problems`."""
    return list(islice(numbered_problems(pieces, notes), _LISTED))


def follow_parent() -> None:
    """Let this worker end when the process that started it dies without a word: an orphan would wait for work for ever."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def run_pieces(
    pieces: Sequence[Sequence[Unit]], job: Job, folder: Path, workers: int, chosen: Sequence[int], report: Callable[[PieceNote, bool], None]
) -> None:
    """Make the pieces `chosen` that are not there yet; `report(note, kept)` for each, in order.

    Raises:
        ConfigError, OSError: see `encode_piece`; what is finished stays. Also when a worker dies.
    """
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    kept = {n: find_note(folder, n, job.digest([pieces[n]]), len(job.splits)) for n in chosen}
    todo = [number for number in chosen if kept[number] is None]
    if min(workers, len(todo)) <= 1:
        for number in chosen:
            found = kept[number]
            report(found or encode_piece(number, pieces[number], job, folder), found is not None)
        return
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=multiprocessing.get_context("spawn"), initializer=follow_parent) as pool:
        futures: dict[int, Future[PieceNote]] = {n: pool.submit(encode_piece, n, pieces[n], job, folder) for n in todo}
        try:
            for number in chosen:
                found = kept[number]
                report(found or futures[number].result(), found is not None)
        except BrokenProcessPool as error:
            raise ConfigError("a worker died, most likely for lack of memory: use fewer --workers and run again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)

"""From pieces of text to one token file, so that work survives any interruption and no interruption mixes two jobs.

Each piece of work ends as files in `<output>.pieces/`: the ids and document lengths of each split, and a note that comes last and
says what they were made from. A note that fits is kept, anything else is made again. When all notes are there the pieces are put
together, in order, under the final names. No step holds more than one batch of documents and one piece's lengths.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import Document, Unit, documents
from megatron_kd.data.preparation.fast_encoding import Encoder
from megatron_kd.data.preparation.publish import publish
from megatron_kd.data.tokenizer import encoding_digest, load_tokenizer
from megatron_kd.data.vocabularies.base import EncodingError
from megatron_kd.storage.atomic_files import write_atomically

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 2_000_000
_COPIED = 1 << 20
_LISTED = 20
_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Job:
    """All that decides what is written.

    tokenizer, end_of_document, pattern: see `load_tokenizer`; encoding: its `encoding_digest`. splits: (name, fraction); the first
    takes what no other takes. append_eod: end every document with end_of_document. strict: stop at a document without text.
    Conversations are another kind of job (`chats.ChatJob`): `kinds`, `write` and `publish` are all that differs.
    """

    kinds: ClassVar[tuple[str, ...]] = ("ids", "lengths")
    advice: ClassVar[str] = "check --text-key, --format and the input"

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
        units = [
            (u.file.key, u.file.size, u.file.stamp, u.format, u.start, u.end)
            for piece in pieces
            for u in piece
        ]
        return hashlib.sha256(
            json.dumps([own, units]).encode("utf-8", "surrogateescape")
        ).hexdigest()

    def write(
        self, piece: Sequence[Unit], files: Sequence[Sequence[IO[bytes]]], note: PieceNote
    ) -> None:
        """Write one piece into its files, by split and kind, and count it in `note`."""
        encoder, end = _encoder(self.tokenizer, self.encoding, self.end_of_document, self.pattern)
        dtype = encoder.vocabulary.dtype
        suffix = dtype.type(end).tobytes() if self.append_eod else b""
        for batch in _batches(readable(piece, self, note)):
            kept, encoded = _encode(encoder, batch, self, note)
            for split in range(len(self.splits)):
                chosen = [
                    (one.text, ids)
                    for one, ids in zip(kept, encoded, strict=True)
                    if one.split == split
                ]
                _write(chosen, suffix, dtype, files[split], note, split)

    def publish(
        self,
        prefix: Path,
        dtype: np.dtype,
        folder: Path,
        split: int,
        notes: Sequence[PieceNote],
        about: dict[str, Any],
    ) -> dict[str, Any]:
        """Put one split together under its names; its description: `about` and what the notes say."""
        description = about | {
            "append_eod": self.append_eod,
            "bytes": sum(note.text_bytes[split] for note in notes),
            "tokens": sum(note.tokens[split] for note in notes),
            "documents": sum(note.documents[split] for note in notes),
            "max_id": max(note.max_id[split] for note in notes),
        }
        ids, lengths = (
            [piece_path(folder, number, f"{split}.{kind}") for number in range(len(notes))]
            for kind in ("ids", "lengths")
        )
        publish(prefix, dtype, ids, lengths, description)
        return description


@dataclass
class PieceNote:
    """What one piece holds. Per split: documents with ids, ids, bytes of text, largest id, and bytes of its files.

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
    too_long: int = 0


@dataclass(frozen=True)
class Found:
    """A document with text: the split it belongs to, and its place in `piece`."""

    split: int
    document: Document
    text: str
    place: int
    unit: Unit


def choose_split(key: str, splits: Sequence[tuple[str, float]]) -> int:
    """Index of the split that the document named `key` belongs to: a function of the name alone."""
    if len(splits) == 1:
        return 0
    point = (
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
    )
    for index, (_, fraction) in enumerate(splits[1:], start=1):
        if point < fraction:
            return index
        point -= fraction
    return 0


@lru_cache(maxsize=1)
def _encoder(
    tokenizer: str, encoding: str, end_of_document: str | None, pattern: str | None
) -> tuple[Encoder, int | None]:
    vocabulary, info = load_tokenizer(tokenizer, end_of_document=end_of_document, pattern=pattern)
    if encoding_digest(tokenizer, vocabulary) != encoding:
        raise ConfigError(f"{tokenizer} changed while it was in use: run the same command again")
    return Encoder(vocabulary), info.end_of_document


def piece_path(folder: Path, number: int, ending: str) -> Path:
    """`folder`/piece-<number>.<ending>."""
    return folder / f"piece-{number:06}.{ending}"


def find_note(folder: Path, number: int, made_from: str, job: Job) -> PieceNote | None:
    """The note of a finished piece of this very job; None where the piece is to be made."""
    try:
        note = PieceNote(
            **json.loads(piece_path(folder, number, "json").read_text(encoding="utf-8"))
        )
        sizes = [
            [os.path.getsize(piece_path(folder, number, f"{s}.{kind}")) for kind in job.kinds]
            for s in range(len(job.splits))
        ]
    except (OSError, ValueError, TypeError):
        return None
    return note if note.made_from == made_from and note.sizes == sizes else None


def encode_piece(number: int, piece: Sequence[Unit], job: Job, folder: Path) -> PieceNote:
    """Tokenise one piece and leave its files and its note in `folder`, which must exist.

    Raises:
        ConfigError: strict, and a document has no text; or a document of more than 2^31 - 1 ids.
        OSError: the files cannot be written; nothing of them stays.
    """
    count = len(job.splits)
    note = PieceNote(
        job.digest([piece]),
        [0] * count,
        [0] * count,
        [0] * count,
        [-1] * count,
        [],
        sum(unit.size for unit in piece),
    )
    temporary = [
        [piece_path(folder, number, f"{s}.{kind}.partial-{os.getpid()}") for kind in job.kinds]
        for s in range(count)
    ]
    files = [[open(path, "wb") for path in pair] for pair in temporary]  # noqa: SIM115
    try:
        job.write(piece, files, note)
        for split, pair in enumerate(files):
            note.sizes.append([stream.tell() for stream in pair])
            for stream, source, kind in zip(pair, temporary[split], job.kinds, strict=True):
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(source, piece_path(folder, number, f"{split}.{kind}"))
        write_atomically(piece_path(folder, number, "json"), json.dumps(asdict(note)).encode())
    finally:
        for stream, path in (
            (s, p)
            for pair, paths in zip(files, temporary, strict=True)
            for s, p in zip(pair, paths, strict=True)
        ):
            try:
                stream.close()
            except OSError:  # what could not be written is why we are here
                pass
            path.unlink(missing_ok=True)
    return note


def readable(piece: Sequence[Unit], job: Job, note: PieceNote) -> Iterator[Found]:
    """Every document with text; the others and the lines are counted in `note`."""
    for place, unit in enumerate(piece):
        note.lines.append(0)

        def count() -> None:
            note.lines[-1] += 1

        for document in documents(unit, job.text_key, count):
            if document.text is None:
                note_problem(document, document.problem, place, unit, job, note)
            else:
                yield Found(
                    choose_split(document.name, job.splits), document, document.text, place, unit
                )


def note_problem(
    document: Document, problem: str, place: int, unit: Unit, job: Job, note: PieceNote
) -> None:
    """Count a document that cannot be used. ConfigError, strict."""
    if job.strict:
        line = document.line + _lines_before(unit) if document.line else 0
        where = f"{unit.file.path}:{line}" if line else f"{unit.file.path}"
        raise ConfigError(
            f"{where} cannot be used ({problem}): repair it, --exclude its file, or leave out --strict"
        )
    note.num_problems += 1
    if len(note.problems) < _LISTED:
        note.problems.append([str(unit.file.path), place, document.line, problem])


def _lines_before(unit: Unit) -> int:
    """Lines of a .jsonl file before the first that begins in this unit."""
    if unit.format == "parquet" or not unit.start:
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


def _batches(found: Iterator[Found]) -> Iterator[list[Found]]:
    batch: list[Found] = []
    characters = 0
    for item in found:
        batch.append(item)
        characters += len(item.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    encoder: Encoder, batch: list[Found], job: Job, note: PieceNote
) -> tuple[list[Found], list[bytes]]:
    """The documents that the tokenizer takes, and their ids."""
    try:
        return batch, encoder.encode([found.text for found in batch])
    except EncodingError:
        pass  # one of them: which?
    kept, encoded = [], []
    for found in batch:
        try:
            encoded += encoder.encode([found.text])
            kept.append(found)
        except EncodingError as error:
            note_problem(found.document, str(error), found.place, found.unit, job, note)
    return kept, encoded


def _write(
    chosen: Sequence[tuple[str, bytes]],
    suffix: bytes,
    dtype: np.dtype,
    files: Sequence[Any],
    note: PieceNote,
    split: int,
) -> None:
    """Append documents to one split. As in Megatron's own tool, an empty document gets no end and a length of 0."""
    if not chosen:
        return
    size = dtype.itemsize
    lengths = np.array(
        [(len(ids) + len(suffix)) // size if ids else 0 for _, ids in chosen], dtype=np.int64
    )
    if lengths.max() > _MAX_TOKENS:
        raise ConfigError(
            f"a document of {lengths.max()} ids is longer than an index can say ({_MAX_TOKENS}): cut it into several"
        )
    data = b"".join(ids + suffix for _, ids in chosen if ids)
    files[0].write(data)
    files[1].write(lengths.astype("<i4").tobytes())
    note.empty += int((lengths == 0).sum())
    note.documents[split] += int((lengths > 0).sum())
    note.tokens[split] += len(data) // size
    note.text_bytes[split] += sum(
        len(text) if text.isascii() else len(text.encode("utf-8")) for text, _ in chosen
    )
    if data:
        note.max_id[split] = max(note.max_id[split], int(np.frombuffer(data, dtype).max()))


def numbered_problems(
    pieces: Sequence[Sequence[Unit]], notes: Sequence[PieceNote]
) -> Iterator[str]:
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
    pieces: Sequence[Sequence[Unit]],
    job: Job,
    folder: Path,
    workers: int,
    chosen: Sequence[int],
    report: Callable[[PieceNote, bool], None],
) -> None:
    """Make the pieces `chosen` that are not there yet; `report(note, kept)` for each, in order.

    Raises:
        ConfigError, OSError: see `encode_piece`; what is finished stays. Also when a worker dies.
    """
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    kept = {n: find_note(folder, n, job.digest([pieces[n]]), job) for n in chosen}
    todo = [number for number in chosen if kept[number] is None]
    if min(workers, len(todo)) <= 1:
        for number in chosen:
            found = kept[number]
            report(found or encode_piece(number, pieces[number], job, folder), found is not None)
        return
    with ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=follow_parent,
    ) as pool:
        futures: dict[int, Future[PieceNote]] = {
            n: pool.submit(encode_piece, n, pieces[n], job, folder) for n in todo
        }
        try:
            for number in chosen:
                found = kept[number]
                report(found or futures[number].result(), found is not None)
        except BrokenProcessPool as error:
            raise ConfigError(
                "a worker died, most likely for lack of memory: use fewer --workers and run again to go on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

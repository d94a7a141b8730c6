"""Define a job, its pieces of work and their summaries.

Each piece of work ends as files in `<output>.pieces/`: the ids and document lengths of each split,
and a summary that is written last and identifies the job and the input. A matching summary is kept,
any other piece is made again. Once all pieces exist they are joined, in order, under the final
names. No step holds more than one batch of documents and the lengths of one piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import documents, lines_before
from megatron_kd.data.preparation.formats.document_format import Document, LineCounter, Unit
from megatron_kd.data.tokenizer import TokenizerInfo, encoding_digest, load_tokenizer
from megatron_kd.data.vocabularies.vocabulary import Vocabulary

MAX_LISTED_PROBLEMS = 20


@dataclass
class PieceSummary:
    """Count what one piece holds.

    Attributes:
        made_from: digest of the job and the input of the piece.
        documents: documents with ids, per split.
        tokens: ids, per split.
        text_bytes: bytes of text, per split.
        max_id: largest id, per split.
        sizes: bytes of the piece's files, per split and kind.
        size: bytes of input.
        empty: documents without ids.
        lines: lines per unit, from which the line numbers of later units follow.
        problems: (file, unit, line, reason) of the first documents that cannot be used.
        num_problems: documents that cannot be used.
        too_long: conversations longer than a sample, which `num_problems` includes.
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
class SourceDocument:
    """Hold a document with text and its origin in a piece.

    Attributes:
        split: index of the split that it belongs to.
        document: the document.
        text: its text.
        unit_index: index of its unit in the piece.
        unit: the unit.
    """

    split: int
    document: Document
    text: str
    unit_index: int
    unit: Unit


@dataclass(frozen=True)
class SplitOutput:
    """Describe the token file to make of one split.

    Attributes:
        prefix: path without .bin/.idx.
        dtype: integer type of the ids.
        folder: where the pieces are.
        split: index of the split.
        summaries: of all pieces, in order.
        description: what the .json states for every kind of job.
    """

    prefix: Path
    dtype: np.dtype
    folder: Path
    split: int
    summaries: Sequence[PieceSummary]
    description: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Hold everything that decides what is written; the base class of both kinds of job.

    Attributes:
        tokenizer: path of the tokenizer.
        encoding: its `encoding_digest`.
        splits: (name, fraction); the first split takes every document that no other takes.
        append_eod: end every document with the end-of-document id.
        text_key: key or column of the text.
        end_of_document: see `load_tokenizer`.
        pattern: see `load_tokenizer`.
        strict: stop at the first document that cannot be used.
        kinds: files of a piece, per split.
        advice: remedy for a split without documents, for messages.
    """

    kinds: ClassVar[tuple[str, ...]]
    advice: ClassVar[str]

    tokenizer: str
    encoding: str
    splits: tuple[tuple[str, float], ...]
    append_eod: bool = True
    text_key: str = "text"
    end_of_document: str | None = None
    pattern: str | None = None
    strict: bool = False

    def digest(self, pieces: Sequence[Sequence[Unit]]) -> str:
        """Return the sha256 (hex) of this job over these pieces; a changed file changes it."""
        settings = asdict(self) | {"tokenizer": None, "strict": None}
        units = [
            (unit.file.key, unit.file.size, unit.file.stamp, unit.format, unit.start, unit.end)
            for piece in pieces
            for unit in piece
        ]
        content = json.dumps([settings, units]).encode("utf-8", "surrogateescape")
        return hashlib.sha256(content).hexdigest()

    def load_vocabulary(self) -> tuple[Vocabulary, TokenizerInfo]:
        """Load the tokenizer of the job.

        Raises:
            ConfigError: its file is not the one that the job was planned with.
        """
        vocabulary, info = load_tokenizer(
            self.tokenizer, end_of_document=self.end_of_document, pattern=self.pattern
        )
        if encoding_digest(self.tokenizer, vocabulary) != self.encoding:
            raise ConfigError(
                f"{self.tokenizer} changed while it was in use: run the same command again"
            )
        return vocabulary, info

    def write(
        self, piece: Sequence[Unit], files: Sequence[Sequence[IO[bytes]]], summary: PieceSummary
    ) -> None:
        """Write one piece and count it.

        Args:
            piece: units of the piece.
            files: open files, by split and kind.
            summary: counts, which are increased.
        """
        raise NotImplementedError

    def publish(self, output: SplitOutput) -> dict[str, Any]:
        """Join the pieces of one split under its final names and return its description."""
        raise NotImplementedError

    def source_documents(
        self, piece: Sequence[Unit], summary: PieceSummary
    ) -> Iterator[SourceDocument]:
        """Yield every document with text; count the others, and the lines, in `summary`."""
        for unit_index, unit in enumerate(piece):
            counter = LineCounter()
            for document in documents(unit, self.text_key, counter):
                text = document.text
                split = choose_split(document.name, self.splits)
                source = SourceDocument(split, document, text or "", unit_index, unit)
                if text is None:
                    self.record_problem(source, document.problem, summary)
                else:
                    yield source
            summary.lines.append(counter.lines)

    def record_problem(self, source: SourceDocument, problem: str, summary: PieceSummary) -> None:
        """Count a document that cannot be used.

        Args:
            source: the document.
            problem: why it cannot be used.
            summary: counts, which are increased.

        Raises:
            ConfigError: the job is strict.
        """
        path, line = source.unit.file.path, source.document.line
        if self.strict:
            position = f"{path}:{line + lines_before(source.unit)}" if line else f"{path}"
            raise ConfigError(
                f"{position} cannot be used ({problem}): "
                "repair it, --exclude its file, or leave out --strict"
            )
        summary.num_problems += 1
        if len(summary.problems) < MAX_LISTED_PROBLEMS:
            summary.problems.append([str(path), source.unit_index, line, problem])


def choose_split(name: str, splits: Sequence[tuple[str, float]]) -> int:
    """Return the index of the split of a document, which depends on its name alone."""
    if len(splits) == 1:
        return 0
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for index, (_, fraction) in enumerate(splits[1:], start=1):
        if point < fraction:
            return index
        point -= fraction
    return 0


def piece_path(folder: Path, number: int, ending: str) -> Path:
    """Return `folder`/piece-<number>.<ending>."""
    return folder / f"piece-{number:06}.{ending}"

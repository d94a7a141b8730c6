"""Turn text into token files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.formats.document_format import Unit
from megatron_kd.data.preparation.jobs.encoding import DocumentEncoder
from megatron_kd.data.preparation.jobs.job import (
    Job,
    PieceSummary,
    SourceDocument,
    SplitOutput,
    piece_path,
)
from megatron_kd.data.preparation.jobs.job_plan import JobPlan, PlanRequest, make_plan
from megatron_kd.data.preparation.publish import publish
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.data.vocabularies.vocabulary import EncodingError

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 2_000_000
_MAX_DOCUMENT_TOKENS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class TextRequest(PlanRequest):
    """State which text to turn into which token files.

    Attributes:
        format: name of the input format, or "auto" for the one of each file's suffix.
        append_eod: end every document with the end-of-document id.
        text_key: key or column of the text.
    """

    format: str = "auto"
    append_eod: bool = True
    text_key: str = "text"


def plan_text(request: TextRequest) -> JobPlan:
    """Find the input, load the tokenizer and cut the work. Nothing is written.

    Raises:
        ConfigError: no input, no tokenizer, or one without an end of document if documents are to
            end with it.
    """
    vocabulary, info = load_tokenizer(
        request.tokenizer, end_of_document=request.end_of_document, pattern=request.pattern
    )
    if request.append_eod and info.end_of_document is None:
        raise ConfigError(
            f"the tokenizer {request.tokenizer} names no token that ends documents: "
            "name one with --end-of-document, or give --no-append-eod"
        )
    job = TextJob(
        **request.job_settings(vocabulary),
        append_eod=request.append_eod,
        text_key=request.text_key,
    )
    return make_plan(request, job, info, vocabulary.dtype, request.format)


@dataclass(frozen=True)
class TextJob(Job):
    """Encode each document by itself."""

    kinds: ClassVar[tuple[str, ...]] = ("ids", "lengths")
    advice: ClassVar[str] = "check --text-key, --format and the input"

    def write(
        self, piece: Sequence[Unit], files: Sequence[Sequence[IO[bytes]]], summary: PieceSummary
    ) -> None:
        """Write one piece; see `Job.write`."""
        encoder, end = _load_encoder(self)
        dtype = encoder.vocabulary.dtype
        suffix = dtype.type(end).tobytes() if self.append_eod else b""
        for batch in _batches(self.source_documents(piece, summary)):
            sources, encoded = self._encode(encoder, batch, summary)
            for split in range(len(self.splits)):
                chosen = [
                    (source.text, ids + suffix if ids else b"")
                    for source, ids in zip(sources, encoded, strict=True)
                    if source.split == split
                ]
                if chosen:
                    summary.text_bytes[split] += sum(_num_bytes(text) for text, _ in chosen)
                    _write([ids for _, ids in chosen], dtype, files[split], summary, split)

    def publish(self, output: SplitOutput) -> dict[str, Any]:
        """Join one split; see `Job.publish`."""
        split, summaries = output.split, output.summaries
        description = output.description | {
            "append_eod": self.append_eod,
            "bytes": sum(summary.text_bytes[split] for summary in summaries),
            "tokens": sum(summary.tokens[split] for summary in summaries),
            "documents": sum(summary.documents[split] for summary in summaries),
            "max_id": max(summary.max_id[split] for summary in summaries),
        }
        ids, lengths = (
            [piece_path(output.folder, n, f"{split}.{kind}") for n in range(len(summaries))]
            for kind in ("ids", "lengths")
        )
        publish(output.prefix, output.dtype, ids, lengths, description)
        return description

    def _encode(
        self, encoder: DocumentEncoder, batch: list[SourceDocument], summary: PieceSummary
    ) -> tuple[list[SourceDocument], list[bytes]]:
        """Return the documents that the tokenizer accepts, and their ids."""
        try:
            return batch, encoder.encode([source.text for source in batch])
        except EncodingError:
            pass  # at least one of them is refused
        accepted, encoded = [], []
        for source in batch:
            try:
                encoded += encoder.encode([source.text])
                accepted.append(source)
            except EncodingError as error:
                self.record_problem(source, str(error), summary)
        return accepted, encoded


@lru_cache(maxsize=1)
def _load_encoder(job: TextJob) -> tuple[DocumentEncoder, int | None]:
    vocabulary, info = job.load_vocabulary()
    return DocumentEncoder(vocabulary), info.end_of_document


def _batches(sources: Iterator[SourceDocument]) -> Iterator[list[SourceDocument]]:
    batch: list[SourceDocument] = []
    characters = 0
    for source in sources:
        batch.append(source)
        characters += len(source.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _write(
    encoded: Sequence[bytes],
    dtype: np.dtype,
    files: Sequence[IO[bytes]],
    summary: PieceSummary,
    split: int,
) -> None:
    """Append documents to one split.

    As in Megatron's own tool, an empty document has a length of 0 and no end-of-document id.
    """
    lengths = np.array([len(ids) // dtype.itemsize for ids in encoded], dtype=np.int64)
    if lengths.max() > _MAX_DOCUMENT_TOKENS:
        raise ConfigError(
            f"a document of {lengths.max()} ids is longer than an index can state "
            f"({_MAX_DOCUMENT_TOKENS}): cut it into several"
        )
    data = b"".join(encoded)
    files[0].write(data)
    files[1].write(lengths.astype("<i4").tobytes())
    summary.empty += int((lengths == 0).sum())
    summary.documents[split] += int((lengths > 0).sum())
    summary.tokens[split] += len(data) // dtype.itemsize
    if data:
        largest = int(np.frombuffer(data, dtype).max())
        summary.max_id[split] = max(summary.max_id[split], largest)

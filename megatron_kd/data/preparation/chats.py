"""Conversations from lines of JSON to packed token files: a job like that of text, whose pieces hold roles too.

Pieces hold whole conversations, one after the other; only when all are there are they packed, in the order of the input. So the
outcome depends neither on how many processes encode nor on how often they were killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.conversations import (
    BadConversation,
    ChatTemplate,
    ConversationEncoder,
    Packed,
    Packer,
    messages_of,
)
from megatron_kd.data.preparation.documents import Unit, fast_loads, find_text_files, make_pieces
from megatron_kd.data.preparation.pieces import Job, PieceNote, note_problem, piece_path, readable
from megatron_kd.data.preparation.preprocess import Plan, refuse_foreign_files, without_output
from megatron_kd.data.preparation.publish import publish
from megatron_kd.data.token_files import COUNTS_FOR_LOSS
from megatron_kd.data.tokenizer import encoding_digest, load_tokenizer


@dataclass(frozen=True)
class ChatJob(Job):
    """All that decides what is written. template: jinja source; sequence_length: tokens of a sample; the keys: see `messages_of`."""

    template: str = ""
    sequence_length: int = 0
    messages_key: str = "messages"
    prompt_key: str = "prompt"
    response_key: str = "response"
    kinds: ClassVar[tuple[str, ...]] = ("ids", "lengths", "roles")
    advice: ClassVar[str] = "check the keys, --sequence-length and the input"

    def write(
        self, piece: Sequence[Unit], files: Sequence[Sequence[IO[bytes]]], note: PieceNote
    ) -> None:
        """Write the conversations of one piece that fit into a sample."""
        encoder, loads = _encoder(self), fast_loads()
        for found in readable(piece, self, note):
            try:
                row = loads(found.text.encode("utf-8"))
                if not isinstance(row, dict):
                    raise BadConversation("no JSON object")
                messages = messages_of(
                    row,
                    messages_key=self.messages_key,
                    prompt_key=self.prompt_key,
                    response_key=self.response_key,
                )
                ids, roles = encoder.encode(messages)
            except (ValueError, RecursionError) as error:
                problem = " ".join(str(error).split()) or "not JSON"
                problem = problem if isinstance(error, BadConversation) else f"not JSON: {problem}"
                note_problem(found.document, problem, found.place, found.unit, self, note)
                continue
            if len(ids) > self.sequence_length:
                problem = f"{len(ids)} tokens, more than --sequence-length {self.sequence_length}"
                note_problem(found.document, problem, found.place, found.unit, self, note)
                note.too_long += 1
                continue
            for stream, values in zip(
                files[found.split], (ids, np.array([len(ids)], "<i4"), roles), strict=True
            ):
                stream.write(values.tobytes())
            note.documents[found.split] += 1
            note.text_bytes[found.split] += len(found.text)
            note.tokens[found.split] += len(ids)
            note.max_id[found.split] = max(note.max_id[found.split], int(ids.max()))

    def publish(
        self,
        prefix: Path,
        dtype: np.dtype,
        folder: Path,
        split: int,
        notes: Sequence[PieceNote],
        about: dict[str, Any],
    ) -> dict[str, Any]:
        """Pack one split and put it under its names; its description."""
        packer = Packer(self.sequence_length, about["end_of_document"], dtype)
        packed = [folder / f"packed.{split}.{kind}.partial-{os.getpid()}" for kind in self.kinds]
        samples = counted = 0
        largest = -1
        with ExitStack() as stack:
            for path in packed:
                stack.callback(path.unlink, missing_ok=True)
            files = [stack.enter_context(open(path, "wb")) for path in packed]
            for sample in _pack(packer, folder, split, len(notes), dtype):
                for stream, values in zip(
                    files,
                    (sample.ids, np.array([len(sample.ids)], "<i4"), sample.roles),
                    strict=True,
                ):
                    stream.write(values.tobytes())
                samples, counted = (
                    samples + 1,
                    counted + int((sample.roles & COUNTS_FOR_LOSS).sum()),
                )
                largest = max(largest, int(sample.ids.max()))
            for stream in files:
                stream.flush()
            description = about | {
                "packed_length": self.sequence_length,
                "conversations": sum(note.documents[split] for note in notes),
                "loss_tokens": counted,
                "tokens": samples * self.sequence_length,
                "documents": samples,
                "max_id": largest,
            }
            ids, lengths, roles = packed
            publish(prefix, dtype, [ids], [lengths], description, roles=[roles])
            return description


@lru_cache(maxsize=1)
def _encoder(job: ChatJob) -> ConversationEncoder:
    vocabulary, _ = load_tokenizer(
        job.tokenizer, end_of_document=job.end_of_document, pattern=job.pattern
    )
    if encoding_digest(job.tokenizer, vocabulary) != job.encoding:
        raise ConfigError(
            f"{job.tokenizer} changed while it was in use: run the same command again"
        )
    return ConversationEncoder(vocabulary, ChatTemplate(job.template, vocabulary))


def _pack(
    packer: Packer, folder: Path, split: int, num_pieces: int, dtype: np.dtype
) -> Iterator[Packed]:
    for number in range(num_pieces):
        kinds = {"ids": dtype, "lengths": np.dtype("<i4"), "roles": np.dtype(np.uint8)}
        ids, lengths, roles = (
            np.fromfile(piece_path(folder, number, f"{split}.{name}"), kind)
            for name, kind in kinds.items()
        )
        ends = np.cumsum(lengths, dtype=np.int64)[:-1]
        for own, parts in (
            zip(np.split(ids, ends), np.split(roles, ends), strict=True) if len(lengths) else ()
        ):
            sample = packer.add(own, parts)
            if sample is not None:
                yield sample
    yield from packer.finish()


def make_chat_plan(
    inputs: Sequence[str],
    output: Path,
    tokenizer: str,
    *,
    sequence_length: int,
    template: str | None = None,
    patterns: Sequence[str] = ("*",),
    holdout: Sequence[tuple[str, float]] = (),
    end_of_document: str | None = None,
    pattern: str | None = None,
    strict: bool = False,
    **keys: str,
) -> Plan:
    """Find the input, load the tokenizer and the template (None: the tokenizer's own), cut the work. Nothing is written.

    Raises:
        ConfigError: no input, no tokenizer, no end of document, no template or none that is valid.
    """
    vocabulary, info = load_tokenizer(tokenizer, end_of_document=end_of_document, pattern=pattern)
    if info.end_of_document is None:
        raise ConfigError(
            f"the tokenizer {tokenizer} names no token that ends documents: name one with --end-of-document"
        )
    source = template or vocabulary.chat_template
    if not source:
        raise ConfigError(
            f"the tokenizer {tokenizer} has no chat template: name one with --template, such as examples/instructions/plain.jinja"
        )
    ChatTemplate(source, vocabulary)
    splits = ((output.name, 0.0), *holdout)
    names = [name for name, _ in splits]
    job = ChatJob(
        str(Path(tokenizer).absolute()), encoding_digest(tokenizer, vocabulary), splits, True, "", end_of_document, pattern, strict,
        source, sequence_length, **keys,
    )  # fmt: skip
    pieces = make_pieces(without_output(find_text_files(inputs, patterns), output, names), "lines")
    refuse_foreign_files([output.with_name(name) for name in names])
    return Plan(output, job, info, vocabulary.dtype, pieces, job.digest(pieces))

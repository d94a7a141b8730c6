"""Turn conversations in lines of JSON into packed token files.

Pieces hold whole conversations one after the other. They are packed in the order of the input once
all pieces exist, so that the result depends neither on the number of processes nor on
interruptions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, ClassVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.formats.document_format import Unit
from megatron_kd.data.preparation.formats.json_lines import json_parser
from megatron_kd.data.preparation.jobs.conversations import (
    ChatTemplate,
    ConversationEncoder,
    ConversationError,
    MessageKeys,
    parse_messages,
)
from megatron_kd.data.preparation.jobs.job import Job, PieceSummary, SplitOutput, piece_path
from megatron_kd.data.preparation.jobs.job_plan import JobPlan, PlanRequest, make_plan
from megatron_kd.data.preparation.jobs.sample_packing import PackedSample, Packer
from megatron_kd.data.preparation.publish import publish
from megatron_kd.data.token_files import COUNTS_FOR_LOSS
from megatron_kd.data.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ChatRequest(PlanRequest):
    """State which conversations to turn into which packed token files.

    Attributes:
        sequence_length: tokens of a sample.
        template: jinja source of the chat template; None takes the tokenizer's own.
        keys: keys of a conversation in a line.
    """

    sequence_length: int
    template: str | None = None
    keys: MessageKeys = MessageKeys()


def plan_chats(request: ChatRequest) -> JobPlan:
    """Find the input, load the tokenizer and the template, and cut the work. Nothing is written.

    Raises:
        ConfigError: no input, no tokenizer, no end of document, or no valid template.
    """
    vocabulary, info = load_tokenizer(
        request.tokenizer, end_of_document=request.end_of_document, pattern=request.pattern
    )
    if info.end_of_document is None:
        raise ConfigError(
            f"the tokenizer {request.tokenizer} names no token that ends documents: "
            "name one with --end-of-document"
        )
    source = request.template or vocabulary.chat_template
    if not source:
        raise ConfigError(
            f"the tokenizer {request.tokenizer} has no chat template: "
            "name one with --template, such as examples/instructions/plain.jinja"
        )
    ChatTemplate(source, vocabulary)
    job = ChatJob(
        **request.job_settings(vocabulary),
        text_key="",
        template=source,
        sequence_length=request.sequence_length,
        messages_key=request.keys.messages,
        prompt_key=request.keys.prompt,
        response_key=request.keys.response,
    )
    return make_plan(request, job, info, vocabulary.dtype, "lines")


@dataclass(frozen=True)
class ChatJob(Job):
    """Encode conversations and pack them.

    Attributes:
        template: jinja source of the chat template.
        sequence_length: tokens of a sample.
        messages_key: see `MessageKeys`.
        prompt_key: see `MessageKeys`.
        response_key: see `MessageKeys`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("ids", "lengths", "roles")
    advice: ClassVar[str] = "check the keys, --sequence-length and the input"

    template: str = ""
    sequence_length: int = 0
    messages_key: str = "messages"
    prompt_key: str = "prompt"
    response_key: str = "response"

    def write(
        self, piece: Sequence[Unit], files: Sequence[Sequence[IO[bytes]]], summary: PieceSummary
    ) -> None:
        """Write the conversations of one piece that fit into a sample; see `Job.write`."""
        encoder = _load_encoder(self)
        for source in self.source_documents(piece, summary):
            try:
                ids, roles = self._encode(source.text, encoder)
            except ConversationError as error:
                self.record_problem(source, str(error), summary)
                continue
            if len(ids) > self.sequence_length:
                problem = f"{len(ids)} tokens, more than --sequence-length {self.sequence_length}"
                self.record_problem(source, problem, summary)
                summary.too_long += 1
                continue
            split = source.split
            _write_arrays(files[split], ids, roles)
            summary.documents[split] += 1
            summary.text_bytes[split] += len(source.text)
            summary.tokens[split] += len(ids)
            summary.max_id[split] = max(summary.max_id[split], int(ids.max()))

    def publish(self, output: SplitOutput) -> dict[str, Any]:
        """Pack one split; see `Job.publish`."""
        paths = [
            output.folder / f"packed.{output.split}.{kind}.partial-{os.getpid()}"
            for kind in self.kinds
        ]
        num_samples = loss_tokens = 0
        max_id = -1
        with ExitStack() as stack:
            for path in paths:
                stack.callback(path.unlink, missing_ok=True)
            files = [stack.enter_context(open(path, "wb")) for path in paths]
            for sample in self._pack(output):
                _write_arrays(files, sample.ids, sample.roles)
                num_samples += 1
                loss_tokens += int((sample.roles & COUNTS_FOR_LOSS).sum())
                max_id = max(max_id, int(sample.ids.max()))
            for stream in files:
                stream.flush()
            description = output.description | {
                "packed_length": self.sequence_length,
                "conversations": sum(
                    summary.documents[output.split] for summary in output.summaries
                ),
                "loss_tokens": loss_tokens,
                "tokens": num_samples * self.sequence_length,
                "documents": num_samples,
                "max_id": max_id,
            }
            ids, lengths, roles = paths
            publish(output.prefix, output.dtype, [ids], [lengths], description, roles=[roles])
            return description

    def _encode(self, line: str, encoder: ConversationEncoder) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and roles of one line; ConversationError if it cannot be used."""
        keys = MessageKeys(self.messages_key, self.prompt_key, self.response_key)
        try:
            record = json_parser()(line.encode("utf-8"))
            if not isinstance(record, dict):
                raise ConversationError("no JSON object")
            return encoder.encode(parse_messages(record, keys))
        except ConversationError:
            raise
        except (ValueError, RecursionError) as error:
            problem = " ".join(str(error).split()) or "not JSON"
            raise ConversationError(f"not JSON: {problem}") from error

    def _pack(self, output: SplitOutput) -> Iterator[PackedSample]:
        packer = Packer(self.sequence_length, output.description["end_of_document"], output.dtype)
        for number in range(len(output.summaries)):
            for ids, roles in _read_conversations(output, number):
                sample = packer.add(ids, roles)
                if sample is not None:
                    yield sample
        yield from packer.finish()


@lru_cache(maxsize=1)
def _load_encoder(job: ChatJob) -> ConversationEncoder:
    vocabulary, _ = job.load_vocabulary()
    return ConversationEncoder(vocabulary, ChatTemplate(job.template, vocabulary))


def _write_arrays(files: Sequence[IO[bytes]], ids: np.ndarray, roles: np.ndarray) -> None:
    for stream, array in zip(files, (ids, np.array([len(ids)], "<i4"), roles), strict=True):
        stream.write(array.tobytes())


def _read_conversations(
    output: SplitOutput, number: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the ids and roles of each conversation of one piece."""
    dtypes = {"ids": output.dtype, "lengths": np.dtype("<i4"), "roles": np.dtype(np.uint8)}
    ids, lengths, roles = (
        np.fromfile(piece_path(output.folder, number, f"{output.split}.{kind}"), dtype)
        for kind, dtype in dtypes.items()
    )
    if len(lengths):
        ends = np.cumsum(lengths, dtype=np.int64)[:-1]
        yield from zip(np.split(ids, ends), np.split(roles, ends), strict=True)

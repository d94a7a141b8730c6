"""Turn conversations into packed Megatron token files whose loss counts on the assistant's words only.

    python tools/preprocess_instructions.py --input chats.jsonl --tokenizer tokenizer/ --sequence-length 2048 --output data/chats
    python tools/preprocess_instructions.py --input gsm8k.jsonl --prompt-key question --response-key answer --template plain.jinja \\
        --tokenizer tokenizer.model --sequence-length 512 --output data/maths --holdout maths_valid=0.02

A line is {"messages": [{"role": ..., "content": ...}, ...]} or has a prompt and a response. Whole conversations are packed into
samples of the given length, which must be the run's batch.sequence_length; PREFIX.roles says for each token whether its loss counts
and where conversations begin. Train with data.document_attention = "within", alone or beside plain text (data.train_weights). A pass
over n samples reads n - 1 of them: the last one lacks the token after it.

Exit codes: 0 done, 2 bad input, 5 no space left, 1 another failure.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_kd.config import ConfigError
from megatron_kd.config.durable import sync_path
from megatron_kd.data.conversations import BadConversation, ChatTemplate, ConversationEncoder, Packed, Packer, messages_of
from megatron_kd.data.documents import TextFile, fast_loads, find_text_files, open_file
from megatron_kd.data.indexed import COUNTS_FOR_LOSS, TokenFileWriter
from megatron_kd.data.pieces import choose_split
from megatron_kd.data.tokenizer import TokenizerInfo, load_tokenizer

_LISTED = 20


def parse_holdout(text: str) -> tuple[str, float]:
    name, _, fraction = text.partition("=")
    try:
        value = float(fraction)
    except ValueError:
        value = 0.0
    if not name or os.sep in name or not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FRACTION with a fraction in (0, 1), such as valid=0.05")
    return name, value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=".jsonl files, also compressed, folders or quoted globs")
    add("--pattern", nargs="+", default=["*.jsonl*"], metavar="GLOB", help="names of the files to take from folders (*.jsonl*)")
    add("--messages-key", default="messages", metavar="KEY", help="key of the list of messages (messages)")
    add("--prompt-key", default="prompt", metavar="KEY", help="key of the prompt, in lines without messages (prompt)")
    add("--response-key", default="response", metavar="KEY", help="key of the response (response)")
    add("--template", type=Path, metavar="FILE", help="jinja chat template (the tokenizer's own)")
    add("--tokenizer", required=True, metavar="PATH", help="SentencePiece .model, tokenizer.json or its folder, or .tiktoken")
    add("--tiktoken-pattern", metavar="NAME|REGEX", help="see preprocess_data.py")
    add("--end-of-document", metavar="TOKEN", help="token that ends documents and fills samples up (the tokenizer's own)")
    add("--sequence-length", type=int, required=True, metavar="N", help="tokens of a sample: the run's batch.sequence_length")
    add("--output", required=True, type=Path, metavar="PREFIX", help="path of the output without .bin/.idx/.roles/.json")
    add("--holdout", action="append", default=[], type=parse_holdout, metavar="NAME=FRACTION",
        help="put this share of the conversations into NAME beside the output instead; may be given several times")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first line that cannot be used, in place of counting it")
    parsed = parser.parse_args(arguments)
    names = [parsed.output.name, *(name for name, _ in parsed.holdout)]
    if not parsed.output.name or len(set(names)) < len(names) or sum(fraction for _, fraction in parsed.holdout) >= 1:
        parser.error("--output needs a name, --holdout others, and the fractions of --holdout must sum to less than 1")
    if parsed.sequence_length < 2:
        parser.error("--sequence-length must be at least 2")
    return parsed


class Reading:
    """Reads conversations and keeps count of what was left out, by file and line."""

    def __init__(self, arguments: argparse.Namespace, encoder: ConversationEncoder) -> None:
        self.arguments, self.encoder = arguments, encoder
        self.problems: list[str] = []
        self.unreadable = self.too_long = self.lines = 0

    def conversations(self, files: Sequence[TextFile]) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        """(name, (ids, roles)) of each conversation that fits into a sample. ConfigError, strict, for the first that cannot be used."""
        loads = fast_loads()
        bar = tqdm(total=sum(file.size for file in files), unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        for file in files:
            with open_file(file.path) as stream:
                for number, data in enumerate(stream, start=1):
                    self.lines += 1
                    found = None if data.isspace() else self._conversation(f"{file.path}:{number}", data, loads)
                    if found is not None:
                        yield f"{file.key}:{number}", found
            bar.update(file.size)
        bar.close()

    def _conversation(self, where: str, data: bytes, loads: Callable[[bytes], Any]) -> tuple[np.ndarray, np.ndarray] | None:
        own = self.arguments
        try:
            row = loads(data)
            if not isinstance(row, dict):
                raise BadConversation("no JSON object")
            messages = messages_of(row, messages_key=own.messages_key, prompt_key=own.prompt_key, response_key=own.response_key)
            ids, roles = self.encoder.encode(messages)
        except ValueError as error:
            self._leave_out(where, " ".join(str(error).split()) or "not JSON")
            self.unreadable += 1
            return None
        if len(ids) > own.sequence_length:
            self._leave_out(where, f"{len(ids)} tokens, more than --sequence-length {own.sequence_length}")
            self.too_long += 1
            return None
        return ids, roles

    def _leave_out(self, where: str, reason: str) -> None:
        if self.arguments.strict:
            raise ConfigError(f"{where} cannot be used ({reason}): repair it, or leave out --strict")
        if len(self.problems) < _LISTED:
            self.problems.append(f"{where}: {reason}")


class Output:
    """One split under construction: token file and roles, published together."""

    def __init__(self, prefix: Path, info: TokenizerInfo, dtype: np.dtype, stack: ExitStack) -> None:
        self.prefix, self.info = prefix, info
        self.writer = stack.enter_context(TokenFileWriter(prefix, dtype))
        self._temporary = prefix.with_name(f".{prefix.name}.roles.partial-{os.getpid()}")
        stack.callback(lambda: self._temporary.unlink(missing_ok=True))
        self._roles = stack.enter_context(open(self._temporary, "wb"))
        self.conversations = self.counted = 0

    def add(self, packed: Packed) -> None:
        self.writer.add(packed.ids, np.array([len(packed.ids)]))
        self._roles.write(packed.roles.tobytes())
        self.conversations += packed.conversations
        self.counted += int((packed.roles & COUNTS_FOR_LOSS).sum())

    def commit(self, length: int) -> dict[str, Any]:
        """Publish. The old index goes first: without it nothing can be paired wrongly."""
        self._roles.flush()
        os.fsync(self._roles.fileno())
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(self._temporary, f"{self.prefix}.roles")
        sync_path(self.prefix.parent)
        return self.writer.commit(
            tokenizer_digest=self.info.digest, vocab_size=self.info.vocab_size, end_of_document=self.info.end_of_document,
            packed_length=length, conversations=self.conversations, loss_tokens=self.counted,
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    vocabulary, info = load_tokenizer(arguments.tokenizer, end_of_document=arguments.end_of_document, pattern=arguments.tiktoken_pattern)
    if info.end_of_document is None:
        raise ConfigError(f"the tokenizer {arguments.tokenizer} names no token that ends documents: name one with --end-of-document")
    source = arguments.template.read_text(encoding="utf-8") if arguments.template else vocabulary.chat_template
    if not source:
        raise ConfigError(
            f"the tokenizer {arguments.tokenizer} has no chat template: name one with --template, such as examples/instructions/plain.jinja"
        )
    files = find_text_files(arguments.input, arguments.pattern)
    reading = Reading(arguments, ConversationEncoder(vocabulary, ChatTemplate(source, vocabulary)))
    splits = ((arguments.output.name, 0.0), *arguments.holdout)
    length, end = arguments.sequence_length, info.end_of_document
    with ExitStack() as stack:
        outputs = [Output(arguments.output.with_name(name), info, vocabulary.dtype, stack) for name, _ in splits]
        packers = [Packer(length, end, vocabulary.dtype) for _ in splits]
        for name, (ids, roles) in reading.conversations(files):
            split = choose_split(name, splits)
            packed = packers[split].add(ids, roles)
            if packed is not None:
                outputs[split].add(packed)
        for output, packer in zip(outputs, packers, strict=True):
            for packed in packer.finish():
                output.add(packed)
            if output.writer.num_documents < 2:
                raise ConfigError(
                    f"{output.prefix} would hold {output.writer.num_documents} samples of {length} tokens, and a run needs 2: give more "
                    "conversations, a shorter --sequence-length or another --holdout fraction"
                    + (f" (left out: {reading.problems[0]})" if reading.problems else "")
                )
        written = {str(output.prefix): output.commit(length) for output in outputs}
    return {"outputs": written, "lines": reading.lines, "unreadable": reading.unreadable, "too_long": reading.too_long,
            "left_out": reading.problems}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        summary = run(parse_arguments(arguments))
    except ConfigError as error:
        print(f"preprocess_instructions: {error}", file=sys.stderr)
        return 2
    except (OSError, UnicodeDecodeError) as error:
        print(f"preprocess_instructions: {error}", file=sys.stderr)
        return 5 if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 1
    print(json.dumps(summary, indent=2))
    if summary["left_out"]:
        count = summary["unreadable"] + summary["too_long"]
        print(f"preprocess_instructions: {count} conversations were left out, such as {summary['left_out'][0]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

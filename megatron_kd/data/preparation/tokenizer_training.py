"""Train a SentencePiece tokenizer on a sample of text files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import find_text_files
from megatron_kd.data.preparation.formats.document_format import TextFile
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.storage.atomic_files import write_atomically

_CHUNK_BYTES = 1 << 18
_BLOCK_CHARACTERS = 4096


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """State what to train a tokenizer on.

    Attributes:
        inputs: text files, .jsonl files, or folders of them.
        patterns: names of the files to take from folders.
        exclude: names of files and subfolders to leave out.
        output: the .model file.
        vocab_size: number of ids, 256 bytes and 3 special ones included.
        model_type: "bpe" or "unigram".
        max_bytes: text to train on, at most.
        text_key: key of the text in .jsonl lines.
        verbose: show SentencePiece's messages.
    """

    inputs: Sequence[str]
    patterns: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    output: Path
    vocab_size: int
    model_type: str = "bpe"
    max_bytes: float = 6e6
    text_key: str = "text"
    verbose: bool = False


def train_tokenizer(request: TrainingRequest) -> dict[str, Any]:
    """Train a tokenizer, write it, and return a summary.

    Raises:
        ConfigError: no input is UTF-8 text, the output is a folder, or SentencePiece refuses.
        OSError: the output cannot be written.
    """
    files = find_text_files(request.inputs, request.patterns, request.exclude)
    chunks = _sample_chunks(files, request.max_bytes)
    contents = [_read_chunk(file, start, request.text_key) for file, start in chunks]
    texts = [text for text in contents if text]
    if not texts:
        raise ConfigError(
            f"none of the {len(files)} files held UTF-8 text: "
            "change --input, --pattern or --text-key"
        )
    if request.output.is_dir():
        raise ConfigError(f"--output {request.output} is a folder: give the name of a .model file")
    model = _train(texts, request)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(request.output, model)
    _, info = load_tokenizer(request.output)
    return {
        "output": str(request.output),
        "vocab_size": info.vocab_size,
        "end_of_document": info.end_of_document,
        "digest": info.digest,
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 3),
        "unreadable_pieces": sum(text is None for text in contents),
    }


def _sample_chunks(files: Sequence[TextFile], max_bytes: float) -> list[tuple[TextFile, int]]:
    """Return (file, first byte) of the chunks to read, in the order of a hash of their names."""
    chunks = [(file, start) for file in files for start in range(0, file.size, _CHUNK_BYTES)]
    chunks.sort(key=_hash)
    sample, total = [], 0.0
    for file, start in chunks:
        if total >= max_bytes:
            break
        sample.append((file, start))
        total += min(_CHUNK_BYTES, file.size - start)
    return sample


def _hash(chunk: tuple[TextFile, int]) -> bytes:
    file, start = chunk
    return hashlib.sha256(f"{file.key}:{start}".encode("utf-8", "surrogateescape")).digest()


def _read_chunk(file: TextFile, start: int, text_key: str) -> str | None:
    """Return the whole lines of one chunk.

    None if it is not UTF-8 text, or not JSON lines in a .jsonl file.
    """
    try:
        with open(file.path, "rb") as stream:
            stream.seek(start)
            data = stream.read(_CHUNK_BYTES)
    except OSError:
        return None
    if start:
        data = data[data.find(b"\n") + 1 :]
    if start + _CHUNK_BYTES < file.size:
        data = data[: data.rfind(b"\n") + 1 or len(data)]
    try:
        text = data.decode("utf-8")
        if file.path.suffix == ".jsonl":
            text = "\n".join(json.loads(line)[text_key] for line in text.split("\n") if line)
            # JSON can hold half of a surrogate pair, which is no text.
            text.encode("utf-8")
        return text
    except (UnicodeDecodeError, ValueError, KeyError, TypeError):
        return None


def _blocks(text: str) -> Iterator[str]:
    """Yield blocks of several lines, from which SentencePiece can learn tokens with newlines."""
    block = ""
    for line in text.splitlines(keepends=True):
        if len(block) + len(line) > _BLOCK_CHARACTERS and block:
            yield block
            block = ""
        block += line
        while len(block) > _BLOCK_CHARACTERS:
            yield block[:_BLOCK_CHARACTERS]
            block = block[_BLOCK_CHARACTERS:]
    if block:
        yield block


def _train(texts: Sequence[str], request: TrainingRequest) -> bytes:
    """Return the serialised model.

    Raises:
        ConfigError: SentencePiece refuses, mostly because the vocabulary size does not suit the
            text.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(block for text in texts for block in _blocks(text)),
            model_writer=model,
            vocab_size=request.vocab_size,
            model_type=request.model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _BLOCK_CHARACTERS,
            # The sums of unigram training depend on how the text is distributed over threads.
            num_threads=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=0 if request.verbose else 2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ConfigError(
            f"SentencePiece cannot train --vocab-size {request.vocab_size} on this text: {reason}"
        ) from error
    return model.getvalue()

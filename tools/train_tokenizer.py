"""Train a SentencePiece tokenizer on text files.

    python tools/train_tokenizer.py --input corpus/ --pattern '*.py' --vocab-size 2000 --output tokenizer.model

The model keeps text as it is: no normalisation, no added or removed spaces, newlines and tabs as tokens, and bytes for
characters outside the vocabulary, so that decoding gives back what was encoded. The one exception is the character U+2581,
which SentencePiece uses for a space.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import TextFile, find_text_files
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.storage.atomic_files import write_atomically

_CHUNK = 1 << 18
_BLOCK_CHARACTERS = 4096


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece tokenizer (<unk>=0, <s>=1, </s>=2) on text files. The same input gives the same model."
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files, .jsonl files with a text key, or folders of them",
    )
    add(
        "--pattern",
        nargs="+",
        default=["*"],
        metavar="GLOB",
        help="names of the files to take from folders (all)",
    )
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="names of files and subfolders to leave out",
    )
    add("--output", required=True, type=Path, metavar="FILE", help="where the .model file goes")
    add(
        "--vocab-size",
        type=int,
        required=True,
        help="number of ids, 256 bytes and 3 special ones included",
    )
    add(
        "--model-type",
        choices=("bpe", "unigram"),
        default="bpe",
        help="bpe (default) trains about ten times faster",
    )
    add(
        "--max-megabytes",
        type=float,
        default=6.0,
        help="text to train on at most (%(default)s); pieces of 0.25 MB are picked from all over the input",
    )
    add("--text-key", default="text", help="key of the text in .jsonl lines (text)")
    add("--verbose", action="store_true", help="show SentencePiece's own messages")
    return parser.parse_args(arguments)


def sample_chunks(files: Sequence[TextFile], max_bytes: float) -> list[tuple[TextFile, int]]:
    """(file, first byte) of the pieces to read: in the order of a hash of their names, until `max_bytes` are together."""
    chunks = [(file, start) for file in files for start in range(0, file.size, _CHUNK)]
    chunks.sort(
        key=lambda chunk: hashlib.sha256(
            f"{chunk[0].key}:{chunk[1]}".encode("utf-8", "surrogateescape")
        ).digest()
    )
    picked, total = [], 0.0
    for file, start in chunks:
        if total >= max_bytes:
            break
        picked.append((file, start))
        total += min(_CHUNK, file.size - start)
    return picked


def read_chunk(file: TextFile, start: int, text_key: str) -> str | None:
    """The whole lines of one piece of a file; None where it is not UTF-8 text, or not JSON lines in a .jsonl file."""
    try:
        with open(file.path, "rb") as stream:
            stream.seek(start)
            data = stream.read(_CHUNK)
    except OSError:
        return None
    if start:
        data = data[data.find(b"\n") + 1 :]
    if start + _CHUNK < file.size:
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


def blocks(text: str) -> Iterator[str]:
    """Pieces of several lines: SentencePiece then learns tokens with newlines in them, which single lines would hide."""
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


def train(texts: Sequence[str], arguments: argparse.Namespace) -> bytes:
    """The serialised model.

    Raises:
        ConfigError: SentencePiece refused, mostly because the vocabulary size does not suit the text.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(block for text in texts for block in blocks(text)),
            model_writer=model,
            vocab_size=arguments.vocab_size,
            model_type=arguments.model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _BLOCK_CHARACTERS,
            # The sums of unigram training depend on how the text is dealt out to threads.
            num_threads=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=0 if arguments.verbose else 2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ConfigError(
            f"SentencePiece cannot train --vocab-size {arguments.vocab_size} on this text: {reason}"
        ) from error
    return model.getvalue()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    started = time.monotonic()
    files = find_text_files(arguments.input, arguments.pattern, arguments.exclude)
    chunks = sample_chunks(files, arguments.max_megabytes * 1e6)
    read = [read_chunk(file, start, arguments.text_key) for file, start in chunks]
    texts = [text for text in read if text]
    if not texts:
        raise ConfigError(
            f"none of the {len(files)} files held UTF-8 text: change --input, --pattern or --text-key"
        )
    if arguments.output.is_dir():
        raise ConfigError(
            f"--output {arguments.output} is a folder: give the name of a .model file"
        )
    model = train(texts, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, model)
    _, info = load_tokenizer(arguments.output)
    return {
        "output": str(arguments.output),
        "vocab_size": info.vocab_size,
        "end_of_document": info.end_of_document,
        "digest": info.digest,
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 3),
        "unreadable_pieces": sum(text is None for text in read),
        "seconds": round(time.monotonic() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        summary = run(parse_arguments(arguments))
    except (ConfigError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Text and its tokenizer: the text files under a path, and a SentencePiece model with the identity of its vocabulary.

A tokenizer is identified by a digest of the vocabulary itself, not of its file: a teacher, a student and a data set
agree when every id means the same, however the model was serialised, and disagree when only the sizes are equal.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_kd.config.run import ConfigError


@dataclass(frozen=True)
class TokenizerInfo:
    """What a run needs to know of its tokenizer.

    Attributes:
        digest: sha256, hex, of every piece, score and type in id order and of the special ids.
        vocab_size: true number of ids.
        end_of_document: id written after each document (the model's eos).
    """

    digest: str
    vocab_size: int
    end_of_document: int


@dataclass(frozen=True)
class TextFile:
    """One text file; `key` is its path relative to the input it was found under, with forward slashes."""

    key: str
    path: Path
    size: int


def load_tokenizer(path: str | Path) -> tuple[SentencePieceProcessor, TokenizerInfo]:
    """Load a SentencePiece model and take its identity.

    Raises:
        ConfigError: the file cannot be read, is not a SentencePiece model, or has no end-of-sentence id.
    """
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer {path} ({error.strerror}): give the path of a SentencePiece .model file") from error
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ConfigError(f"{path} is not a SentencePiece model ({len(model)} bytes): give a complete .model file") from error
    if processor.eos_id() < 0:
        raise ConfigError(
            f"the tokenizer {path} has no end-of-sentence id to end documents with: train it with one (tools/train_tokenizer.py does)"
        )
    return processor, TokenizerInfo(vocabulary_digest(processor), processor.get_piece_size(), processor.eos_id())


def vocabulary_digest(processor: SentencePieceProcessor) -> str:
    """sha256 (hex) of the vocabulary: size and special ids, then length, score, type and text of each piece in id order."""
    size = processor.get_piece_size()
    ids = list(range(size))
    kinds = zip(processor.is_unknown(ids), processor.is_control(ids), processor.is_unused(ids), processor.is_byte(ids), strict=True)
    specials = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    digest = hashlib.sha256(struct.pack("<5q", size, *specials))
    for piece, score, flags in zip(processor.id_to_piece(ids), processor.get_score(ids), kinds, strict=True):
        text = piece.encode("utf-8")
        digest.update(struct.pack("<If4?", len(text), score, *flags) + text)
    return digest.hexdigest()


def find_text_files(inputs: Sequence[str | Path], patterns: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[TextFile]:
    """The files among `inputs` (files, or folders searched to the bottom), each once, in an order that depends only on their names.

    Args:
        inputs: files are taken as they are; `patterns` and `exclude` apply inside folders.
        patterns: a file is taken when its name matches one of them.
        exclude: a file is left out when its name, or that of a folder on its relative path, matches one of them.

    Raises:
        ConfigError: an input does not exist, or nothing was found.
    """
    found: dict[str, TextFile] = {}
    for item in map(Path, inputs):
        if not item.exists():
            raise ConfigError(f"the input {item} does not exist: give files or folders of text")
        relative = [Path(item.name)] if item.is_file() else sorted(_walk(item, patterns, exclude), key=Path.as_posix)
        root = item.parent if item.is_file() else item
        for name in relative:
            path = root / name
            found.setdefault(os.path.realpath(path), TextFile(name.as_posix(), path, path.stat().st_size))
    if not found:
        raise ConfigError(f"no file matches {' '.join(patterns)} in {', '.join(map(str, inputs))}: change the input or the pattern")
    return list(found.values())


def _walk(root: Path, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    """Relative paths of the matching regular files under `root`; links to folders are not followed."""

    def left_out(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in exclude)

    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not left_out(name)]
        for name in names:
            path = Path(folder, name)
            if any(fnmatch(name, pattern) for pattern in patterns) and not left_out(name) and path.is_file():
                yield path.relative_to(root)

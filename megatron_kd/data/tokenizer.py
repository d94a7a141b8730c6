"""Load tokenizers and identify them.

A tokenizer is identified by a digest of its vocabulary, not of its file. A teacher, a student and a
data set agree if every id stands for the same bytes, however the tokenizer is stored. They disagree
if only the sizes are equal.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.data import vocabularies
from megatron_kd.data.discovery import implementations
from megatron_kd.data.vocabularies.vocabulary import TokenizerFileError, Vocabulary

KINDS: list[type[Vocabulary]] = implementations(vocabularies, Vocabulary)


@dataclass(frozen=True)
class TokenizerInfo:
    """Hold what a run needs to know about its tokenizer.

    Attributes:
        digest: sha256, hex, of the bytes that each id stands for, in id order, of the special ids,
            and of end_of_document.
        vocab_size: true number of ids.
        end_of_document: id written after each document; None if the tokenizer names none.
    """

    digest: str
    vocab_size: int
    end_of_document: int | None


def load_tokenizer(
    path: str | Path, *, end_of_document: str | None = None, pattern: str | None = None
) -> tuple[Vocabulary, TokenizerInfo]:
    """Load a tokenizer of any kind and compute its identity.

    Args:
        path: a SentencePiece model, a tokenizer.json, a .tiktoken file, or a folder with one of
            them. The content of the file decides its kind.
        end_of_document: text of the token that ends documents; None takes the tokenizer's own.
        pattern: how a .tiktoken vocabulary splits text, see `TiktokenVocabulary`; refused for other
            kinds, whose files define it.

    Returns:
        The vocabulary and its identity.

    Raises:
        ConfigError: the file cannot be read, is no tokenizer, or lacks the named token.
    """
    file = tokenizer_file(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the tokenizer {path} ({error.strerror}): give the path of {_kinds()}"
        ) from error
    vocabulary = _read_vocabulary(file, content, pattern)
    if pattern is not None and not vocabulary.takes_pattern:
        raise ConfigError(f"{file} says itself how it cuts text: leave the tiktoken pattern out")
    if end_of_document is not None:
        vocabulary.end_of_document = vocabulary.id_of(end_of_document)
    return vocabulary, TokenizerInfo(
        vocabulary_digest(vocabulary), len(vocabulary.tokens), vocabulary.end_of_document
    )


def tokenizer_file(path: str | Path) -> Path:
    """Return the file at `path`, or the one that holds the tokenizer in the folder `path`.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    # The most specific name of every kind comes before the further names of any.
    ranks = zip_longest(*(kind.file_names for kind in KINDS))
    patterns = [pattern for rank in ranks for pattern in rank if pattern is not None]
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
    raise ConfigError(
        f"the folder {path} holds no tokenizer (looked for {', '.join(patterns)}): "
        f"give the path of {_kinds()}"
    )


def _kinds() -> str:
    *others, last = (kind.description for kind in KINDS)
    return f"{', '.join(others)}, or {last}"


def _read_vocabulary(file: Path, content: bytes, pattern: str | None) -> Vocabulary:
    problem = (
        f"{file} is no tokenizer ({len(content)} bytes): give a complete file, such as {_kinds()}"
    )
    for kind in KINDS:
        try:
            vocabulary = kind.read(file, content, pattern)
        except TokenizerFileError as error:
            raise ConfigError(f"{problem} ({error})") from error
        if vocabulary is not None:
            return vocabulary
    raise ConfigError(problem)


def vocabulary_digest(vocabulary: Vocabulary) -> str:
    """Return the sha256 (hex) of a vocabulary.

    It covers the size, the end of document, and for each id the length of its text, whether it is
    special, and its bytes.
    """
    end = -1 if vocabulary.end_of_document is None else vocabulary.end_of_document
    digest = hashlib.sha256(
        b"megatron_kd vocabulary 1" + struct.pack("<2q", len(vocabulary.tokens), end)
    )
    special = vocabulary.special
    for index, token in enumerate(vocabulary.tokens):
        digest.update(struct.pack("<I?", len(token), index in special) + token)
    return digest.hexdigest()


def encoding_digest(path: str | Path, vocabulary: Vocabulary) -> str:
    """Return the sha256 (hex) of everything that decides which ids a text gets.

    This covers the bytes of the file and the version of the library that reads it. Unlike the
    vocabulary's digest it does not identify the ids; it tells whether unfinished work may continue.
    """
    settings: dict[str, Any] = {
        "library": vocabulary.library,
        "version": version(vocabulary.library),
        "pattern": vocabulary.pattern,
        "end_of_document": vocabulary.end_of_document,
    }
    content = tokenizer_file(path).read_bytes()
    return hashlib.sha256(content + json.dumps(settings).encode()).hexdigest()

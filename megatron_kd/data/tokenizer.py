"""Tokenizers and what identifies them.

A tokenizer is identified by a digest of the vocabulary itself, not of its file: a teacher, a student and a data set agree when
every id stands for the same bytes, however the tokenizer was written down, and disagree when only the sizes are equal.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.data.vocabularies import (
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    TiktokenVocabulary,
    Vocabulary,
    parse_ranks,
    read_settings,
)

_KINDS = "a SentencePiece .model file, a tokenizer.json (or a folder with one), or a .tiktoken file"
_FILES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "*.model")


@dataclass(frozen=True)
class TokenizerInfo:
    """What a run needs to know of its tokenizer.

    Attributes:
        digest: sha256, hex, of the bytes that each id stands for, in id order, of the special ids, and of end_of_document.
        vocab_size: true number of ids.
        end_of_document: id written after each document; None where the tokenizer names none.
    """

    digest: str
    vocab_size: int
    end_of_document: int | None


def load_tokenizer(
    path: str | Path, *, end_of_document: str | None = None, pattern: str | None = None
) -> tuple[Vocabulary, TokenizerInfo]:
    """Load a tokenizer of any kind and take its identity.

    Args:
        path: a SentencePiece model, a tokenizer.json, a .tiktoken file, or a folder with one of them. The content decides.
        end_of_document: text of the token that ends documents; None: the tokenizer's own.
        pattern: of a .tiktoken file, see `TiktokenVocabulary`; refused for other kinds, which know theirs.

    Raises:
        ConfigError: the file cannot be read, is no tokenizer, or lacks the named token.
    """
    file = tokenizer_file(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the tokenizer {path} ({error.strerror}): give the path of {_KINDS}"
        ) from error
    vocabulary = _vocabulary(file, content, pattern)
    if pattern is not None and vocabulary.kind != "tiktoken":
        raise ConfigError(f"{file} says itself how it cuts text: leave the tiktoken pattern out")
    if end_of_document is not None:
        vocabulary.end_of_document = vocabulary.id_of(end_of_document)
    return vocabulary, TokenizerInfo(
        vocabulary_digest(vocabulary), len(vocabulary.tokens), vocabulary.end_of_document
    )


def tokenizer_file(path: str | Path) -> Path:
    """The file at `path`, or the one that holds the tokenizer in the folder `path`."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    for pattern in _FILES:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise ConfigError(
        f"the folder {path} holds no tokenizer (looked for {', '.join(_FILES)}): give the path of {_KINDS}"
    )


def _vocabulary(file: Path, content: bytes, pattern: str | None) -> Vocabulary:
    wrong = f"{file} is no tokenizer ({len(content)} bytes): give a complete file, {_KINDS}"
    if content.lstrip()[:1] == b"{":
        try:
            is_tokenizer = "model" in json.loads(content)
        except ValueError as error:
            raise ConfigError(wrong) from error
        if not is_tokenizer:
            raise ConfigError(wrong)
        settings = read_settings(file.parent)
        try:
            return HuggingFaceVocabulary(content, settings)
        except ConfigError:
            raise
        except Exception as error:  # the library raises plain Exceptions
            raise ConfigError(f"{wrong} ({error})") from error
    ranks = parse_ranks(content)
    if ranks is not None:
        return TiktokenVocabulary(ranks, pattern)
    try:
        return SentencePieceVocabulary(content)
    except RuntimeError as error:
        raise ConfigError(wrong) from error


def vocabulary_digest(vocabulary: Vocabulary) -> str:
    """sha256 (hex) of a vocabulary: size, end of document, then length, special or not, and bytes of each id."""
    end = -1 if vocabulary.end_of_document is None else vocabulary.end_of_document
    digest = hashlib.sha256(
        b"megatron_kd vocabulary 1" + struct.pack("<2q", len(vocabulary.tokens), end)
    )
    special = vocabulary.special
    for index, token in enumerate(vocabulary.tokens):
        digest.update(struct.pack("<I?", len(token), index in special) + token)
    return digest.hexdigest()


def encoding_digest(path: str | Path, vocabulary: Vocabulary) -> str:
    """sha256 (hex) of all that decides which ids a text gets: the file, byte by byte, and the versions of what reads it.

    Unlike the vocabulary's digest it is no identity of the ids: it tells whether unfinished work may go on.
    """
    from importlib.metadata import version

    library = {
        "sentencepiece": "sentencepiece",
        "huggingface": "tokenizers",
        "tiktoken": "tiktoken",
    }[vocabulary.kind]
    about: dict[str, Any] = {
        "library": library,
        "version": version(library),
        "pattern": vocabulary.pattern,
    }
    about["end_of_document"] = vocabulary.end_of_document
    return hashlib.sha256(
        tokenizer_file(path).read_bytes() + json.dumps(about).encode()
    ).hexdigest()

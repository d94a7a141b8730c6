"""Define the interface of a tokenizer kind.

The ids of a text are those of the kind's own library (sentencepiece, tokenizers, tiktoken). A
vocabulary only adapts that library and states the properties that allow faster encoding.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.token_files import optimal_dtype


class EncodingError(ValueError):
    """Report a text for which the tokenizer's library finds no ids, with the reason."""


class TokenizerFileError(ValueError):
    """Report a file that is of this kind and cannot be loaded, with the reason."""


@dataclass
class Vocabulary:
    """Encode and decode text with one tokenizer; the base class of all kinds.

    Attributes:
        library: distribution that reads files of this kind. Its version belongs to the encoding.
        description: such a file in a few words, for messages.
        file_names: globs of such a file's name inside a folder, the most specific first.
        takes_pattern: whether `pattern` of `load_tokenizer` applies to this kind.
        tokens: bytes of text that each id stands for, in id order; b"" for an unused id.
        special: ids that never result from merging text.
        end_of_document: id written after each document, None if the tokenizer names none.
        splits_at_spaces: the ids of a document are those of its parts, cut before every space that
            does not follow whitespace.
        adds_leading_space: a document is encoded as if a space preceded it.
        space_alias: another character that stands for a space; "" if there is none.
        caches_words: encoding a word is so much slower than a lookup that a cache of words pays.
        splits_locally: how text is split does not depend on text thousands of characters away.
        pattern: regular expression, or its name, that splits text before merging (tiktoken).
        chat_template: jinja source of the tokenizer's own chat template, if it has one.
        dtype: integer type of the ids in a token file.
    """

    library: ClassVar[str] = ""
    description: ClassVar[str] = ""
    file_names: ClassVar[tuple[str, ...]] = ()
    takes_pattern: ClassVar[bool] = False

    tokens: list[bytes]
    special: frozenset[int]
    end_of_document: int | None
    splits_at_spaces: bool = False
    adds_leading_space: bool = False
    space_alias: str = ""
    caches_words: bool = False
    splits_locally: bool = True
    pattern: str | None = None
    chat_template: str | None = None
    dtype: np.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = optimal_dtype(len(self.tokens))

    @classmethod
    def read(cls, file: Path, content: bytes, pattern: str | None) -> Vocabulary | None:
        """Return the vocabulary in a file, or None if the file is of another kind.

        Args:
            file: path of the file; kinds with several files find the others beside it.
            content: bytes of the file, which alone decide the kind.
            pattern: see `load_tokenizer`.

        Raises:
            TokenizerFileError: the file is of this kind and its library cannot load it.
            ConfigError: the library is not installed, or the pattern is not valid.
        """
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as bytes of `dtype`, as if the text stood inside a document.

        Raises:
            EncodingError: the library finds no ids for one of the texts.
        """
        raise NotImplementedError

    def encode_document(self, text: str) -> bytes:
        """Return the ids of one complete document as bytes of `dtype`."""
        return self.encode_batch([text])[0]

    def encode(self, text: str) -> list[int]:
        """Return the ids of one complete document."""
        ids: list[int] = np.frombuffer(self.encode_document(text), self.dtype).tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; special ids are written by name."""
        return b"".join(self.tokens[index] for index in ids).decode("utf-8", errors="replace")

    def id_of(self, name: str) -> int:
        """Return the id whose text is `name`, preferring a special id.

        Raises:
            ConfigError: no id has this text.
        """
        data = name.encode("utf-8")
        ids = [index for index, token in enumerate(self.tokens) if token == data]
        if not ids:
            raise ConfigError(f"the tokenizer has no token {name!r}: name one that it has")
        return next((index for index in ids if index in self.special), ids[0])

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()


def import_library(name: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} need the package {name}: pip install 'megatron-kd[preprocess]'"
        ) from error

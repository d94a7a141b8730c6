"""Read .tiktoken files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from megatron_kd.config import ConfigError
from megatron_kd.data.vocabularies.patterns import PATTERNS
from megatron_kd.data.vocabularies.vocabulary import EncodingError, Vocabulary, import_library

_END = "<|endoftext|>"


class TiktokenVocabulary(Vocabulary):
    """Encode text with tiktoken.

    A file has one line `base64 rank` per token. The special token <|endoftext|> takes the id after
    the last rank. The file does not say how text is split before merging. `pattern` is a name in
    PATTERNS or a regular expression; None takes "cl100k" if the vocabulary has numbers of several
    digits, else "qwen".
    """

    library: ClassVar[str] = "tiktoken"
    description: ClassVar[str] = "a .tiktoken file"
    file_names: ClassVar[tuple[str, ...]] = ("*.tiktoken",)
    takes_pattern: ClassVar[bool] = True

    def __init__(self, ranks: dict[bytes, int], pattern: str | None) -> None:
        library = import_library("tiktoken", "tiktoken vocabularies")
        pattern = pattern or ("cl100k" if b"12" in ranks else "qwen")
        expression = PATTERNS.get(pattern, pattern)
        end = max(ranks.values()) + 1
        try:
            self._encoding = library.Encoding(
                "ranks",
                pat_str=expression,
                mergeable_ranks=ranks,
                special_tokens={_END: end},
            )
        except Exception as error:  # the library raises plain Exceptions
            raise ConfigError(
                f"the pattern {pattern!r} cannot be used ({error}): "
                f"give one of {', '.join(PATTERNS)}"
            ) from error
        tokens = [b""] * (end + 1)
        for token, rank in ranks.items():
            tokens[rank] = token
        tokens[end] = _END.encode()
        super().__init__(
            tokens,
            frozenset({end}),
            end,
            splits_at_spaces=expression in PATTERNS.values(),
            pattern=pattern,
        )

    @classmethod
    def read(cls, file: Path, content: bytes, pattern: str | None) -> Vocabulary | None:
        """Return the vocabulary of a file of ranks; see `Vocabulary.read`."""
        ranks = _parse_ranks(content)
        return None if ranks is None else cls(ranks, pattern)

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text; see `Vocabulary.encode_batch`."""
        encode = self._encoding.encode_to_numpy
        try:
            return [
                encode(text, allowed_special="all").astype(self.dtype).tobytes() for text in texts
            ]
        except ValueError as error:  # such as a run of a million spaces, which exhausts its regex
            raise EncodingError(
                f"tiktoken finds no ids for it: {' '.join(str(error).split())}"
            ) from error


def _parse_ranks(content: bytes) -> dict[bytes, int] | None:
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return None
    is_valid = ranks and min(ranks.values()) >= 0 and len(set(ranks.values())) == len(ranks)
    return ranks if is_valid else None

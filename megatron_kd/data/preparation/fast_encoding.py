"""Text to ids, fast: what a tokenizer says of whole documents, put together from what it says of their words.

The tokenizers of language models cut text before they merge, and most of them always cut before a space that follows a character
which is no whitespace. For those a document is the sum of its words, and each word needs to be encoded once. Which tokenizers
these are is decided from their own rules (`Vocabulary.splits_at_spaces`), never guessed; all others encode whole documents. Unigram models
never qualify: they add up scores over a whole document, in single precision, and its beginning decides ties at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

# A whole run, then its last space: one expression for both would try every character of a run without spaces as its beginning.
_RUNS = re.compile(r"\s\s+")
_WORDS_KEPT = 200_000
_LONGEST_KEPT = 64
# Characters of a document that are worked on at one time.
_SLICE = 4_000_000
_WINDOW = 2_000
_TRIES = 64


class Encodes(Protocol):
    """What an encoder needs of a vocabulary (`vocabularies.Vocabulary`)."""

    dtype: np.dtype
    splits_at_spaces: bool
    adds_leading_space: bool
    space_alias: str
    caches_words: bool
    splits_locally: bool

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as bytes of `dtype`, as if it stood inside a document: no space is put in front."""
        ...

    def encode_document(self, text: str) -> bytes:
        """The ids of one complete document."""
        ...


class Encoder:
    """Encodes documents; remembers words. One per process.

    The result is that of `vocabulary.encode_document` on each whole document; memory is bounded by the longest document.
    """

    def __init__(self, vocabulary: Encodes) -> None:
        self.vocabulary = vocabulary
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each document, back to back as bytes of `vocabulary.dtype`."""
        found: list[bytes] = []
        short: list[str] = []
        for text in texts:
            if len(text) <= _SLICE and (
                self._cuts(text)
                if self.vocabulary.caches_words
                else not self.vocabulary.adds_leading_space
            ):
                short.append(self._spaced(text))
                continue
            found += self._encode_batch(short)
            short = []
            found.append(self._encode_alone(text))
        return found + self._encode_batch(short)

    def _cuts(self, text: str) -> bool:
        vocabulary = self.vocabulary
        return vocabulary.splits_at_spaces and not (
            vocabulary.space_alias and vocabulary.space_alias in text
        )

    def _encode_alone(self, text: str) -> bytes:
        """A long document, or one that its vocabulary must see whole."""
        if self._cuts(text):
            return b"".join(self._encode_batch([part])[0] for part in _slices(self._spaced(text)))
        if self.vocabulary.splits_locally and len(text) > _SLICE:
            return self._encode_slowly(text)
        return self.vocabulary.encode_document(text)

    def _encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        if not self.vocabulary.caches_words:
            return self.vocabulary.encode_batch(texts)
        return self._encode_words([_keys(text) for text in texts])

    def _spaced(self, text: str) -> str:
        return " " + text if text and self.vocabulary.adds_leading_space else text

    def _encode_words(self, keys: Sequence[list[str]]) -> list[bytes]:
        known = self._known
        missing = list(set().union(*keys) - known.keys())
        if missing:
            if len(known) + len(missing) > _WORDS_KEPT:
                known.clear()
                missing = list(set().union(*keys))
            literals = [key[1:] if key[0:1] == " " else " " + key for key in missing]
            known.update(zip(missing, self.vocabulary.encode_batch(literals), strict=True))
        encoded = [b"".join(map(known.__getitem__, words)) for words in keys]
        for key in missing:
            if len(key) > _LONGEST_KEPT:
                del known[key]
        return encoded

    def _encode_slowly(self, text: str) -> bytes:
        """A long document of a vocabulary whose rules are not known, in slices that are seen to encode as the whole does."""
        encode = self.vocabulary.encode_document
        parts, start = [], 0
        while len(text) - start > 2 * _SLICE:
            cut = self._checked_cut(text, start + _SLICE)
            if cut is None:
                break
            parts.append(encode(text[start:cut]))
            start = cut
        return b"".join((*parts, encode(text[start:])))

    def _checked_cut(self, text: str, near: int) -> int | None:
        """A place before a space where the text on both sides, taken by itself, encodes as the two together do."""
        encode = self.vocabulary.encode_document
        for _ in range(_TRIES):
            cut = text.find(" ", near)
            if cut < 0:
                return None
            left, right = text[cut - _WINDOW : cut], text[cut : cut + _WINDOW]
            if encode(left) + encode(right) == encode(left + right):
                return cut
            near = cut + 1
        return None


def _keys(text: str) -> list[str]:
    """The pieces of a text, cut before every space that follows no whitespace.

    A piece that is one space and then no other is named by what follows the space; any other by a space and itself.
    """
    if not text:
        return []
    keys: list[str] = []
    start, end = (
        0,
        -1,
    )  # of the piece with a run of whitespace that is being looked at; end -1: there is none
    plain = 0  # everything before this is in `keys`
    for run in _RUNS.finditer(text):
        first = run.start()
        last = text.rfind(" ", first + 1, run.end())
        if last < 0:
            continue  # no space in it that could be cut at
        if end < 0 or first >= end:
            if end >= 0:
                keys.append(" " + text[start:end])
                plain = end
            start = first if text[first] == " " else max(text.rfind(" ", plain, first), plain)
            _plain_keys(text, plain, start, keys)
        end = text.find(" ", last + 1)
        if end < 0:
            end = len(text)
    if end >= 0:
        keys.append(" " + text[start:end])
        plain = end
    _plain_keys(text, plain, len(text), keys)
    return keys


def _plain_keys(text: str, start: int, end: int, keys: list[str]) -> None:
    """The pieces of text[start:end], in which every space is a cut."""
    if start == end:
        return
    words = text[start:end].split(" ")
    if words[0]:
        words[0] = " " + words[0]  # only at the start of a text is there a piece without a space
        keys += words
    else:
        keys += words[1:]


def _slices(text: str) -> Iterator[str]:
    """The text in parts of about _SLICE characters, cut before a space that follows no whitespace."""
    start = 0
    while len(text) - start > _SLICE:
        cut = text.find(" ", start + _SLICE)
        while cut >= 0 and text[cut - 1].isspace():
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]

"""Encode documents fast by caching the ids of their words.

The tokenizers of language models split text before they merge, and most of them always split before
a space that does not follow whitespace. For those the ids of a document are the ids of its words
joined, and each word needs to be encoded once. The tokenizer's own rules decide whether this holds
(`Vocabulary.splits_at_spaces`); all other tokenizers encode whole documents. Unigram models never
qualify: they add scores over a whole document in single precision, so that its beginning decides
ties at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megatron_kd.data.vocabularies.vocabulary import Vocabulary

# A run of whitespace; its last space is searched for separately. One expression for both would try
# every character of a run without spaces as its beginning.
_WHITESPACE_RUNS = re.compile(r"\s\s+")
_MAX_CACHED_WORDS = 200_000
_MAX_CACHED_LENGTH = 64
# Characters of a document that are encoded at a time.
_SLICE_CHARACTERS = 4_000_000
_CHECKED_CHARACTERS = 2_000
_MAX_TRIES = 64


class DocumentEncoder:
    """Encode documents and cache words. A process needs one.

    The result is that of `vocabulary.encode_document` on each whole document. Memory is bounded by
    the longest document.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each document, back to back as bytes of `vocabulary.dtype`.

        Raises:
            EncodingError: the tokenizer's library finds no ids for one of the documents.
        """
        encoded: list[bytes] = []
        batch: list[str] = []
        for text in texts:
            if len(text) <= _SLICE_CHARACTERS and self._fits_batch(text):
                batch.append(self._with_leading_space(text))
                continue
            encoded += self._encode_batch(batch)
            batch = []
            encoded.append(self._encode_alone(text))
        return encoded + self._encode_batch(batch)

    def _fits_batch(self, text: str) -> bool:
        if self.vocabulary.caches_words:
            return self._splits(text)
        return not self.vocabulary.adds_leading_space

    def _splits(self, text: str) -> bool:
        """Return whether the text may be split at its spaces."""
        alias = self.vocabulary.space_alias
        return self.vocabulary.splits_at_spaces and not (alias and alias in text)

    def _encode_alone(self, text: str) -> bytes:
        """Encode a long document, or one that its vocabulary must encode as a whole."""
        if self._splits(text):
            slices = _slices(self._with_leading_space(text))
            return b"".join(self._encode_batch([part])[0] for part in slices)
        if self.vocabulary.splits_locally and len(text) > _SLICE_CHARACTERS:
            return self._encode_in_checked_slices(text)
        return self.vocabulary.encode_document(text)

    def _encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        if not self.vocabulary.caches_words:
            return self.vocabulary.encode_batch(texts)
        return self._encode_words([_word_keys(text) for text in texts])

    def _with_leading_space(self, text: str) -> str:
        return " " + text if text and self.vocabulary.adds_leading_space else text

    def _encode_words(self, keys: Sequence[list[str]]) -> list[bytes]:
        cache = self._cache
        missing = list(set().union(*keys) - cache.keys())
        if missing:
            if len(cache) + len(missing) > _MAX_CACHED_WORDS:
                cache.clear()
                missing = list(set().union(*keys))
            words = [key[1:] if key[0:1] == " " else " " + key for key in missing]
            cache.update(zip(missing, self.vocabulary.encode_batch(words), strict=True))
        encoded = [b"".join(map(cache.__getitem__, document)) for document in keys]
        for key in missing:
            if len(key) > _MAX_CACHED_LENGTH:
                del cache[key]
        return encoded

    def _encode_in_checked_slices(self, text: str) -> bytes:
        """Encode a long document of a vocabulary whose rules are not known.

        It is cut only where the text around the cut encodes as its two sides do.
        """
        encode = self.vocabulary.encode_document
        parts, start = [], 0
        while len(text) - start > 2 * _SLICE_CHARACTERS:
            cut = self._find_cut(text, start + _SLICE_CHARACTERS)
            if cut is None:
                break
            parts.append(encode(text[start:cut]))
            start = cut
        return b"".join((*parts, encode(text[start:])))

    def _find_cut(self, text: str, start: int) -> int | None:
        """Return a cut before a space from `start` on, where both sides encode independently."""
        encode = self.vocabulary.encode_document
        for _ in range(_MAX_TRIES):
            cut = text.find(" ", start)
            if cut < 0:
                return None
            left, right = (
                text[cut - _CHECKED_CHARACTERS : cut],
                text[cut : cut + _CHECKED_CHARACTERS],
            )
            if encode(left) + encode(right) == encode(left + right):
                return cut
            start = cut + 1
        return None


def _word_keys(text: str) -> list[str]:
    """Return the cache keys of a text's words, cut before every space not after whitespace.

    The key of a word that is one space and then no further one is the word without that space. The
    key of any other word is a space followed by the word.
    """
    if not text:
        return []
    keys: list[str] = []
    start, end = 0, -1  # of the current word with a run of whitespace; end -1: there is none
    done = 0  # everything before this is in `keys`
    for run in _WHITESPACE_RUNS.finditer(text):
        first = run.start()
        last = text.rfind(" ", first + 1, run.end())
        if last < 0:
            continue  # the run has no space that a cut could precede
        if end < 0 or first >= end:
            if end >= 0:
                keys.append(" " + text[start:end])
                done = end
            start = first if text[first] == " " else max(text.rfind(" ", done, first), done)
            _add_simple_keys(text, done, start, keys)
        end = text.find(" ", last + 1)
        if end < 0:
            end = len(text)
    if end >= 0:
        keys.append(" " + text[start:end])
        done = end
    _add_simple_keys(text, done, len(text), keys)
    return keys


def _add_simple_keys(text: str, start: int, end: int, keys: list[str]) -> None:
    """Append the keys of text[start:end], in which every space is a cut."""
    if start == end:
        return
    words = text[start:end].split(" ")
    if words[0]:
        words[0] = " " + words[0]  # only a text's first word can have no space before it
        keys += words
    else:
        keys += words[1:]


def _slices(text: str) -> Iterator[str]:
    """Yield slices of about _SLICE_CHARACTERS, cut before a space not after whitespace."""
    start = 0
    while len(text) - start > _SLICE_CHARACTERS:
        cut = text.find(" ", start + _SLICE_CHARACTERS)
        while cut >= 0 and text[cut - 1].isspace():
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]

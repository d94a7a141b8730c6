"""Test that encoding by words gives the ids of whole documents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_kd.data.preparation.jobs import encoding
from megatron_kd.data.preparation.jobs.encoding import DocumentEncoder
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.text import (
    awkward_text,
    plain_encoder,
)
from tests.losses.cases import fresh_seed

KINDS = ("sentencepiece", "unigram", "huggingface", "tiktoken")


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_by_words_equals_encoding_whole_documents(
    kind: str, tokenizers: dict[str, Path], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, _ = load_tokenizer(tokenizers[kind])
    plain, _ = plain_encoder(kind, tokenizers[kind])
    assert vocabulary.splits_at_spaces == (kind != "unigram")
    rng = random.Random(fresh_seed())
    documents = [*texts, "a\u2581 b \u2581\u2581 c", *(awkward_text(rng, 200) for _ in range(50))]
    expected = [vocabulary._to_bytes(plain(text)) for text in documents]
    assert DocumentEncoder(vocabulary).encode(documents) == expected
    # Documents longer than a slice, and a cache too small for the words.
    monkeypatch.setattr(encoding, "_SLICE_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "_MAX_CACHED_WORDS", 50)
    assert DocumentEncoder(vocabulary).encode(documents) == expected
    # Rules that are not known, so that cuts are checked.
    vocabulary.splits_at_spaces = vocabulary.caches_words = False
    monkeypatch.setattr(encoding, "_CHECKED_CHARACTERS", 100)
    assert DocumentEncoder(vocabulary).encode(documents) == expected

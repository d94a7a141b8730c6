"""Share tokenizers of every kind and awkward texts among the tests of preparation."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.text import awkward_text, make_tokenizers, source_texts
from tests.losses.cases import fresh_seed


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(fresh_seed())
    texts = [awkward_text(rng, rng.randint(0, 60)) for _ in range(300)] + source_texts(100_000)
    rng.shuffle(texts)
    return [*texts, "", " ", "\n"]

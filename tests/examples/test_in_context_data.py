"""Test the token files of the in-context example, and what their arguments may be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.token_files import read_index
from tests.examples.in_context import (
    IDS,
    RIGHT_SOLUTIONS,
    WORDS,
    blocks,
    language,
    prepare,
    probe,
    read_terms,
)
from tests.losses.cases import fresh_seed

SIZES = ["--sequences", "60", "--heldout", "3", "--problems", "40", "--each", "2"]
TRAINING = ("train", "more")
FIRST_WORDS = {"copy": "<copy>", "needle": "<find>", "sum": "<sum>"}


def test_token_files(tmp_path: Path) -> None:
    """Check documents, samples and held-out sums of the files, written twice with one seed."""
    seed = str(fresh_seed())
    for folder in ("one", "two"):
        assert prepare.main([str(tmp_path / folder), *SIZES, "--seed", seed]) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 5 * 3 + 1
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes(), name
    probes = json.loads((tmp_path / "one/probes.json").read_text())
    withheld = {tuple(sorted(problem["terms"])) for problem in probes["sum"]}
    samples = {
        name: read_samples(tmp_path, name)
        for name in (*TRAINING, "heldout_copy", "heldout_needle", "heldout_sum")
    }
    assert not samples["train"] & samples["more"]
    assert len(samples["train"]) == 60
    kinds: Counter[str] = Counter()
    for sample in (*samples["train"], *samples["more"]):
        for document in documents(sample):
            kinds[document[0]] += 1
            assert document[0] in FIRST_WORDS.values(), document
            assert tuple(sorted(document_terms(document))) not in withheld, document
    assert min(kinds.values()) > 0.2 * sum(kinds.values()), kinds
    for kind, first_word in FIRST_WORDS.items():
        heldout = samples[f"heldout_{kind}"]
        first_words = {document[0] for sample in heldout for document in documents(sample)}
        assert first_words == {first_word}


def read_samples(folder: Path, name: str) -> set[tuple[int, ...]]:
    """Return the samples that a run reads, which must be as many as were requested."""
    prefix = str(folder / "one" / name)
    assert set(read_index(prefix).lengths) == {128}
    dataset = build_dataset(
        DatasetRequest(
            prefixes=[prefix],
            num_samples=60,
            sequence_length=128,
            seed=3,
            index_cache=folder / "cache",
            end_of_document=None,
            vocab_size=len(WORDS),
            repeat=name in TRAINING,
        )
    )
    assert len(dataset) == (60 if name in TRAINING else 3)
    return {tuple(dataset[index]["tokens"].tolist()) for index in range(len(dataset))}


def documents(sample: tuple[int, ...]) -> list[list[str]]:
    """Return the words of each document of a sample, without <end>."""
    assert sample[-1] == IDS["<end>"]
    text = " ".join(WORDS[id_] for id_ in sample)
    return [document.split() for document in text.split("<end>") if document.split()]


def document_terms(document: list[str]) -> list[int]:
    """Return the terms of a sum, or an empty list for another kind."""
    if document[0] != "<sum>":
        return []
    return read_terms(document[: document.index(":") + 1])


def test_blocks_are_full() -> None:
    rng = np.random.default_rng(fresh_seed())
    kinds = list(language.document_generators(RIGHT_SOLUTIONS, frozenset()).values())
    packed = list(blocks.pack_blocks(rng, kinds, 500, 128))
    assert {len(block) for block in packed} == {128}
    # One <end> closes the last document, further ones fill the block.
    free = [block[::-1].index(next(id_ for id_ in block[::-1] if id_)) - 1 for block in packed]
    for room, block in zip(free, packed[1:], strict=False):
        assert block.index(IDS["<end>"]) + 1 > room, "the oldest document would have fitted"
    # 4.9 +- 0.5 over seeds; 16 if only two documents are compared.
    assert np.mean(free) < 8
    with pytest.raises(ValueError, match="make blocks longer"):
        list(blocks.pack_blocks(rng, kinds, 100, 30))


def test_bad_probes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write it with prepare.py"):
        probe.read_probes(tmp_path / "probes.json")
    (tmp_path / "probes.json").write_text(json.dumps({"words": ["other"]}))
    with pytest.raises(ConfigError, match="another version of language.py"):
        probe.read_probes(tmp_path / "probes.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "20"], "the longest document"),
        (["--wrong", "0.9", "--incomplete", "0.2"], "at most 1"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

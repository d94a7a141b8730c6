"""Refuse caches that do not fit a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer

from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.tiny import VOCAB
from tests.teacher.stored_runs import extraction, student
from tests.train.test_program import command, finish, start, write_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def train_vocabulary(prefix: Path, word: str) -> Path:
    """Train a SentencePiece model of as many ids as the data has."""
    text = prefix.with_suffix(".txt")
    text.write_text(
        "\n".join(
            f"{word} {number} {chr(97 + number % 26)}{chr(65 + number % 26)} {number * 7919}"
            for number in range(3000)
        )
    )
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.mark.slow
@pytest.mark.fault(9)
def test_mismatched_caches_are_refused_before_step_0(
    teacher: tuple[Path, str], tmp_path: Path
) -> None:
    run_file = student(tmp_path, "online", teacher)
    cache = tmp_path / "cache"
    code, output = finish(start(extraction(run_file, cache, "--first-samples", "30")))
    assert code == 0, output
    source = {"source": "cached", "cache": str(cache)}

    def refused(name: str, **overrides: Any) -> str:
        overrides["teacher"] = {**source, **overrides.get("teacher", {})}
        code, output = finish(start(command(student(tmp_path, name, teacher, **overrides))))
        assert code == 2, output
        assert not (tmp_path / name / "metrics.jsonl").exists(), output
        (sentence,) = [
            line for line in output.splitlines() if line.startswith("megatron_kd: error:")
        ]
        return sentence

    assert "lacks " in (message := refused("part"))
    assert "of the next 24 samples" in message
    assert "made from a part of the data" in message
    assert "sequence_length: the cache has 24, expected 16" in refused(
        "short", batch={"sequence_length": 16}
    )
    assert "selection: the cache has 'TopSelection(top_k=12" in refused(
        "other_k", distill={"top_k": 13}
    )
    digest = json.loads((cache / "cache.json").read_text())["identity"]["teacher"]
    config = write_run(
        tmp_path, "second", teacher[1], train={"steps": 2, "seed": 3}, checkpoint={"interval": 2}
    )
    assert finish(start(command(config)))[0] == 0
    message = refused("other_teacher", teacher={"checkpoint": str(tmp_path / "second")})
    assert f"teacher: the cache has '{digest}', expected '" in message
    # Two vocabularies of equal size: only the cache's identity records which one its ids are of.
    models = [train_vocabulary(tmp_path / name, name) for name in ("first", "other")]
    tokenized = student(tmp_path, "tokenized", teacher, data={"tokenizer": str(models[0])})
    storing = extraction(tokenized, tmp_path / "tokenized_cache", "--first-samples", "2")
    assert finish(start(storing))[0] == 0
    message = refused(
        "other_words",
        data={"tokenizer": str(models[1])},
        teacher={"cache": str(tmp_path / "tokenized_cache")},
    )
    digests = [load_tokenizer(model)[1].digest for model in models]
    assert f"tokenizer: the cache has '{digests[0]}', expected '{digests[1]}'" in message
    assert "there is no teacher cache at" in refused(
        "nowhere", teacher={"cache": str(tmp_path / "absent")}
    )

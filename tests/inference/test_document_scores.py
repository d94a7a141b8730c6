"""Score documents: equality with whole logits, selection, and restarts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.tools import Done, run_tools
from tests.inference.student import ROOT, SCORE, Student, read_documents
from tests.inference.use_ranks import VOCAB

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def test_scores_equal_those_of_whole_logits(student: Student) -> None:
    """Compare fp32 with fp32, in every layout."""
    plain = np.array(student.results.plain_scores)
    assert np.ptp(plain) > 0.05
    for layout, scores in student.results.scores.items():
        assert scores.shape == plain.shape, layout
        assert np.abs(scores - plain).max() < 2e-5, layout


def test_chosen_documents(student: Student, tool_calls: dict[str, Done]) -> None:
    """Keep half of the documents, unchanged and in order, and those with the highest scores."""
    assert tool_calls["score"].code == 0, tool_calls["score"]
    documents, kept_documents = (
        read_documents(student.folder / name) for name in ("short", "chosen")
    )
    report = json.loads((student.folder / "chosen.selection.json").read_text())
    assert report["not_scored"] == 1
    assert len(kept_documents) == report["kept_documents"] == round((len(documents) - 1) / 2)
    assert report["documents"] == len(documents)
    remaining = iter(enumerate(documents))
    chosen = [
        next(number for number, other in remaining if other == document)
        for document in kept_documents
    ]
    index = read_index(student.folder / "short")
    shards = [
        np.load(path) for path in sorted((student.folder / "chosen.scores").glob("shard-*.npy"))
    ]
    assert len(shards) > 2
    sums = np.concatenate(shards, axis=1)
    assert sums[2].tolist() == (index.lengths - 1).tolist()
    scores = (sums[0] - sums[1]) / np.maximum(sums[2], 1)
    dropped = [
        number
        for number, document in enumerate(documents)
        if number not in chosen and len(document) > 2
    ]
    assert min(scores[chosen]) == pytest.approx(report["lowest_kept"])
    assert min(scores[chosen]) >= max(scores[dropped])
    check_token_file(
        student.folder / "chosen",
        vocab_size=VOCAB,
        tokenizer_digest=load_tokenizer(student.tokenizer)[1].digest,
    )


def test_another_rule_reads_the_same_scores(student: Student, tool_calls: dict[str, Done]) -> None:
    assert tool_calls["score again"].code == 0, tool_calls["score again"]
    half, fewer = (read_documents(student.folder / name) for name in ("chosen", "fewer"))
    assert set(fewer) <= set(half) or set(half) <= set(fewer)
    report = json.loads((student.folder / "fewer.selection.json").read_text())
    assert report["kept_tokens"] <= 700
    assert sum(map(len, fewer)) // 2 > 500, "the budget of tokens is used"


def test_scoring_resumes(student: Student, tool_calls: dict[str, Done]) -> None:
    """Score only a missing shard again, of which a kill has left a part, with the same bytes."""
    assert tool_calls["score"].code == 0, tool_calls["score"]
    folder, scores = student.folder, student.folder / "chosen.scores"
    lost, *others = sorted(scores.glob("shard-*.npy"))
    times, content = {path: path.stat().st_mtime_ns for path in others}, lost.read_bytes()
    lost.unlink()
    (scores / f".{lost.name}.partial-1").write_bytes(content[:50])
    (folder / "again.bin").write_bytes(b"half")
    (folder / "again.selection.json").write_text("{}")
    again = [*SCORE, "--keep-fraction", "0.5", "--scores", "chosen.scores"]
    done = run_tools({"again": [*again, "--output", "again"]}, cwd=folder)["again"]
    assert done.code == 0, done
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert lost.read_bytes() == content
    for ending in (".bin", ".idx"):
        assert (folder / f"again{ending}").read_bytes() == (folder / f"chosen{ending}").read_bytes()


def test_existing_output_and_other_scores_are_refused(
    student: Student, tool_calls: dict[str, Done]
) -> None:
    assert tool_calls["score"].code == 0, tool_calls["score"]
    again = [*SCORE, "--keep-fraction", "0.5", "--scores", "chosen.scores"]
    calls = {
        "existing": [*again, "--output", "chosen"],
        "other": [*again, "--output", "x", "--sequence-length", 16],
    }
    done = run_tools(calls, cwd=student.folder)
    assert done["existing"].code == 2
    assert "chosen.idx is there already" in done["existing"].err
    assert done["other"].code == 2
    assert "has scores with another sequence_length (48 there, 16 here)" in done["other"].err


@pytest.mark.slow
def test_scoring_killed_in_the_middle(student: Student, tool_calls: dict[str, Done]) -> None:
    """Keep finished shards after SIGKILL, and end as a run that was not killed."""
    assert tool_calls["score"].code == 0, tool_calls["score"]
    call = [
        *SCORE,
        "--keep-fraction",
        "0.5",
        "--output",
        "killed",
        "--batch-size",
        1,
        "--shard-tokens",
        100,
    ]
    folder, scores = student.folder, student.folder / "killed.scores"
    command = [sys.executable, str(ROOT / "tools" / str(call[0])), *map(str, call[1:])]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list(scores.glob("shard-*.npy"))) < 2:
        assert process.poll() is None, "the process ended by itself"
    process.kill()
    process.wait()
    times = {path: path.stat().st_mtime_ns for path in scores.glob("shard-*.npy")}
    assert not (folder / "killed.idx").exists()
    assert run_tools({"again": call}, cwd=folder)["again"].code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert read_documents(folder / "killed") == read_documents(folder / "chosen")

"""Test the tool that packs conversations, and that a run accepts and reads its output."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kd.config import ConfigError, load_config
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.preparation.jobs import pieces
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, read_index, read_roles
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.train.startup.input_checks import check_inputs
from tests.data.preprocessing import cut_pieces
from tests.helpers.text import END, ROOT, load_tool
from tests.losses.cases import fresh_seed

tool = load_tool("preprocess_instructions")
merge_data = load_tool("merge_data")
TEMPLATE = ("--template", str(ROOT / "examples/instructions/plain.jinja"))
SUMS = [
    {"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}
    for a in range(12)
    for b in range(12)
]


def sums_command(folder: Path, tokenizer: Path) -> list[str]:
    """Write questions with one broken and one long line, and return a command without template."""
    lines = [json.dumps(record) for record in SUMS]
    lines[5:5] = ["not json", json.dumps({"question": "long", "answer": "word " * 500})]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    keys = ["--prompt-key", "question", "--response-key", "answer", "--sequence-length", "64"]
    output = ["--output", str(folder / "data/sums"), "--holdout", "sums_valid=0.2"]
    source = ["--input", str(folder / "sums.jsonl"), "--tokenizer", str(tokenizer)]
    return [*source, *keys, *output, "--workers", "1"]


def test_the_tool_writes_packed_samples(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    command = sums_command(tmp_path, tokenizers["sentencepiece"])
    assert tool.main(command) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert tool.main([*command, *TEMPLATE]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["unreadable"] == summary["too_long"] == 1
    assert "2 conversations were left out" in captured.err
    problems = summary["unreadable_documents"]
    assert [text.split(": ")[0].rpartition(":")[2] for text in problems] == ["6", "7"]
    assert sum(output["conversations"] for output in summary["outputs"].values()) == 144
    vocabulary, info = load_tokenizer(tokenizers["sentencepiece"])
    answers_read = []
    for prefix in (tmp_path / "data/sums", tmp_path / "data/sums_valid"):
        index, roles = read_index(prefix), read_roles(prefix)
        ids = np.fromfile(f"{prefix}.bin", "<u2")
        assert roles is not None
        assert set(index.lengths) == {64}
        assert len(roles) == len(ids)
        counted = ids[roles & COUNTS_FOR_LOSS != 0]
        answers = np.split(counted, np.flatnonzero(counted == info.end_of_document) + 1)
        answers_read += [
            vocabulary.decode(answer[:-1].tolist()) for answer in answers if len(answer)
        ]
    assert sorted(answers_read) == sorted(record["answer"] for record in SUMS)


def test_the_tool_keeps_finished_output(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    command = [*sums_command(tmp_path, tokenizers["sentencepiece"]), *TEMPLATE]
    assert tool.main(command) == 0
    assert tool.main([*command, "--output", str(tmp_path / "strict/sums"), "--strict"]) == 2
    captured = capsys.readouterr()
    assert "sums.jsonl:6 cannot be used" in captured.err
    assert tool.main(command) == 0
    assert json.loads(capsys.readouterr().out)["kept"] is True
    assert tool.main([*command, "--sequence-length", "32"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_accepts_packed_samples(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    tokenizer = tokenizers["sentencepiece"]
    assert tool.main([*sums_command(tmp_path, tokenizer), *TEMPLATE]) == 0
    run_file = ["--config", str(ROOT / "examples/instructions/finetune.toml")]
    overrides = {
        "data.tokenizer": str(tokenizer),
        "data.train": json.dumps([str(tmp_path / "data/sums")]),
        "data.train_weights": "[1.0]",
        "data.valid": json.dumps({"sums": str(tmp_path / "data/sums_valid")}),
        "checkpoint.initialize_from": "null",
        "run.directory": str(tmp_path / "run"),
    }
    settings = [*run_file, *(f"--{key}={value}" for key, value in overrides.items())]
    length = ["--batch.sequence_length", "64"]
    with pytest.raises(ConfigError, match="packed into samples of 64 tokens"):
        check_inputs(load_config([*settings, "--batch.sequence_length", "32"]), world_size=2)
    across = load_config([*settings, *length, "--data.document_attention", "across"])
    with pytest.raises(ConfigError, match='set data.document_attention = "within"'):
        check_inputs(across, world_size=2)
    inputs = check_inputs(load_config([*settings, *length]), world_size=2)
    assert inputs.vocab_size == load_tokenizer(tokenizer)[1].vocab_size
    other_end = load_config([*settings, *length, "--data.end_of_document", "a"])
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        check_inputs(other_end, world_size=2)


def write_chats(path: Path, count: int, rng: random.Random) -> list[str]:
    rows = [
        (
            f"{n}?",
            " ".join(rng.choice(["yes", "no", "naïve", "7"]) for _ in range(rng.randint(1, 10))),
        )
        for n in range(count)
    ]
    path.write_text(
        "".join(json.dumps({"prompt": ask, "response": say}) + "\n" for ask, say in rows)
    )
    return [say for _, say in rows]


def contents(folder: Path, names: tuple[str, ...] = ("chats", "valid")) -> dict[str, bytes]:
    return {
        f"{name}{end}": (folder / f"{name}{end}").read_bytes()
        for name in names
        for end in (".bin", ".idx", ".roles", ".json")
    }


def test_packing_depends_only_on_the_input(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Compare one piece with many, one process with two, and an interrupted job."""
    write_chats(tmp_path / "a.jsonl", 300, random.Random(fresh_seed()))
    command = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--sequence-length",
        "64",
        "--tokenizer",
        str(tokenizers["tiktoken"]),
        "--holdout",
    ]
    command += [
        "valid=0.3",
        "--template",
        str(ROOT / "examples/instructions/plain.jinja"),
        "--workers",
    ]
    assert tool.main([*command, "1", "--output", str(tmp_path / "one/chats")]) == 0
    cut_pieces(monkeypatch, 3001)
    capsys.readouterr()
    real, calls = pieces.write_atomically, []

    def interrupted(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(pieces, "write_atomically", interrupted)
    assert tool.main([*command, "1", "--output", str(tmp_path / "cut/chats")]) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not list((tmp_path / "cut").glob("*.bin"))
    assert tool.main([*command, "2", "--output", str(tmp_path / "cut/chats")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["pieces"] > 5
    assert summary["kept_pieces"] == 2
    one, cut = contents(tmp_path / "one"), contents(tmp_path / "cut")
    for name in one:
        contents_of_both = [
            json.dumps(json.loads(files[name]) | {"made_from": ""})
            if name.endswith("json")
            else files[name]
            for files in (one, cut)
        ]
        assert contents_of_both[0] == contents_of_both[1], name
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(cut)


def test_a_pass_reads_every_packed_sample(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """The last sample, or an only one, is read too.

    The labels that count are all answers, once.
    """
    answers = write_chats(tmp_path / "a.jsonl", 60, random.Random(fresh_seed()))
    vocabulary, info = load_tokenizer(tokenizers["tiktoken"])
    command = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(tokenizers["tiktoken"]),
        "--workers",
        "1",
    ]
    command += ["--template", str(ROOT / "examples/instructions/plain.jinja")]
    for length in (64, 8192):
        prefix = tmp_path / f"data{length}/chats"
        assert tool.main([*command, "--sequence-length", str(length), "--output", str(prefix)]) == 0
        settings: dict[str, Any] = dict(
            sequence_length=length, seed=3, index_cache=tmp_path / "cache", within_documents=True
        )
        settings |= dict(end_of_document=info.end_of_document, vocab_size=info.vocab_size)
        samples = len(read_index(prefix).lengths)
        assert samples == 1 if length == 8192 else samples > 5
        dataset = build_dataset(
            DatasetRequest(prefixes=[str(prefix)], num_samples=10**6, repeat=False, **settings)
        )
        assert len(dataset) == samples
        for ordered in (
            dataset,
            build_dataset(DatasetRequest(prefixes=[str(prefix)], num_samples=samples, **settings)),
        ):
            labels, tokens = [], np.memmap(f"{prefix}.bin", "<u2").reshape(-1, length)
            for sample in range(samples):
                values = ordered[sample]
                assert any(np.array_equal(values["tokens"], one) for one in tokens)
                assert np.array_equal(values["labels"][:-1], values["tokens"][1:])
                assert values["loss_mask"][-1] == 0
                labels += values["labels"][values["loss_mask"] > 0].tolist()
            text = b"".join(vocabulary.tokens[index] for index in labels).decode()
            assert sorted(text.split(END)[:-1]) == sorted(answers)


def test_packed_files_without_their_roles_are_refused(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    write_chats(tmp_path / "a.jsonl", 40, random.Random(fresh_seed()))
    command = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--sequence-length",
        "64",
        "--tokenizer",
        str(tokenizers["tiktoken"]),
        "--workers",
    ]
    command += ["1", "--template", str(ROOT / "examples/instructions/plain.jinja"), "--output"]
    parts = [tmp_path / "one", tmp_path / "two"]
    for part in parts:
        assert tool.main([*command, str(part)]) == 0
    assert merge_data.main([*map(str, parts), "--output", str(tmp_path / "both")]) == 0
    both, one = contents(tmp_path, ("both",)), contents(tmp_path, ("one",))
    assert both["both.roles"] == 2 * one["one.roles"]
    assert both["both.bin"] == 2 * one["one.bin"]
    merged, part = json.loads(both["both.json"]), json.loads(one["one.json"])
    assert merged["packed_length"] == 64
    assert merged["loss_tokens"] == 2 * part["loss_tokens"]
    assert merged["conversations"] == 80
    (tmp_path / "two.roles").unlink()
    with pytest.raises(ConfigError, match="two.roles is missing"):
        check_token_file(tmp_path / "two", vocab_size=1000)
    assert merge_data.main([*map(str, parts), "--output", str(tmp_path / "bad")]) == 2
    assert not list(tmp_path.glob("bad*"))

"""Test the tools that train a tokenizer and make token files, on part of Python's sources."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import find_text_files
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.data.vocabularies.vocabulary import Vocabulary
from tests.data.preprocessing import cut_pieces
from tests.helpers.text import ROOT, STDLIB, load_tool

EOD = 2


preprocess_data = load_tool("preprocess_data")
train_tokenizer = load_tool("train_tokenizer")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer on part of the standard library."""
    output = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    arguments = [
        "--input",
        str(STDLIB),
        "--pattern",
        "*.py",
        "--vocab-size",
        "400",
        "--output",
        str(output),
    ]
    assert train_tokenizer.main(arguments) == 0
    return output


def test_tokenizer_round_trips_source_text(model: Path) -> None:
    processor, info = load_tokenizer(model)
    texts = [path.read_text(encoding="utf-8") for path in STDLIB.glob("*.py")]
    texts += ["def f(x):\n\tif x:\n\t\treturn  'a\tb'\r\n    # é 漢 😀 \x00 end \n\n"]
    texts += [" lead", "trail ", "\n", "\t", "   ", "<s>", "a\n\n\nb"]
    for text in texts:
        assert processor.decode(processor.encode(text)) == text
    assert info.vocab_size == 400
    assert info.end_of_document == 2
    assert any(b"\n" in token for token in processor.tokens), "no newline was learned"


def test_tokenizer_digest_is_of_the_vocabulary(model: Path, tmp_path: Path) -> None:
    _, info = load_tokenizer(model)
    other_bytes = tmp_path / "same.model"
    # An unknown field (number 15, a varint) changes the file and not the vocabulary.
    other_bytes.write_bytes(model.read_bytes() + bytes([15 << 3, 1]))
    assert load_tokenizer(other_bytes)[1] == info
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"{i} green bottles hanging on the wall number {i * i}" for i in range(3000))
    )
    assert (
        train_tokenizer.main(
            ["--input", str(text), "--vocab-size", "310", "--output", str(tmp_path / "a.model")]
        )
        == 0
    )
    text.write_text(
        "\n".join(f"{i} ships came sailing by on monday morning {i * i}" for i in range(3000))
    )
    assert (
        train_tokenizer.main(
            ["--input", str(text), "--vocab-size", "310", "--output", str(tmp_path / "b.model")]
        )
        == 0
    )
    first, second = load_tokenizer(tmp_path / "a.model")[1], load_tokenizer(tmp_path / "b.model")[1]
    assert first.vocab_size == second.vocab_size
    assert first.digest != second.digest


def test_training_a_tokenizer_is_deterministic(model: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.model"
    train_tokenizer.main(
        ["--input", str(STDLIB), "--pattern", "*.py", "--vocab-size", "400", "--output", str(again)]
    )
    assert again.read_bytes() == model.read_bytes()


def test_unusable_tokenizers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="cannot read the tokenizer .*missing.model"):
        load_tokenizer(tmp_path / "missing.model")
    for content in (b"", b"hello world", b"{}"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ConfigError, match="is no tokenizer"):
            load_tokenizer(tmp_path / "bad.model")
    text = iter(["some words to learn from, and some more words"] * 50)
    settings = dict(
        vocab_size=30, model_type="bpe", eos_id=-1, hard_vocab_limit=False, minloglevel=2
    )
    with open(tmp_path / "no_eos.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text, model_writer=stream, **settings
        )
    assert load_tokenizer(tmp_path / "no_eos.model")[1].end_of_document is None
    (tmp_path / "text.txt").write_text("some words")
    arguments = [
        "--input",
        str(tmp_path / "text.txt"),
        "--tokenizer",
        str(tmp_path / "no_eos.model"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert preprocess_data.main(arguments) == 2
    assert "names no token that ends documents" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no token 'absent'"):
        load_tokenizer(tmp_path / "no_eos.model", end_of_document="absent")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--vocab-size", "90000"], "Vocabulary size too high"),
        (["--vocab-size", "400", "--pattern", "*.nothing"], "no file matches"),
        (["--vocab-size", "400", "--input", "/does/not/exist"], "does not exist"),
    ],
)
def test_training_errors_leave_no_output(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokenizer.model"
    assert (
        train_tokenizer.main(
            ["--input", str(STDLIB), "--pattern", "*.py", "--output", str(output), *extra]
        )
        == 1
    )
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_training_samples_long_and_jsonl_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps({"text": f"line {i} of many lines\u2028with words"}, ensure_ascii=False)
        for i in range(20000)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = [
        "--input",
        str(tmp_path / "data.jsonl"),
        "--vocab-size",
        "300",
        "--max-megabytes",
        "0.4",
    ]
    assert train_tokenizer.main([*arguments, "--output", str(tmp_path / "t.model")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["unreadable_pieces"] == 0
    assert 0.1 < summary["megabytes"] < 0.6
    assert '"' not in b"".join(load_tokenizer(tmp_path / "t.model")[0].tokens[259:]).decode(), (
        "JSON syntax was learned"
    )


def test_finding_text_files_is_ordered_and_filtered(tmp_path: Path) -> None:
    for name in ("b/two.py", "a.py", "a/one.py", "site-packages/x.py", "a/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files = find_text_files([tmp_path, tmp_path / "a.py"], ["*.py"], ["site-packages"])
    assert [file.key for file in files] == ["a.py", "a/one.py", "b/two.py"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for number in range(40):
        (folder / "sub" / f"f{number:02}.py").write_text(
            f"def f{number}():\n\treturn '{'x' * number}'\n"
        )
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "empty.py").write_text("")
    rows = [{"text": f"row {number} é"} for number in range(30)] + [
        {"other": 1},
        {"text": "\ud800"},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\nnot json\n")
    return folder


def read_documents(prefix: Path, processor: Vocabulary) -> list[str]:
    """Decode the documents of a token file with plain numpy.

    Each document must end with the end-of-document id.
    """
    raw = Path(f"{prefix}.idx").read_bytes()
    (count,) = struct.unpack_from("<Q", raw, 18)
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    parts = np.split(tokens, np.cumsum(np.frombuffer(raw, "<i4", count, 34)))[:-1]
    parts = [part for part in parts if len(part)]
    assert all(part[-1] == EOD for part in parts)
    return [processor.decode(part[:-1].tolist()) for part in parts]


def preprocess_with_holdout(corpus: Path, model: Path, output: Path, *options: str) -> None:
    arguments = ["--input", str(corpus), "--tokenizer", str(model), "--workers", "1"]
    arguments += ["--holdout", "valid=0.2", "--output", str(output), *options]
    assert preprocess_data.main(arguments) == 0


def test_preprocessing_writes_every_document_once(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    preprocess_with_holdout(corpus, model, out / "train")
    summary = json.loads(capsys.readouterr().out)
    assert summary["empty"] == 1
    assert summary["unreadable"] == 4
    assert summary["unreadable_documents"][0].endswith("latin.py: not UTF-8 at byte 5")
    processor, info = load_tokenizer(model)
    train, valid = (
        read_documents(out / "train", processor),
        read_documents(out / "valid", processor),
    )
    expected = {path.read_text() for path in corpus.glob("sub/*.py")} | {
        f"row {number} é" for number in range(30)
    }
    assert len(train) + len(valid) == 70
    assert set(train) | set(valid) == expected
    assert 5 <= len(valid) <= 25
    sidecar = json.loads((out / "valid.json").read_text())
    assert sidecar == summary["outputs"][str(out / "valid")]
    assert sidecar["tokenizer_digest"] == info.digest
    assert sidecar["vocab_size"] == 400
    assert sidecar["documents"] == len(valid)
    assert sidecar["bytes"] == sum(len(text.encode()) for text in valid)
    assert sidecar["dtype"] == "uint16"
    assert (
        check_token_file(out / "valid", vocab_size=400, tokenizer_digest=info.digest).num_tokens
        == sidecar["tokens"]
    )


def test_a_split_does_not_depend_on_other_files(corpus: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processor, _ = load_tokenizer(model)
    preprocess_with_holdout(corpus, model, out / "train")
    valid = read_documents(out / "valid", processor)
    options = ("--exclude", "f0*", "--no-append-eod", "--overwrite")
    preprocess_with_holdout(corpus, model, out / "train", *options)
    tokens = np.fromfile(out / "valid.bin", "<u2")
    excluded = tuple(f"def f{number}(" for number in range(10))
    assert any(text.startswith(excluded) for text in valid)
    assert EOD not in tokens
    assert processor.decode(tokens.tolist()) == "".join(
        text for text in valid if not text.startswith(excluded)
    )


def test_preprocessing_does_not_depend_on_workers(
    corpus: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--input", str(corpus), "--tokenizer", str(model), "--holdout", "valid=0.2"]
    command = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        *arguments,
        "--workers",
        "2",
    ]
    command += ["--output", str(tmp_path / "two" / "train")]
    process = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0
    assert process.stderr.count("\n") == 1
    assert json.loads(process.stdout)["unreadable"] == 4
    cut_pieces(monkeypatch, 37)
    assert (
        preprocess_data.main(
            [*arguments, "--workers", "1", "--output", str(tmp_path / "one" / "train")]
        )
        == 0
    )
    for name in ("train.bin", "train.idx", "train.json", "valid.bin", "valid.idx", "valid.json"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        if name.endswith("json"):  # made_from depends on how work was cut
            one, two = (
                json.dumps(json.loads(content) | {"made_from": ""}).encode()
                for content in (one, two)
            )
        assert one == two


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--strict"], "latin.py cannot be used"),
        (["--holdout", "valid=0.000001"], "no document went into .*valid"),
        (["--tokenizer", "/does/not/exist"], "cannot read the tokenizer"),
    ],
)
def test_preprocessing_errors_leave_no_output(
    extra: list[str],
    message: str,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--input",
        str(corpus),
        "--tokenizer",
        str(model),
        "--workers",
        "1",
        "--output",
        str(tmp_path / "out" / "train"),
        *extra,
    ]
    assert preprocess_data.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not [path for path in tmp_path.glob("out/*") if path.suffix != ".pieces"]

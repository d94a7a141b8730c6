"""Test that preprocessing writes the token files of Megatron from every kind of input."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_kd.data.preparation.jobs.text_job import TextRequest, plan_text
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.tokenizer import load_tokenizer
from tests.data.preprocessing import command, cut_pieces, environment, run_tool, write_lines
from tests.helpers.text import (
    plain_encoder,
    same_tokens,
    source_texts,
    write_as_megatron,
)

KINDS = ("sentencepiece", "unigram", "huggingface", "tiktoken")


@pytest.mark.parametrize("kind", KINDS)
def test_token_files_are_byte_identical_to_megatrons(
    kind: str, tokenizers: dict[str, Path], texts: list[str], tmp_path: Path, capsys: Any
) -> None:
    plain, end = plain_encoder(kind, tokenizers[kind])
    vocabulary, info = load_tokenizer(tokenizers[kind])
    assert info.end_of_document == end
    source = write_lines(tmp_path / "text.jsonl", texts)
    for name, more, last in (("ended", [], end), ("bare", ["--no-append-eod"], None)):
        write_as_megatron(tmp_path / f"megatron_{name}", texts, plain, last, info.vocab_size)
        assert run_tool(source, tokenizers[kind], tmp_path / name, *more) == 0
        summary = json.loads(capsys.readouterr().out)
        assert same_tokens(tmp_path / name, tmp_path / f"megatron_{name}")
        assert summary["empty"] == sum(not plain(text) for text in texts)
        assert summary["unreadable"] == 0
    file = check_token_file(
        tmp_path / "ended", vocab_size=info.vocab_size, tokenizer_digest=info.digest
    )
    assert (
        file.num_tokens
        == summary["outputs"][str(tmp_path / "bare")]["tokens"] + len(texts) - summary["empty"]
    )
    assert not list(tmp_path.glob("*.pieces"))


def test_wide_vocabularies_are_four_bytes(tmp_path: Path, capsys: Any) -> None:
    import base64

    path = tmp_path / "wide.tiktoken"
    ranks = [bytes([byte]) for byte in range(256)] + [
        f" {number:x}".encode() for number in range(70_000)
    ]
    path.write_text(
        "".join(
            f"{base64.b64encode(token).decode()} {rank}\n"
            for rank, token in enumerate(dict.fromkeys(ranks))
        )
    )
    texts = [f"word {number:x} and" for number in range(60_000, 60_100)]
    assert run_tool(write_lines(tmp_path / "a.jsonl", texts), path, tmp_path / "out") == 0
    import numpy as np

    ids = np.fromfile(tmp_path / "out.bin", "<i4")
    vocabulary, info = load_tokenizer(path)
    assert json.loads((tmp_path / "out.json").read_text())["dtype"] == "int32"
    assert ids.max() == info.end_of_document > 65536
    assert vocabulary.decode([index for index in ids if index != info.end_of_document]) == "".join(
        texts
    )


def test_every_kind_of_file_gives_the_same_tokens(
    tokenizers: dict[str, Path], texts: list[str], tmp_path: Path
) -> None:
    kept = [text for text in texts if text.strip("\n")]
    lines = write_lines(tmp_path / "a.jsonl", kept)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines.read_bytes())
    pyarrow.parquet.write_table(
        pyarrow.table({"id": list(range(len(kept))), "text": kept}),
        tmp_path / "a.parquet",
        row_group_size=50,
    )
    (tmp_path / "files").mkdir()
    for number, text in enumerate(kept):
        (tmp_path / f"files/{number:04}.txt").write_bytes(text.encode())
    path = tokenizers["huggingface"]
    sources = {
        "jsonl": lines,
        "gz": tmp_path / "gz",
        "zst": tmp_path / "*.zst",
        "parquet": tmp_path / "a.parquet",
        "files": tmp_path / "files",
    }
    for name, source in sources.items():
        assert run_tool(source, path, tmp_path / "out" / name) == 0
        assert same_tokens(tmp_path / "out/jsonl", tmp_path / "out" / name), name


def test_how_files_are_cut_changes_nothing(
    tokenizers: dict[str, Path], texts: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """Lines are cut by bytes, row groups by number, into one piece or many."""
    write_lines(tmp_path / "a.jsonl", texts)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=20
    )
    for name in ("a.jsonl", "a.parquet"):
        for cut, size in (("one", 10**9), ("many", 3000)):
            cut_pieces(monkeypatch, size)
            request = TextRequest(
                inputs=[str(tmp_path / name)],
                output=tmp_path / "plan",
                tokenizer=str(tokenizers["tiktoken"]),
            )
            plan = plan_text(request)
            assert len(plan.pieces) == 1 if cut == "one" else len(plan.pieces) > 5
            output = tmp_path / name.replace(".", "_") / cut / "train"
            assert (
                run_tool(tmp_path / name, tokenizers["tiktoken"], output, "--holdout", "valid=0.3")
                == 0
            )
        folder = tmp_path / name.replace(".", "_")
        assert all(
            same_tokens(folder / "one" / split, folder / "many" / split)
            for split in ("train", "valid")
        )


BROKEN_LINES = {
    7: b"{not json",
    40: b'{"other": 1}',
    120: b'{"text": "caf\xe9"}',
    121: b'{"text": 5}',
    150: b'{"text": "\\ud800"}',
    199: b'{"text": "row',
}


def write_broken_files(folder: Path) -> list[bytes]:
    """Write files with broken lines and return 200 intact lines."""
    lines = [json.dumps({"text": f"row {number}"}).encode() for number in range(200)]
    (folder / "rows.jsonl").write_bytes(
        b"\n".join(BROKEN_LINES.get(number, line) for number, line in enumerate(lines))
    )
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines[0] * 9)[:-9])
    return lines


def test_broken_input_is_counted_with_its_lines(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    intact = write_broken_files(tmp_path)
    good = [
        json.loads(row)["text"] for number, row in enumerate(intact) if number not in BROKEN_LINES
    ]
    cut_pieces(monkeypatch, 501)
    path = tokenizers["tiktoken"]
    assert run_tool(tmp_path / "rows.jsonl", path, tmp_path / "out") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["pieces"] > 5
    assert summary["unreadable"] == len(BROKEN_LINES)
    lines = [
        int(text.split("rows.jsonl:")[1].split(":")[0]) for text in summary["unreadable_documents"]
    ]
    assert lines == [number + 1 for number in BROKEN_LINES]
    reasons = (
        "not JSON",
        "no key 'text'",
        "not UTF-8",
        "'text' is not a string",
        "half of a surrogate",
        "not JSON",
    )
    assert all(
        reason in text
        for reason, text in zip(reasons, summary["unreadable_documents"], strict=True)
    )
    assert "6 documents were left out" in captured.err
    assert captured.err.count("\n") == 1
    plain, end = plain_encoder("tiktoken", path)
    write_as_megatron(tmp_path / "megatron", good, plain, end, 1000)
    assert same_tokens(tmp_path / "out", tmp_path / "megatron")


def test_strict_stops_at_the_first_broken_line(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    lines = write_broken_files(tmp_path)
    cut_pieces(monkeypatch, 501)
    path = tokenizers["tiktoken"]
    for source, line in (
        ("rows.jsonl", "rows.jsonl:8 "),
        ("latin.txt", "latin.txt "),
        ("cut.jsonl.gz", "cut.jsonl.gz:2 "),
    ):
        if source == "cut.jsonl.gz":
            (tmp_path / source).write_bytes(
                gzip.compress(lines[0] + b"\n" + os.urandom(1 << 17).hex().encode())[:-70_000]
            )
        assert run_tool(tmp_path / source, path, tmp_path / "strict", "--strict") == 2
        assert f"{line}cannot be used" in capsys.readouterr().err
        assert not list(tmp_path.glob("strict.[bij]*"))
    # A line far inside a file, in a piece that does not begin with the file.
    (tmp_path / "late.jsonl").write_bytes(b"\n".join([*lines[:150], b"[]", *lines[150:]]))
    assert run_tool(tmp_path / "late.jsonl", path, tmp_path / "strict", "--strict") == 2
    assert "late.jsonl:151 cannot be used (no JSON object)" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_input(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Measure the peak memory of reading the same text 6 and 24 times.

    The text is compressed into a single file, which is one piece.
    """
    text = "".join(json.dumps({"text": text}) + "\n" for text in source_texts(1_500_000)).encode()
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc")
    # The peak of getrusage includes that of this process, from before the exec.
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "import megatron_kd.data.preparation.jobs.text_job as text_job\n"
        "text_job._BATCH_CHARACTERS = 200_000  # memory levels off sooner\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    lines = open('/proc/self/status').readlines()\n"
        "    peak = next(line.split()[1] for line in lines if line.startswith('VmHWM'))\n"
        "    print(peak, file=sys.stderr)"
    )
    peaks = []
    for times in (6, 24):
        (tmp_path / f"{times}.jsonl.gz").write_bytes(gzip.compress(text * times, 1))
        path = tmp_path / f"{times}.jsonl.gz"
        arguments = command(
            path, tokenizers["tiktoken"], tmp_path / f"out{times}", "--workers", "1"
        )
        process = subprocess.run(
            [sys.executable, "-c", program, *arguments[1:]],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(process.stderr.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 12_000, peaks  # KiB; the text itself grows by 27,000

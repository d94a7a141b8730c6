"""Test hostile conditions: kills between renames, output beside input, very long lines and runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.data.preparation.documents import documents, find_text_files, make_pieces
from megatron_kd.data.preparation.formats.json_lines import skip_line
from megatron_kd.data.preparation.jobs import execution
from megatron_kd.data.preparation.jobs.encoding import DocumentEncoder
from megatron_kd.data.tokenizer import load_tokenizer
from tests.data.preprocessing import run_tool, write_lines
from tests.helpers.text import same_tokens


@pytest.mark.parametrize("dies_at", range(8))
@pytest.mark.fault(3)
def test_killed_while_files_get_their_names(
    dies_at: int, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Kill the job before each rename from the last piece to the end.

    The same command must finish the job, and no index may lie beside the tokens of another file.
    """
    source = write_lines(tmp_path / "a.jsonl", [f"text {number}" for number in range(40)])
    arguments = (source, tokenizers["tiktoken"], tmp_path / "out/a", "--holdout", "b=0.4")
    assert (
        run_tool(source, tokenizers["tiktoken"], tmp_path / "expected/a", "--holdout", "b=0.4") == 0
    )
    real_replace, real_rmtree, remaining = os.replace, shutil.rmtree, [dies_at]

    class Killed(BaseException):
        pass

    def count() -> None:
        remaining[0] -= 1
        if remaining[0] == -1:
            raise Killed

    def replace(old: Any, new: Any) -> None:
        if ".pieces" not in str(new):
            count()
        real_replace(old, new)

    def rmtree(path: Any, *more: Any) -> None:
        (path / "lock").unlink()
        count()
        real_rmtree(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(execution.shutil, "rmtree", rmtree)
        if dies_at < 7:
            with pytest.raises(Killed):
                run_tool(*arguments)
        else:
            assert run_tool(*arguments) == 0, "two files of three, and the folder of pieces"
    for name in ("a", "b"):
        if (tmp_path / f"out/{name}.idx").exists():
            assert same_tokens(tmp_path / "out" / name, tmp_path / "expected" / name)
    capsys.readouterr()
    assert run_tool(*arguments) == 0, capsys.readouterr().err
    assert all(
        same_tokens(tmp_path / "out" / name, tmp_path / "expected" / name) for name in ("a", "b")
    )
    assert len(list((tmp_path / "out").iterdir())) == 6, "no other file may remain"


def test_output_in_the_folder_of_the_input(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """A job that runs twice does not read its output and never overwrites its input."""
    (tmp_path / "one.txt").write_text("some text")
    path = tokenizers["tiktoken"]
    for kept in (False, True):
        assert run_tool(tmp_path, path, tmp_path / "train") == 0
        assert json.loads(capsys.readouterr().out).get("kept", False) == kept
    (tmp_path / "train.pieces").mkdir()
    (tmp_path / "train.pieces/piece-000000.0.ids").write_bytes(b"left by a killed run")
    assert run_tool(tmp_path, path, tmp_path / "train") == 0
    assert not (tmp_path / "train.pieces").exists()
    capsys.readouterr()
    assert run_tool(tmp_path / "train.bin", path, tmp_path / "train") == 2
    assert "the only input is" in capsys.readouterr().err
    rows = write_lines(tmp_path / "rows.json", ["a row"])
    before = rows.read_bytes()
    assert run_tool(rows, path, tmp_path / "rows", "--format", "jsonl", "--overwrite") == 2
    assert "does not describe token files" in capsys.readouterr().err
    assert rows.read_bytes() == before


@pytest.mark.timeout(60)
def test_long_runs_of_one_character(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """Whitespace takes linear time.

    A text for which the tokenizer's library finds no ids is counted.
    """
    texts = ["\n" * 400_000, "a" * 100_000, " " * 100_000, "end"]
    vocabulary, _ = load_tokenizer(tokenizers["huggingface"])
    assert DocumentEncoder(vocabulary).encode(texts[:1]) == vocabulary.encode_batch(texts[:1])
    source = write_lines(tmp_path / "a.jsonl", ["first", " " * 1_500_000, *texts])
    assert run_tool(source, tokenizers["tiktoken"], tmp_path / "out") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["unreadable"] == 1
    assert "a.jsonl:2: tiktoken finds no ids for it: " in summary["unreadable_documents"][0]
    assert summary["outputs"][str(tmp_path / "out")]["documents"] == 5
    assert run_tool(source, tokenizers["tiktoken"], tmp_path / "strict", "--strict") == 2
    assert "a.jsonl:2 cannot be used" in capsys.readouterr().err


def test_a_line_longer_than_many_pieces_is_read_once(tmp_path: Path) -> None:
    """A unit that begins inside a long line reads no further than its end."""
    path = write_lines(tmp_path / "a.jsonl", ["one", "long " * 4_000_000, "last"])
    (file,) = find_text_files([path])
    units = [unit for piece in make_pieces([file], "auto", 1_000_000) for unit in piece]
    assert len(units) > 15
    tracemalloc.start()
    texts = [document.text for unit in units[1:-1] for document in documents(unit, "text")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == []
    assert peak < 6_000_000
    stream = io.BytesIO(path.read_bytes())
    stream.seek(100)
    assert skip_line(stream, 1000) >= 1000
    assert stream.tell() < 2_000_000
    assert [
        len(document.text or "")
        for unit in (units[0], units[-1])
        for document in documents(unit, "text")
    ] == [3, 20_000_000, 4]

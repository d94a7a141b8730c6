"""Run the preprocessing tools from tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.text import ROOT, load_tool

tool = load_tool("preprocess_data")


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def command(source: Path | str, tokenizer: Path, output: Path, *options: str) -> list[str]:
    program = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(source)]
    return [*program, "--tokenizer", str(tokenizer), "--output", str(output), *options]


def run_process(source: Path | str, tokenizer: Path, output: Path, *options: str) -> dict[str, Any]:
    """Run the tool in another process, which must succeed, and return its summary."""
    process = subprocess.run(
        command(source, tokenizer, output, *options),
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert process.returncode == 0, process.stderr
    summary: dict[str, Any] = json.loads(process.stdout)
    return summary


def run_tool(source: Path | str, tokenizer: Path, output: Path, *options: str) -> int:
    """Run the tool in this process and return its exit code."""
    arguments = ["--input", str(source), "--tokenizer", str(tokenizer), "--output", str(output)]
    return int(tool.main([*arguments, "--workers", "1", *options]))


def cut_pieces(monkeypatch: Any, piece_bytes: int) -> None:
    """Cut work into pieces of this size."""
    from megatron_kd.data.preparation.documents import make_pieces
    from megatron_kd.data.preparation.jobs import job_plan as plan

    def make(files: Any, format_choice: str, _: int | None) -> Any:
        return make_pieces(files, format_choice, piece_bytes)

    monkeypatch.setattr(plan, "make_pieces", make)

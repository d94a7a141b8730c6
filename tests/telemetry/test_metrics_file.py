"""Rows of metrics.jsonl on a disk that is full for a while: none is lost, none is torn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kd.telemetry.run_files import RunWriter


class HalfFull:
    """A file that takes half of what it is given, then nothing."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("ab", buffering=0)
        self.room = 7

    def write(self, data: bytes) -> int:
        part = data[: self.room]
        self.room = 0
        if not part:
            raise OSError(28, "No space left on device")
        return self.stream.write(part)

    def fileno(self) -> int:
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()


def test_rows_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunWriter(tmp_path, tensorboard=False, enabled=True) as writer:
        writer.begin(step=0, steps=9)
        writer.row({"step": 1})
        real, full = writer._rows, HalfFull(path)
        writer._rows = full  # type: ignore[assignment]
        for step in (2, 3):
            writer.row({"step": step})
            assert path.read_text() == '{"step": 1}\n'
        writer._rows = real
        full.close()
        writer.row({"step": 4})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("No space left on device: its rows wait") == 1

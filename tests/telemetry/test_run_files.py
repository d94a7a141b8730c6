"""Files of a run: what is on disk after each record, a resume, a kill and a full disk."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from megatron_kd.telemetry.run_files import RunWriter


def read_jsonl(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_records_are_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", tensorboard=False, enabled=True) as writer:
        writer.begin(step=0, steps=3)
        writer.write_metrics(
            {
                "step": 1,
                "ce_loss": math.nan,
                "grad_norm": math.inf,
                "nested": {"a": [-math.inf, 2.0]},
                "kl": None,
            }
        )
        assert read_jsonl(tmp_path / "run") == [
            {
                "step": 1,
                "ce_loss": None,
                "grad_norm": None,
                "nested": {"a": [None, 2.0]},
                "kl": None,
            }
        ]
        with pytest.raises(ValueError, match="step"):
            writer.write_metrics({"ce_loss": 1.0})
    with pytest.raises(RuntimeError, match="begin"):
        writer.write_metrics({"step": 2})


def test_resume_drops_newer_records_and_an_incomplete_line(tmp_path: Path) -> None:
    with RunWriter(tmp_path, tensorboard=True, enabled=True) as killed:
        killed.begin(step=0, steps=6)
        for step in range(1, 6):
            killed.write_metrics({"step": step, "ce_loss": float(step), "kl": math.nan})
            if step in (3, 4):
                killed.write_metrics({"step": step, "split": "books", "ce_loss": 10.0 + step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ce_l')
    # Event files are ordered by the second in their name, and both attempts of this test may fall
    # in the same one.
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.killed"))
    with RunWriter(tmp_path, tensorboard=True, enabled=True) as resumed:
        resumed.begin(step=3, steps=6)
        for step in range(4, 7):
            resumed.write_metrics({"step": step, "ce_loss": 100.0 + step})
    records = read_jsonl(tmp_path)
    assert [(record["step"], record.get("split"), record["ce_loss"]) for record in records] == [
        (1, None, 1.0),
        (2, None, 2.0),
        (3, None, 3.0),
        (3, "books", 13.0),
        (4, None, 104.0),
        (5, None, 105.0),
        (6, None, 106.0),
    ]
    assert scalars(tmp_path, "train/ce_loss") == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 104.0),
        (5, 105.0),
        (6, 106.0),
    ]
    assert scalars(tmp_path, "validation/books/ce_loss") == [(3, 13.0)]


def test_a_damaged_file_is_refused_and_a_start_at_step_0_empties_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "split": "a", "ce_loss": 1.0}\nnonsense\n{"step": 2, "ce_loss": 1.0}\n'
    )
    writer = RunWriter(tmp_path, tensorboard=False, enabled=True)
    with pytest.raises(ValueError, match="line 2 "):
        writer.begin(step=1, steps=2)
    assert "nonsense" in path.read_text()
    writer.begin(step=0, steps=2)
    writer.close()
    assert path.read_text() == ""


def test_status_is_complete_and_checked(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, tensorboard=False, enabled=True)
    writer.begin(step=2, steps=9)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"
    writer.status("failed", step=4, message="loss is not finite")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.pop("time").endswith("+00:00")
    assert status == {"state": "failed", "step": 4, "steps": 9, "message": "loss is not finite"}
    with pytest.raises(ValueError, match="state must be one of"):
        writer.status("done", step=4)
    writer.write_config("[train]\nsteps = 9\n")
    assert (tmp_path / "config.toml").read_text() == "[train]\nsteps = 9\n"
    writer.close()


def test_status_survives_a_failure_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path, tensorboard=False, enabled=True)
    writer.status("running", step=1)
    before = (tmp_path / "status.json").read_text()
    order: list[str] = []
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), real_fsync(fd))[1])

    def refuse(*_: object) -> None:
        order.append("replace")
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        writer.status("finished", step=2)
    assert order == ["fsync", "replace"]
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert (tmp_path / "status.json").read_text() == before


def test_a_disabled_writer_touches_nothing(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", tensorboard=True, enabled=False) as writer:
        writer.begin(step=0, steps=1)
        writer.write_metrics({"step": 1})
        writer.status("finished", step=1)
        writer.write_config("x")
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    """Accept the first 7 bytes, then no more."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("ab", buffering=0)
        self.free_bytes = 7

    def write(self, data: bytes) -> int:
        accepted = data[: self.free_bytes]
        self.free_bytes = 0
        if not accepted:
            raise OSError(28, "No space left on device")
        return self.stream.write(accepted)

    def fileno(self) -> int:
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()


def test_records_of_a_full_disk_are_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunWriter(tmp_path, tensorboard=False, enabled=True) as writer:
        writer.begin(step=0, steps=9)
        writer.write_metrics({"step": 1})
        real, full = writer._metrics, FullDisk(path)
        writer._metrics = full  # type: ignore[assignment]
        for step in (2, 3):
            writer.write_metrics({"step": step})
            assert path.read_text() == '{"step": 1}\n'
        writer._metrics = real
        full.close()
        writer.write_metrics({"step": 4})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("No space left on device: records are kept in memory") == 1

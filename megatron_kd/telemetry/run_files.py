"""Write the files of a run: metrics.jsonl, TensorBoard scalars, status.json and config.toml.

A killed run leaves records that are newer than its last checkpoint. `begin` drops them, so that the
resumed run's curves have each step once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from megatron_kd.storage.atomic_files import write_atomically

# requeue: saved, start it again. stopped: saved or hopeless, do not restart it automatically.
State = Literal["running", "finished", "requeue", "stopped", "failed"]


class RunWriter:
    """Write the files of a run on rank 0.

    With enabled=False every method does nothing, so that callers need no test of the rank.

    Args:
        directory: the run directory; created if it does not exist.
        tensorboard: also write TensorBoard event files below directory/tensorboard.
        enabled: True on rank 0 only.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool, enabled: bool) -> None:
        self._directory = Path(directory)
        self._tensorboard = tensorboard
        self._enabled = enabled
        self._metrics: BinaryIO | None = None
        self._unwritten = b""
        self._events: Any = None
        self._steps: int | None = None
        if enabled:
            self._directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, *, step: int, steps: int) -> None:
        """Open the files for a run that has done `step` of `steps` updates; its status is running.

        Records after `step` are dropped from metrics.jsonl and hidden in TensorBoard. At step 0 all
        records of an earlier attempt are dropped.
        """
        if not self._enabled:
            return
        self.close()
        self._steps = steps
        path = self._directory / "metrics.jsonl"
        _keep_records_until(path, step)
        self._metrics = path.open("ab", buffering=0)
        self._unwritten = b""
        if self._tensorboard:
            # Imported here: it takes a second, and ranks other than 0 never need it.
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(self._directory / "tensorboard"), purge_step=step + 1 if step else 0
            )
        self.status("running", step=step)

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one record, after `begin`.

        Values that are not finite are written as null and left out of TensorBoard.

        Args:
            record: values by name, with an integer "step". A record with a "split" belongs to a
                validation set (TensorBoard: validation/<split>/<name>), any other to training
                (train/<name>).

        Raises:
            RuntimeError: before `begin`.
            ValueError: if the record has no integer step.
        """
        if not self._enabled:
            return
        if self._metrics is None:
            raise RuntimeError("RunWriter.write_metrics before RunWriter.begin")
        finite = _without_nonfinite(dict(record))
        if not isinstance(finite.get("step"), int):
            raise ValueError(
                f"a record of metrics needs an integer 'step', got {finite.get('step')!r}"
            )
        self._append((json.dumps(finite, allow_nan=False) + "\n").encode())
        if self._events is not None:
            self._write_events(finite)

    def _write_events(self, record: Mapping[str, Any]) -> None:
        prefix = f"validation/{record['split']}" if "split" in record else "train"
        for name, value in record.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and name != "step":
                self._events.add_scalar(f"{prefix}/{name}", value, record["step"])
        self._events.flush()

    def _append(self, line: bytes) -> None:
        """Append complete lines to metrics.jsonl.

        Lines that a full disk does not take are kept and written with the next record. Checkpoints
        report the full disk to the run, and end it with a graceful shutdown.
        """
        assert self._metrics is not None
        already_reported = bool(self._unwritten)
        self._unwritten += line
        size = os.fstat(self._metrics.fileno()).st_size
        try:
            # One write: a reader, or a kill, sees at most the last line incomplete.
            written = self._metrics.write(self._unwritten)
            if written != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = b""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._metrics.fileno(), size)
            if not already_reported:
                print(
                    f"megatron_kd: warning: {self._directory / 'metrics.jsonl'}: {error.strerror}: "
                    "records are kept in memory until there is room",
                    file=sys.stderr,
                )

    def status(self, state: State, *, step: int, message: str = "") -> None:
        """Replace status.json.

        Its keys are state, step, steps (null before `begin`), time (ISO 8601, UTC) and message.

        Args:
            state: state of the run.
            step: number of updates.
            message: reason, for people.

        Raises:
            ValueError: if the state is not known.
        """
        if state not in get_args(State):
            raise ValueError(f"state must be one of {', '.join(get_args(State))}, not {state!r}")
        if not self._enabled:
            return
        content = {
            "state": state,
            "step": step,
            "steps": self._steps,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "message": message,
        }
        write_atomically(
            self._directory / "status.json", (json.dumps(content, indent=2) + "\n").encode()
        )

    def write_config(self, text: str) -> None:
        """Replace config.toml, the complete configuration of the run."""
        if self._enabled:
            write_atomically(self._directory / "config.toml", text.encode())

    def close(self) -> None:
        """Flush and close the files; the status stays. May be called twice."""
        if self._metrics is not None:
            if self._unwritten:
                self._append(b"")
            self._metrics.close()
            self._metrics = None
        if self._events is not None:
            self._events.close()
            self._events = None


def _without_nonfinite(value: Any) -> Any:
    """Replace numbers that are not finite by None: JSON has no NaN or infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(inner) for inner in value]
    return value


def _keep_records_until(path: Path, step: int) -> None:
    """Drop records after `step` (all at step 0) and an incomplete last line from metrics.jsonl."""
    if not path.exists():
        return
    if step == 0:
        write_atomically(path, b"")
        return
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(
                f"{path} line {number} is not a record with a step; repair the file or move it "
                "away, then resume"
            ) from None
        if is_kept:
            kept.append(line.decode() + "\n")
    write_atomically(path, "".join(kept).encode())

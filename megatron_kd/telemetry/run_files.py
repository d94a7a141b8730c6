"""What a run leaves on disk: metrics.jsonl, TensorBoard scalars, status.json and config.toml.

A killed run leaves rows that are newer than its last checkpoint. `begin` drops them, so that the resumed run's
curves have each step once.
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
from types import TracebackType
from typing import Any, BinaryIO, Literal, get_args

from megatron_kd.storage.atomic_files import write_atomically

# requeue: saved, start it again. stopped: saved or hopeless, do not start it again by itself.
State = Literal["running", "finished", "requeue", "stopped", "failed"]


class RunWriter:
    """Writes a run's files on rank 0. With enabled=False every method does nothing, so callers need no rank test.

    Args:
        directory: the run directory; made where it is missing.
        tensorboard: also write TensorBoard event files below directory/tensorboard.
        enabled: True on rank 0 only.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool, enabled: bool) -> None:
        self._directory = Path(directory)
        self._tensorboard = tensorboard
        self._enabled = enabled
        self._rows: BinaryIO | None = None
        self._unwritten = b""
        self._events: Any = None
        self._steps: int | None = None
        if enabled:
            self._directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self, *, step: int, steps: int) -> None:
        """Open the files for a run that has done `step` of `steps` updates, and set the status to running.

        Rows after `step` are dropped from metrics.jsonl and hidden in TensorBoard. At step 0 nothing an earlier
        attempt wrote is kept.
        """
        if not self._enabled:
            return
        self.close()
        self._steps = steps
        path = self._directory / "metrics.jsonl"
        _keep_rows_until(path, step)
        self._rows = path.open("ab", buffering=0)
        self._unwritten = b""
        if self._tensorboard:
            # Imported here: it takes a second, and ranks other than 0 never need it.
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(self._directory / "tensorboard"), purge_step=step + 1 if step else 0
            )
        self.status("running", step=step)

    def row(self, row: Mapping[str, Any]) -> None:
        """Append one row; needs `begin`. Values that are not finite are written as null and left out of TensorBoard.

        A row with a "split" is a validation row (TensorBoard: validation/<split>/<name>), any other a training row
        (train/<name>).
        """
        if not self._enabled:
            return
        if self._rows is None:
            raise RuntimeError("RunWriter.row before RunWriter.begin")
        clean = _without_nonfinite(dict(row))
        if not isinstance(clean.get("step"), int):
            raise ValueError(f"a row needs an integer 'step', got {clean.get('step')!r}")
        self._write((json.dumps(clean, allow_nan=False) + "\n").encode())
        if self._events is not None:
            prefix = f"validation/{clean['split']}" if "split" in clean else "train"
            for name, value in clean.items():
                if (
                    name != "step"
                    and isinstance(value, (int, float))
                    and not isinstance(value, bool)
                ):
                    self._events.add_scalar(f"{prefix}/{name}", value, clean["step"])
            self._events.flush()

    def _write(self, line: bytes) -> None:
        """Append whole lines. What a full disk does not take is kept and tried again with the next row: the run is told of the disk by its
        checkpoints, which end it in good order.
        """
        assert self._rows is not None
        told = bool(self._unwritten)
        self._unwritten += line
        size = os.fstat(self._rows.fileno()).st_size
        try:
            # One write: a reader, or a kill, sees at most the last line torn.
            written = self._rows.write(self._unwritten)
            if written != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = b""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._rows.fileno(), size)
            if not told:
                print(
                    f"megatron_kd: warning: {self._directory / 'metrics.jsonl'}: {error.strerror}: its rows wait",
                    file=sys.stderr,
                )

    def status(self, state: State, *, step: int, message: str = "") -> None:
        """Replace status.json: state, step, steps (null before `begin`), time (ISO 8601, UTC) and message."""
        if state not in get_args(State):
            raise ValueError(f"state must be one of {', '.join(get_args(State))}, not {state!r}")
        if not self._enabled:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        content = {
            "state": state,
            "step": step,
            "steps": self._steps,
            "time": now,
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
        """Flush and close; the status is left as it is. May be called twice."""
        if self._rows is not None:
            if self._unwritten:
                self._write(b"")
            self._rows.close()
            self._rows = None
        if self._events is not None:
            self._events.close()
            self._events = None


def _without_nonfinite(value: Any) -> Any:
    """JSON has no NaN or infinity, and readers other than Python's refuse them: they become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(inner) for inner in value]
    return value


def _keep_rows_until(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl without rows after `step` (all rows at step 0) and without a torn last line."""
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
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(
                f"{path} line {number} is not a row with a step; repair the file or move it away, then resume"
            ) from None
        if keep:
            kept.append(line.decode() + "\n")
    write_atomically(path, "".join(kept).encode())

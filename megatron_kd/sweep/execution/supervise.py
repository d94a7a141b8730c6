"""Run one command and record its success, even if the process that started it is gone.

Started as a file, with Python's own library alone, so that it starts in milliseconds:

    python -I -S supervise.py LOG RECORD CONTENT DESCRIPTOR COMMAND [WORD ...]

The command's output is appended to LOG. If it ends with 0, CONTENT (JSON) is written to RECORD with
the seconds that it took. Signals are forwarded to it. The file descriptor DESCRIPTOR, a lock, is
inherited: it stays locked while any process of the command lives. The exit code is the command's,
128 + N if signal N ended it, and 127 if it cannot be started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Start the command, wait for it, and write its record."""
    log, record, content, descriptor, *command = sys.argv[1:]
    early_signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        if child is None:
            early_signals.append(number)
        else:
            child.send_signal(number)

    for number in _FORWARDED_SIGNALS:
        signal.signal(number, forward)
    start_time = time.monotonic()
    with open(log, "ab", buffering=0) as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[int(descriptor)],
            )
        except OSError as error:
            output.write(f"{command[0]} cannot be started: {error.strerror}\n".encode())
            return 127
        for early_signal in early_signals:
            child.send_signal(early_signal)
        code = child.wait()
    if code == 0:
        _write(record, {**json.loads(content), "seconds": round(time.monotonic() - start_time, 3)})
    return code if code >= 0 else 128 - code


def _write(path: str, content: dict[str, object]) -> None:
    """Write atomically, like storage/atomic_files.py, which would need other libraries."""
    temporary = f"{path}.partial"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

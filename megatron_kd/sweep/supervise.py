"""Start one command, and note it as done when it has ended well, whatever becomes of who asked for it.

Run as a file, with Python's own library alone, so that it starts in milliseconds:

    python -I -S supervise.py LOG RECORD CONTENT DESCRIPTOR COMMAND [WORD ...]

The command's output is appended to LOG. CONTENT (JSON) is written to RECORD, with the seconds that it took, when it ends with 0. Signals
are passed on to it. DESCRIPTOR, a lock, is inherited: it is held for as long as anything of the command lives. The exit code is the
command's; 128 + N where signal N ended it, 127 where it cannot be started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> int:
    """Start, wait, note."""
    log, record, content, descriptor, *command = sys.argv[1:]
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    began = time.monotonic()
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
        for waiting in list(asked):
            child.send_signal(waiting)
        code = child.wait()
    if code == 0:
        _write(record, {**json.loads(content), "seconds": round(time.monotonic() - began, 3)})
    return code if code >= 0 else 128 - code


def _write(path: str, content: dict[str, object]) -> None:
    """As storage/atomic_files.py does it, which would need this package's libraries."""
    temporary = f"{path}.partial"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

"""The program, whose last rank fails in its third exchange of targets: `python -m tests.train.faulty MODE --config run.toml`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def fail(mode: str) -> None:
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "raise":
        raise ValueError("a shard of the data is gone")
    time.sleep(3600)


def main() -> int:
    mode, *arguments = sys.argv[1:]
    from megatron_kd.parallel.platform import use_cpu

    use_cpu()
    from megatron_kd.pretrain import main as program
    from megatron_kd.teacher import separate_layout as own_layout

    # Asleep it never comes to the exchange; whatever else happens, happens inside.
    name = "_pack" if mode == "sleep" else "exchange"
    real, calls, when = getattr(own_layout, name), [], 3 if mode == "sleep" else 6

    def faulty(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == when and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            fail(mode)
        return real(*given, **named)

    setattr(own_layout, name, faulty)
    return program(arguments)


if __name__ == "__main__":
    sys.exit(main())

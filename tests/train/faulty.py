"""Run the program with a last rank that fails in its third exchange of targets.

`python -m tests.train.faulty MODE --config run.toml`
"""

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
    from megatron_kd.teacher.runtime import separate_layout

    # A sleeping rank never enters the exchange. All other failures happen inside it.
    name = "pack_targets" if mode == "sleep" else "exchange"
    original, calls, last_call = getattr(separate_layout, name), [], 3 if mode == "sleep" else 6
    is_last_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == last_call and is_last_rank:
            fail(mode)
        return original(*args, **kwargs)

    setattr(separate_layout, name, faulty)
    return program(arguments)


if __name__ == "__main__":
    sys.exit(main())

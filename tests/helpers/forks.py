"""Call functions in forks of a process that has imported everything, in milliseconds."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Call = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass
class Ended:
    """Hold the end of a call.

    Attributes:
        value: Its result; None if it did not return.
        signal: Signal that ended it; 0 for none.
        output: stdout and stderr.
    """

    value: Any
    signal: int
    output: str


def in_forks(rendezvous: str, calls: Sequence[Call]) -> list[Ended]:
    """Run each call in turn in a fork of this process. For `run_ranks` with one rank."""
    import megatron_kd.train.loop  # noqa: F401  what takes the time

    with tempfile.TemporaryDirectory() as folder:
        return [_fork(function, arguments, Path(folder)) for function, arguments in calls]


def _fork(function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path) -> Ended:
    value, output = folder / "value", folder / "output"
    value.unlink(missing_ok=True)
    output.write_bytes(b"")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            value.write_bytes(pickle.dumps(function(*arguments)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    result = pickle.loads(value.read_bytes()) if value.exists() and os.WIFEXITED(status) else None
    return Ended(
        result,
        os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        output.read_text(errors="replace"),
    )

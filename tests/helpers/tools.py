"""Call command-line tools many times in one process, which imports their libraries once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """Hold exit code and output of a call."""

    code: int
    out: str
    err: str


def run_tools(
    calls: dict[str, list[object]], *, cwd: Path, timeout: float = 300
) -> dict[str, Done]:
    """Run calls, [tool, argument, ...] by name, in order in one fresh process in `cwd`."""
    lines = {name: [str(word) for word in words] for name, words in calls.items()}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__]
    process = subprocess.run(
        command,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    return {name: Done(*result) for name, result in results.items()}


def _call(words: list[str]) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "tools" / words[0]), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps({name: _call(words) for name, words in json.loads(sys.stdin.read()).items()}))

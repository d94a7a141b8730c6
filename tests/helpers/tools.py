"""Many calls of the command-line tools in one process: what each prints and returns, without paying for the imports each time."""

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
    """What a call gave."""

    code: int
    out: str
    err: str


def run_tools(
    calls: dict[str, list[object]], *, cwd: Path, timeout: float = 300
) -> dict[str, Done]:
    """Name -> [tool, argument, ...], in order, in one fresh process in `cwd`."""
    lines = {name: [str(word) for word in words] for name, words in calls.items()}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__]
    done = subprocess.run(
        command,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {name: Done(*found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


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

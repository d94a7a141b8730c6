"""tools/sweep.py: interruptions, failures, changed definitions, and Slurm scripts."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.sweeps import start_sweep, sweep, write_sweep
from tests.losses.cases import fresh_seed

# Logs its start and, unless it is killed before, its end. After the end it cannot be killed by
# SIGTERM, which is blocked.
STUB = """
import os, signal, sys, time
name, log, seconds = sys.argv[1:]
def note(word):
    with open(log, 'a') as out:
        out.write(word + ' ' + name + chr(10))
note('begin')
while seconds == 'go' and not os.path.exists(log + '-go'):
    time.sleep(0.02)
time.sleep(0 if seconds == 'go' else float(seconds))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
note('end')
"""
CELL = '[[cell]]\nname = "never"\nrun = "student.toml"\nneeds = ["j*"]\n'


def stubs(folder: Path, jobs: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "stub.py").write_text(STUB)
    return write_sweep(
        folder,
        '[sweep]\ntitle = "stubs"\nseeds = [1]\n'
        f'[variables]\nlog = "{{here}}/log"\nseconds = "0.1"\n{jobs}{CELL}',
    )


def stub(name: str, *, needs: str = "", more: str = "") -> str:
    words = f'["{{python}}", "-S", "{{here}}/stub.py", "{name}", "{{log}}", "{{seconds}}"]'
    return f'[[job]]\nname = "{name}"\nneeds = [{needs}]\ncommand = {words}\n{more}\n'


def notes(folder: Path, word: str) -> Counter[str]:
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith(word))


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_disturbed_at_random(tmp_path: Path, kind: signal.Signals) -> None:
    seed = fresh_seed()
    dice = random.Random(seed)
    tree = stub("j0") + "".join(
        stub(f"j{number}", needs=f'"j{(number - 1) // 2}"') for number in range(1, 7)
    )
    path, words = stubs(tmp_path, tree), ["--only", "j*", "--jobs", "2"]
    if kind == signal.SIGKILL:  # they must still run when the next sweep starts
        words += ["--set", "seconds=0.9"]
    disturbed = 0
    for _ in range(60):
        before = notes(tmp_path, "begin").total()
        process = start_sweep(path, tmp_path / "out", *words)
        # By then a task runs, except one time in four, when the sweep itself is still starting.
        while (
            disturbed < 3
            and process.poll() is None
            and notes(tmp_path, "begin").total() == before
            and dice.random() < 0.996
        ):
            time.sleep(0.01)
        try:
            process.communicate(timeout=dice.uniform(0.0, 0.3) if disturbed < 3 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            process.communicate(timeout=30)
            disturbed += 1
            assert process.returncode == (
                -9 if kind == signal.SIGKILL else 85
            ) or process.returncode in (0, -15, 85), seed
        else:
            assert process.returncode == 0, seed
            break
    ends = notes(tmp_path, "end")
    assert ends == Counter({f"j{number}": 1 for number in range(7)}), (seed, disturbed, ends)
    if kind == signal.SIGKILL:  # running tasks go on without the sweep, and count
        assert notes(tmp_path, "begin") == ends, seed
    assert disturbed >= 2, "too quick to be disturbed"
    began = notes(tmp_path, "begin")
    assert sweep(path, tmp_path / "out", *words)[0] == 0
    assert notes(tmp_path, "begin") == began


def test_failures(tmp_path: Path) -> None:
    """Independent tasks go on; failures are retried, except bad input and 93."""
    fails = "".join(
        f'[[job]]\nname = "{name}"\n'
        f'command = ["{{python}}", "{{here}}/fail.py", "{name}", "{{here}}", "{code}"]\n'
        for name, code in (("one", 1), ("two", 2), ("stop", 93), ("second", 1), ("requeue", 85))
    )
    missing = '[[job]]\nname = "missing"\ncommand = ["/nowhere/program"]\n'
    path = stubs(
        tmp_path,
        fails + missing + stub("j0") + stub("j1", needs='"one"') + stub("j2", needs='"j1"'),
    )
    (tmp_path / "fail.py").write_text(
        "import sys, pathlib\nname, here, code = sys.argv[1:]\nlog = pathlib.Path(here, name)\n"
        "log.write_text(log.read_text() + 'x' if log.exists() else 'x')\nprint('reason of', name)\n"
        "again = name in ('second', 'requeue') and len(log.read_text()) > 1\n"
        "sys.exit(0 if again else int(code))"
    )
    code, output = sweep(path, tmp_path / "out", "--retries", "2")
    assert code == 1, output
    tried = {
        name: len((tmp_path / name).read_text())
        for name in ("one", "two", "stop", "second", "requeue")
    }
    assert tried == {"one": 3, "two": 1, "stop": 1, "second": 2, "requeue": 2}, output
    assert notes(tmp_path, "end") == Counter(["j0"])
    summary = output[output.rindex("]") :]
    assert "failed: one: command ended with 1: reason of one" in summary
    assert "stopped: two: command ended with 2" in summary
    assert (
        "missing: command ended with 127: /nowhere/program cannot be started: No such file"
        in summary
    )
    assert "blocked: j1: needs 'one'" in summary
    assert "blocked: j2: needs 'j1'" in summary
    assert "blocked: never" in summary


def test_changes_are_refused(tmp_path: Path) -> None:
    path, out = (
        stubs(tmp_path, stub("j0") + stub("j1", needs='"j0"') + stub("j2")),
        tmp_path / "out",
    )
    assert sweep(path, out, "--only", "j*")[0] == 0
    code, output = sweep(path, out, "--only", "j*", "--set", "seconds=0.2")
    assert code == 2
    assert output.count("\n") == 1
    assert "'j0' is in" in output
    assert "--redo 'j0'" in output
    assert "2 more" in output
    code, output = sweep(path, out, "--only", "j*", "--redo", "j0")
    assert code == 0, output
    assert notes(tmp_path, "end") == Counter({"j0": 2, "j1": 2, "j2": 1}), output
    assert (out / "aside/jobs-j1-1/sweep/command.json").exists(), "what was redone is kept"
    # A damaged record is no evidence. What was made from a task that is gone has to be made again.
    (out / "jobs/j2/sweep/command.json").write_text('{"digest": ')
    assert sweep(path, out, "--only", "j2")[0] == 0
    assert notes(tmp_path, "end")["j2"] == 2
    shutil.rmtree(out / "jobs/j0")
    code, output = sweep(path, out, "--only", "j*")
    assert code == 2
    assert "'j1' is in" in output
    assert "has been made again since, or is gone" in output


def test_two_at_once(tmp_path: Path) -> None:
    path, out = stubs(tmp_path, stub("j0") + stub("j1")), tmp_path / "out"
    words = ["--only", "j*", "--set", "seconds=go"]
    first = start_sweep(path, out, *words)
    _until(lambda: notes(tmp_path, "begin")["j0"] == 1)
    code, output = sweep(path, out, *words)
    assert code == 2
    assert "is held by process" in output
    assert output.count("\n") == 1
    # A task of an array beside it works at once, but never on the same task.
    other = start_sweep(path, out, "--task", "0", *words[2:])
    assert other.stderr is not None
    lines = [other.stderr.readline() for _ in range(2)]
    assert "waiting for it" in lines[1], lines
    (tmp_path / "log-go").touch()
    for process in (first, other):
        output = process.communicate(timeout=60)[1]
        assert process.returncode == 0, output
    assert notes(tmp_path, "begin") == notes(tmp_path, "end") == Counter(["j0", "j1"])


def _until(reached: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("signals", [1, 2])
def test_shutdown_waits_for_the_children(tmp_path: Path, signals: int) -> None:
    """On the first signal they have all the time they need. The second ends them."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, sys, time\nhere = pathlib.Path(sys.argv[1])\n"
        "def save(*_):\n    (here / 'asked').touch()\n"
        "    time.sleep(1 if sys.argv[2] == '1' else 60)\n"
        "    (here / 'saved').touch()\n    sys.exit(85)\n"
        "signal.signal(signal.SIGTERM, save)\n(here / 'ready').touch()\ntime.sleep(60)\n"
    )
    path = stubs(
        tmp_path,
        '[[job]]\nname = "j"\n'
        f'command = ["{{python}}", "{{here}}/slow.py", "{{here}}", "{signals}"]\n' + stub("j1"),
    )
    process = start_sweep(path, tmp_path / "out", "--only", "j*")
    _until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGINT)
    _until((tmp_path / "asked").exists)
    if signals == 2:
        process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[1]
    assert process.returncode == 85, output
    assert "2 left to do" in output, output
    assert (tmp_path / "saved").exists() == (signals == 1), output
    assert not notes(tmp_path, "begin")


def hostile_stubs(tmp_path: Path) -> tuple[Path, Path]:
    """Write three jobs below a folder with shell characters; return sweep file and output."""
    hostile = tmp_path / "it's $(touch sentinel) `x`"
    jobs = stub("j0") + stub("j1", needs='"j0"') + stub("j2", needs='"j0"')
    return stubs(hostile, jobs), hostile / "out"


def submit_to_stub(tmp_path: Path, path: Path, out: Path) -> tuple[int, str, list[str]]:
    """Submit to an sbatch that only records its calls; return exit code, output and scripts."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(
        '#!/bin/bash\nfor last; do :; done\nprintf "%s\\n" "$last" >>"$0.calls"\necho "7;cluster"\n'
    )
    (programs / "sbatch").chmod(0o755)
    os.environ["PATH"], before = f"{programs}:{os.environ['PATH']}", os.environ["PATH"]
    try:
        code, output = sweep(path, out, "--slurm", "--only", "j*")
    finally:
        os.environ["PATH"] = before
    return code, output, (programs / "sbatch.calls").read_text().splitlines()


def test_slurm_dry_run(tmp_path: Path) -> None:
    path, out = hostile_stubs(tmp_path)
    words = [
        "--slurm",
        "--ranks",
        "2",
        "--set",
        "seconds=0",
        "--dry-run",
        "--sbatch-args",
        "--partition=a b",
    ]
    code, output = sweep(path, out, *words)
    assert code == 0, output
    assert not out.exists(), output
    lines = [line for line in output.splitlines() if line.startswith("sbatch")]
    assert [
        f"--array={numbers} " in line
        for numbers, line in zip(("0", "1-2", "3"), lines, strict=True)
    ] == [True] * 3
    assert "--dependency" not in lines[0]
    assert "--dependency=afterok:JOB1 --kill-on-invalid-dep=yes" in lines[2]
    assert "'--partition=a b'" in lines[2]
    assert "--gpus" not in output, "every run is on CPUs"
    assert "--cpus-per-task=8" in lines[2], "every run is on CPUs"
    code, output = sweep(path, out, *words[:3], "--set", "seconds=a\nb", "--dry-run")
    assert code == 2
    assert "newline" in output
    assert not list(tmp_path.rglob("sentinel"))


def test_slurm_tasks(tmp_path: Path) -> None:
    path, out = hostile_stubs(tmp_path)
    code, output = sweep(path, out, "--task", "1")
    assert code == 2
    assert "started or submitted" in output
    # Submitted to a program that only records its calls, then worked off as Slurm would.
    code, output, scripts = submit_to_stub(tmp_path, path, out)
    assert code == 0, output
    assert len(scripts) == 2, output
    assert "level-1 7" in output, output
    for script, task in ((scripts[0], "0"), (scripts[1], "2"), (scripts[1], "1")):
        done = subprocess.run(
            ["bash", script],
            cwd=tmp_path,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": task},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert notes(path.parent, "end") == Counter(["j0", "j1", "j2"])
    assert not list(tmp_path.rglob("sentinel"))
    code, output = sweep(path, out, "--task", "1", "--set", "seconds=9")
    assert code == 2
    assert "has changed since" in output
    record = json.loads((out / "jobs/j1/sweep/command.json").read_text())
    assert record["commit"]
    assert "cores" in record["machine"]
    assert len(record["inputs"]["j0"]) == 32

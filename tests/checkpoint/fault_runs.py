"""Run the program under faults. Other processes import this module."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_kd.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    read_manifest,
    seal,
    verify,
    write_file,
)
from megatron_kd.checkpoint.store import complete_steps, step_folder
from megatron_kd.checkpoint.tensors import read_metadata
from tests.helpers.tools import ROOT

HOLD = """
import sys; from pathlib import Path; from megatron_kd.storage.directory_lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1])); print("held", flush=True); input()
"""


def main(run_file: Path, *overrides: str) -> int:
    """Run the program."""
    from megatron_kd.pretrain import main as pretrain

    return pretrain(["--config", str(run_file), *overrides])


def intact_steps(run: Path) -> list[int]:
    """Return the visible steps of a run after asserting that each is what was written."""
    steps = complete_steps(run / "checkpoints")
    for step in steps:
        assert verify(step_folder(run / "checkpoints", step)) == [], (run, step)
    return steps


def state_digests(run: Path, step: int) -> dict[str, str]:
    """Return the digests of the files with the state."""
    files = read_manifest(step_folder(run / "checkpoints", step))
    return {
        name: record.sha256
        for name, record in files.items()
        if name.endswith(".distcp") or name == "common.pt"
    }


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(run_file: Path, step: int) -> None:
    """Run the program and kill it once the checkpoint of `step` is complete."""
    from megatron_kd.checkpoint.saver import Saver

    finish = Saver._finish

    def finish_and_die(self: Saver, save: Any) -> None:
        finish(self, save)
        if save.info.step == step:
            _die()

    Saver._finish = finish_and_die  # type: ignore[method-assign]
    main(run_file)


def killed_at_call(run_file: Path, number: int) -> int:
    """Run the program and kill it before a call that makes something durable or renames a file.

    `number` counts these calls from 1.
    """
    count = iter(range(1, 10**9))
    lock = threading.Lock()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            with lock:
                if next(count) == number:
                    _die()
            return real(*args, **keywords)

        return call

    os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)
    return main(run_file)


def killed_in_time(run_file: Path, seconds: float) -> int:
    """Run the program and kill it `seconds` after its first step."""
    from megatron_kd.train import loop

    step_once = loop.train_step

    def step_with_timer(run: Any) -> Any:
        if not any(thread.name == "fate" for thread in threading.enumerate()):
            timer = threading.Timer(seconds, _die)
            timer.name, timer.daemon = "fate", True
            timer.start()
        return step_once(run)

    loop.train_step = step_with_timer
    return main(run_file)


def slow_disk(
    run_file: Path, seconds: float, before_step: Callable[[int], None], *overrides: str
) -> int:
    """Run the program with a state that takes `seconds` longer to write.

    `before_step(step)` is called before each step.
    """
    from megatron_kd.checkpoint.distributed_writer import StateWriter
    from megatron_kd.train import loop

    write, step_once = StateWriter.write, loop.train_step

    def slow(self: StateWriter, report_phase: Callable[[str], None]) -> Any:
        report_phase("writing to a slow disk")
        time.sleep(seconds)
        return write(self, report_phase)

    def observed_step(run: Any) -> Any:
        before_step(run.progress.step)
        return step_once(run)

    StateWriter.write, loop.train_step = slow, observed_step  # type: ignore[method-assign]
    return main(run_file, *overrides)


def no_op(step: int) -> None:
    """Ignore the step."""


def terminate_at_5(step: int) -> None:
    """Send SIGTERM during step 5."""
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


def full_disk(run_file: Path, limit: int, *overrides: str) -> int:
    """Run the program where no file may be longer than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(run_file, *overrides)


def small_free_space(run_file: Path, checkpoint: Path, times: float) -> int:
    """Run the program where `times` the size of `checkpoint` seems to be free."""
    free = int(times * sum(path.stat().st_size for path in checkpoint.iterdir()))
    shutil.disk_usage = lambda path: SimpleNamespace(total=free, used=0, free=free)  # type: ignore[assignment, misc]
    return main(run_file)


# Runs the program where free space is reported that is gone when it is needed, as on a shared disk.
DECEIVED = """
import runpy, shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
runpy.run_module("megatron_kd.pretrain", run_name="__main__")
"""


def small_disk(
    run_file: Path, kibibytes: int, deceived: bool, directory: Path, *overrides: str
) -> tuple[int, list[int]] | None:
    """Run the program with a file system of `kibibytes` at its run directory.

    Returns:
        Exit code and complete steps; None where no file system can be mounted.
    """
    directory.mkdir(exist_ok=True)
    program = ["-c", DECEIVED] if deceived else ["-m", "megatron_kd.pretrain"]
    words = [sys.executable, *program, "--config", str(run_file), *overrides]
    verification = [
        sys.executable,
        str(ROOT / "tools/verify_checkpoint.py"),
        "--json",
        str(directory),
    ]
    script = (
        f"mount -t tmpfs -o size={kibibytes}k none {directory} || exit 77\n"
        f"{shlex.join(words)}; echo $?; {shlex.join(verification)}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    if process.returncode == 77 or not process.stdout:
        return None
    code, _, report = process.stdout.partition("\n")
    states = json.loads(report) if report.strip() else []
    assert all(result["state"] == "good" for result in states), states
    return int(code), sorted(
        int(Path(result["folder"]).name.removeprefix("step-")) for result in states
    )


def flip(path: Path) -> None:
    """Change a byte in the middle of a file; its length stays the same."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def locked_by_another(run_file: Path, directory: Path) -> tuple[int, int, int]:
    """Run the program while another process has locked its directory, and after its death.

    Returns:
        Process id of the other one, and both exit codes.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    try:
        first = main(run_file)
    finally:
        other.kill()
        other.communicate()
    return other.pid, first, main(run_file)


class Payload:
    """Create a file named `ran` when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.folder / "ran",))


def poison(folder: Path, name: str, target: Path) -> None:
    """Replace a file of the checkpoint by a pickle that runs code, with matching digests.

    With "tensors", its optimizer entries are replaced.
    """
    files = read_manifest(folder)
    if name == "path":
        content = (folder / ".metadata").read_bytes()
        (data,) = (name for name in files if name.endswith(".distcp"))
        outside_path = f"../{'x' * (len(data) - 3)}"
        assert data.encode() in content
        (folder / ".metadata").write_bytes(content.replace(data.encode(), outside_path.encode()))
        name = ".metadata"
    elif name == "common.pt":
        torch.save({"optimizer": Payload(target)}, folder / name)
    elif name == "tensors":
        entries = read_metadata(folder, setting="test").storage_data.values()
        with open(folder / "__0_0.distcp", "r+b") as stream:
            for entry in entries:
                stream.seek(entry.offset)
                stream.write(pickle.dumps(Payload(target))[: entry.length])
        name = "__0_0.distcp"
    else:
        (folder / name).write_bytes(pickle.dumps(Payload(target)))
    data = (folder / name).read_bytes()
    for file_name in (name, MANIFEST, COMMIT):
        (folder / file_name).unlink()
    seal(folder, {**files, name: write_file(folder, name, data)})
    assert verify(folder) == []


def events(run: Path) -> list[dict[str, Any]]:
    """Return the records of checkpoints.jsonl."""
    return [json.loads(line) for line in (run / "checkpoints.jsonl").read_text().splitlines()]

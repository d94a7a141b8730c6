"""What the tests of saving do in other processes, which import this module."""

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
    """The program."""
    from megatron_kd.pretrain import main as pretrain

    return pretrain(["--config", str(run_file), *overrides])


def sound_steps(run: Path) -> list[int]:
    """Steps of a run that can be seen. AssertionError where one of them is not what was written."""
    steps = complete_steps(run / "checkpoints")
    for step in steps:
        assert verify(step_folder(run / "checkpoints", step)) == [], (run, step)
    return steps


def state_of(run: Path, step: int) -> dict[str, str]:
    """Digests of the files with the state."""
    files = read_manifest(step_folder(run / "checkpoints", step))
    return {
        name: record.sha256
        for name, record in files.items()
        if name.endswith(".distcp") or name == "common.pt"
    }


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(run_file: Path, step: int) -> None:
    """The program with SIGKILL once the checkpoint of `step` is complete."""
    from megatron_kd.checkpoint.saver import Saver

    real = Saver._finish

    def fatal(self: Saver, save: Any) -> None:
        real(self, save)
        if save.info.step == step:
            _die()

    Saver._finish = fatal  # type: ignore[method-assign]
    main(run_file)


def killed_at_call(run_file: Path, number: int) -> int:
    """The program with SIGKILL before the `number`-th time that it makes something durable or gives a file its name."""
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
    """The program with SIGKILL `seconds` after its first step."""
    from megatron_kd.train import loop

    real = loop.train_step

    def noted(run: Any) -> Any:
        if not any(thread.name == "fate" for thread in threading.enumerate()):
            timer = threading.Timer(seconds, _die)
            timer.name, timer.daemon = "fate", True
            timer.start()
        return real(run)

    loop.train_step = noted
    return main(run_file)


def slow_disk(run_file: Path, seconds: float, then: Callable[[int], None], *overrides: str) -> int:
    """The program whose state takes `seconds` longer to write; `then(step)` is called before each step."""
    from megatron_kd.checkpoint.distributed_writer import StateWriter
    from megatron_kd.train import loop

    write, step_once = StateWriter.write, loop.train_step

    def slow(self: StateWriter, say: Callable[[str], None]) -> Any:
        say("writing to a slow disk")
        time.sleep(seconds)
        return write(self, say)

    def told(run: Any) -> Any:
        then(run.progress.step)
        return step_once(run)

    StateWriter.write, loop.train_step = slow, told  # type: ignore[method-assign]
    return main(run_file, *overrides)


def nothing(step: int) -> None:
    """Go on."""


def terminate_at_5(step: int) -> None:
    """SIGTERM during step 5."""
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


def full_disk(run_file: Path, limit: int, *overrides: str) -> int:
    """The program where no file may be longer than `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(run_file, *overrides)


def small_room(run_file: Path, checkpoint: Path, times: float) -> int:
    """The program where `times` the size of `checkpoint` is left, as far as anybody can ask."""
    free = int(times * sum(path.stat().st_size for path in checkpoint.iterdir()))
    shutil.disk_usage = lambda path: SimpleNamespace(total=free, used=0, free=free)  # type: ignore[assignment, misc]
    return main(run_file)


# The program where room is seen that is gone when it is needed, as on a disk that others write to.
DECEIVED = """
import runpy, shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
runpy.run_module("megatron_kd.pretrain", run_name="__main__")
"""


def small_disk(
    run_file: Path, kibibytes: int, deceived: bool, directory: Path, *overrides: str
) -> tuple[int, list[int]] | None:
    """The program with a file system of `kibibytes` at its run directory: exit code, complete steps. None where none can be mounted."""
    directory.mkdir(exist_ok=True)
    program = ["-c", DECEIVED] if deceived else ["-m", "megatron_kd.pretrain"]
    words = [sys.executable, *program, "--config", str(run_file), *overrides]
    look = [sys.executable, str(ROOT / "tools/verify_checkpoint.py"), "--json", str(directory)]
    script = f"mount -t tmpfs -o size={kibibytes}k none {directory} || exit 77\n{shlex.join(words)}; echo $?; {shlex.join(look)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode == 77 or not done.stdout:
        return None
    code, _, rest = done.stdout.partition("\n")
    states = json.loads(rest) if rest.strip() else []
    assert all(each["state"] == "good" for each in states), states
    return int(code), sorted(
        int(Path(each["folder"]).name.removeprefix("step-")) for each in states
    )


def flip(path: Path) -> None:
    """Another byte in the middle of a file, which stays as long as it was."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def held_by_another(run_file: Path, directory: Path) -> tuple[int, int, int]:
    """The program while another process holds its directory, and after that was killed: (his number, exit code, exit code)."""
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
    """Leaves a file named `ran` where it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.where / "ran",))


def poison(folder: Path, name: str, where: Path) -> None:
    """A pickle that runs something in place of a file of the checkpoint (or of its optimizer entries), its digests made right."""
    files = read_manifest(folder)
    if name == "path":
        content = (folder / ".metadata").read_bytes()
        (data,) = (name for name in files if name.endswith(".distcp"))
        other = f"../{'x' * (len(data) - 3)}"
        assert data.encode() in content
        (folder / ".metadata").write_bytes(content.replace(data.encode(), other.encode()))
        name = ".metadata"
    elif name == "common.pt":
        torch.save({"optimizer": Payload(where)}, folder / name)
    elif name == "tensors":
        entries = read_metadata(folder, what="test").storage_data.values()
        with open(folder / "__0_0.distcp", "r+b") as stream:
            for place in entries:
                stream.seek(place.offset)
                stream.write(pickle.dumps(Payload(where))[: place.length])
        name = "__0_0.distcp"
    else:
        (folder / name).write_bytes(pickle.dumps(Payload(where)))
    data = (folder / name).read_bytes()
    for each in (name, MANIFEST, COMMIT):
        (folder / each).unlink()
    seal(folder, {**files, name: write_file(folder, name, data)})
    assert verify(folder) == []


def events(run: Path) -> list[dict[str, Any]]:
    """Rows of checkpoints.jsonl."""
    return [json.loads(line) for line in (run / "checkpoints.jsonl").read_text().splitlines()]

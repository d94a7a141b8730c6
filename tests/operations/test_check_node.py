"""tools/check_node.py on processes that act as nodes: fit, unfit, and one without an answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.helpers.slurm import ROOT
from tests.helpers.text import load_tool


@pytest.fixture(scope="module")
def tool() -> types.ModuleType:
    return load_tool("check_node")


class Nodes:
    """Start ranks that are a node each, except the `missing` ones."""

    def __init__(
        self, folder: Path, world_size: int, *, missing: tuple[int, ...] = (), **options: list[str]
    ) -> None:
        folder.mkdir()
        self.exclude = folder / "exclude"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        shared |= {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "SLURM_STEP_ID": "0",
        }
        shared |= {
            "SLURM_STEP_NUM_TASKS": str(world_size),
            "SLURM_STEP_NODELIST": f"gpu-[01-{world_size:02}]",
            "SLURM_LOCALID": "0",
        }
        command = [
            sys.executable,
            str(ROOT / "tools/check_node.py"),
            "--device",
            "cpu",
            "--min-free-gb",
            "0",
            "--min-free-inodes",
            "0",
        ]
        command += ["--directory", str(folder), "--exclude-file", str(self.exclude)]
        self.processes = [
            subprocess.Popen(
                [*command, *options.get(f"rank{rank}", []), *options.get("all", [])],
                env={**shared, "SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"gpu-{rank + 1:02}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
            if rank not in missing
        ]

    def ends(self) -> tuple[set[int], str]:
        """Return exit codes and output of all nodes."""
        texts = [process.communicate(timeout=100)[0] for process in self.processes]
        return {process.returncode for process in self.processes}, "".join(texts)


def test_nodes(tmp_path: Path) -> None:
    """All ranks exit with the verdict, so that a launcher does not blame one of them."""
    fit = Nodes(tmp_path / "fit", 2)
    full = Nodes(
        tmp_path / "full", 2, rank0=["--directory", "/proc/nowhere"], rank1=["--min-free-gb", "1e9"]
    )
    silent = Nodes(tmp_path / "silent", 2, missing=(1,), all=["--timeout-seconds", "8"])
    assert fit.ends() == ({0}, "check_node: 2 ranks on 2 nodes are fit\n")
    assert fit.exclude.read_text() == ""
    codes, text = full.ends()
    assert codes == {1}, text
    assert "--exclude=gpu-01,gpu-02" in text, text
    assert full.exclude.read_text() == "gpu-01,gpu-02\n", text
    assert "gpu-02: rank 1: " in text
    assert "GB free" in text
    assert "/proc/nowhere cannot be written" in text
    codes, text = silent.ends()
    assert codes == {1}, text
    assert "no answer from rank 1 (gpu-02)" in text, text
    assert silent.exclude.read_text() == "gpu-02\n", text


def test_lists_of_nodes(tool: types.ModuleType) -> None:
    assert tool.expand("gpu[01-03,7],login") == ["gpu01", "gpu02", "gpu03", "gpu7", "login"]
    assert tool.expand("a-1") == ["a-1"]
    assert tool.expand("") == []
    assert tool.expand("n[9-11]x") == ["n9x", "n10x", "n11x"]


def test_a_clock_that_differs(tool: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a difference beyond the time of request and answer counts."""

    class Store:
        def __init__(self, clock: float) -> None:
            self.clock = clock

        def set(self, name: str, value: str) -> None:
            assert name == "ask/3"

        def get(self, name: str) -> bytes:
            return repr(self.clock).encode()

    times = iter([100.0, 104.0] * 3)
    monkeypatch.setattr(tool.time, "time", lambda: next(times))
    assert [tool._skew(Store(clock), 3) for clock in (102.0, 90.0, 110.0)] == [0.0, 10.0, 6.0]

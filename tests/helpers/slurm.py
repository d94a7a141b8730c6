"""Run Slurm on this machine: a controller, and two nodes that are processes of one host."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONF = """
ClusterName=kdtest
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Nodes that are never started: --test-only checks large jobs against them.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] \\
    CPUs=16 RealMemory=2000 Gres=gpu:8
NodeName=big[1-64] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[40001-40064] \\
    CPUs=128 RealMemory=2000 Gres=gpu:8 State=CLOUD
PartitionName=batch Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP \\
    PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=2
PartitionName=big Nodes=big[1-64] MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return what this machine lacks for a cluster, as a reason to skip, or ""."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"Slurm is missing ({', '.join(absent)}): apt-get install slurm-wlm"
    return "" if os.geteuid() == 0 else "the controller of the tests runs as root"


class Cluster:
    """Hold a cluster that runs inside a `with` block, and ends with all of its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "KD_PYTHON": sys.executable,
        }
        self.environment |= {"PYTHONPATH": str(ROOT), "KD_MIN_FREE_GB": "0.1"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        for name in ("state", "spool-node1", "spool-node2", "gpus"):
            (self.folder / name).mkdir(parents=True)
        for number in range(8):
            (self.folder / f"gpus/gpu{number}").touch()
        control, first = _free_ports(1)[0], _free_pair()
        conf = CONF.format(
            folder=self.folder, control=control, first=first, second=first + 1, user="root"
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(
            f"NodeName=node[1-2],big[1-64] Name=gpu File={self.folder}/gpus/gpu[0-7]\n"
        )
        try:
            self._start(
                "slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")]
            )
            for node in ("node1", "node2"):
                self.start_node(node)
            self.wait(
                lambda: self.ask("sinfo", "-h", "-p", "batch", "-o", "%T %D") == "idle 2",
                "both nodes idle",
                seconds=30,
            )
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(Exception):
            self.ask("scancel", "--signal=KILL", "--full", "--user=root")
            self.ask("scancel", "--user=root")
            self.wait(lambda: self.ask("squeue", "-h") == "", "an empty queue", seconds=20)
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")])

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and all tasks on it, as a power failure does."""
        import psutil

        self._processes[node].kill()
        self._processes[node].wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("SLURMD_NODENAME") == node
                    and process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                ):
                    process.kill()

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._processes[name] = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment
            )
        time.sleep(0.3)

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command of Slurm; return its stdout, or raise AssertionError with its stderr."""
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
        )
        assert process.returncode == 0, (command, process.stdout, process.stderr)
        return process.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING."""
        for word in self.ask("scontrol", "show", "job", job).split():
            if word.startswith("JobState="):
                return word.partition("=")[2]
        raise AssertionError(f"no job {job}")

    def hurry(self, job: str) -> None:
        """Shorten the two minutes that Slurm delays a requeued job to some seconds."""
        if self.state(job) == "PENDING" and self.show(job, "Restarts") != "0":
            delay = datetime.fromisoformat(self.show(job, "EligibleTime")) - datetime.now()
            if delay.total_seconds() > 10:
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def show(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        return next(
            word.partition("=")[2]
            for word in self.ask("scontrol", "show", "job", job).split()
            if word.startswith(f"{name}=")
        )

    def wait(self, condition, setting: str, *, seconds: float = 120, tell=lambda: "") -> None:  # type: ignore[no-untyped-def]
        """Wait until a condition is true; AssertionError with the text of `tell` on a timeout."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {setting}\n{tell()}"
            time.sleep(0.2)

    def wait_for(
        self, job: str, *states: str, seconds: float = 120, log: Path | None = None
    ) -> str:
        """Wait until a job is in one of these states, and return the state."""

        def tell() -> str:
            return f"{self.state(job)}\n{log.read_text() if log and log.exists() else ''}"

        def reached() -> bool:
            self.hurry(job)
            return self.state(job) in states

        self.wait(reached, f"job {job} {states}", seconds=seconds, tell=tell)
        return self.state(job)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def _free_pair() -> int:
    """Return the first of two consecutive free ports."""
    for first in _free_ports(50):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", first))
            two.bind(("127.0.0.1", first + 1))
            return first
    raise AssertionError("no two consecutive free ports")

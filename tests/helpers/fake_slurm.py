"""Run batch scripts without Slurm: programs with Slurm's names record how they are called.

They come first in PATH. srun starts what it is given; the others print what a script expects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.slurm import ROOT
from tests.helpers.slurm_site import HOSTILE

SLURM_EXAMPLES = ROOT / "examples/slurm"
_PROGRAMS = ("srun", "scontrol", "squeue", "scancel", "sleep", "python")
# Arguments that a shell would change or run if they were pasted into a command.
PAYLOADS = [
    "--a.b",
    "it's $(touch sentinel-1)",
    '";touch sentinel-2;"',
    "`touch sentinel-3`",
    "a  b *",
    "-x",
    "",
    "\\",
    "é'",
]

_PROGRAM = """
import json, os, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if name == "srun":
    while words[0].startswith("--"):
        del words[0]
    sys.exit(subprocess.run(words).returncode)
elif name == "scontrol" and words[:2] == ["show", "hostnames"]:
    print("localhost\\nnode2")
elif name == "scontrol" and words[:2] == ["show", "job"]:
    print("   StartTime=x EndTime=2200-01-01T00:00:00 Deadline=N/A")
elif name == "squeue":
    print("RUNNING")
elif name == "python" and words[0] == "tools/check_run.py":
    print(os.environ["FAKE_DIRECTORY"] + "\\n" + os.environ.get("FAKE_TOKENIZER", ""))
    sys.exit(int(os.environ.get("FAKE_CHECK", "0")))
elif name == "python" and words[0] == "tools/check_node.py":
    sys.exit(int(os.environ.get("FAKE_HEALTH", "0")))
elif name == "python" and words[0] == "tools/convert_checkpoint.py":
    sys.exit(int(os.environ.get("FAKE_EXPORT", "0")))
elif name == "python":
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        address = [os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]]
        calls.write(json.dumps(["meet", *address]) + "\\n")
    if "FAKE_STATE" in os.environ:
        content = {"state": os.environ["FAKE_STATE"], "step": int(os.environ["FAKE_STEP"])}
        content |= {"steps": 9, "time": os.urandom(4).hex()}
        content["message"] = 'say "state": "finished"\\n"state": "finished",'
        with open(os.environ["FAKE_DIRECTORY"] + "/status.json", "w") as out:
            out.write(json.dumps(content, indent=2))
    sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""


class FakeSlurm:
    """Provide a checkout, a run directory, and programs that record how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / HOSTILE
        self.folder.mkdir()
        for name in ("examples", "tools"):
            (self.folder / name).symlink_to(ROOT / name)
        programs = folder / "programs"
        programs.mkdir()
        for name in _PROGRAMS:
            (programs / name).write_text(f"#!{sys.executable} -S\n{_PROGRAM}")
            (programs / name).chmod(0o755)
        self.run, self.calls_file = "run $(touch sentinel-d)", folder / "calls"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "KD_"))
        } | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "KD_PYTHON": "python",
            "FAKE_CALLS": str(self.calls_file),
            "FAKE_DIRECTORY": self.run,
            "SLURM_JOB_ID": "50",
            "SLURM_JOB_NAME": '$(touch sentinel-n)"',
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_NTASKS": "8",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }

    def job(
        self, *words: str, script: str = "student_1b.sbatch", **environment: str
    ) -> tuple[int, str]:
        """Run a batch script; return exit code and output. Earlier calls are forgotten."""
        self.calls_file.write_text("")
        command = ["bash", str(SLURM_EXAMPLES / script), *words]
        process = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return process.returncode, process.stdout + process.stderr

    def calls(self, *begin: str) -> list[list[str]]:
        """Return the recorded calls that begin with these words."""
        calls: list[list[str]] = [
            json.loads(line) for line in self.calls_file.read_text().splitlines()
        ]
        return [words for words in calls if words[: len(begin)] == list(begin)]

    def requeued(self) -> list[str]:
        """Return the jobs that were requeued."""
        return [words[2] for words in self.calls("scontrol", "requeue")]

    def untouched(self) -> bool:
        """Return True if no value was run as a command."""
        folders = (self.folder, self.folder.parent, ROOT)
        return not [
            path
            for folder in folders
            for path in folder.iterdir()
            if path.name.startswith("sentinel")
        ]

"""Make a checkout for the jobs of a test cluster, with tiny data and small run files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.slurm import ROOT, Cluster
from tests.helpers.tiny import write_tokens
from tests.train.test_program import RATES, read_metrics

# Name of a folder that runs commands if it is pasted into a shell.
HOSTILE = 'it\'s a "site" $(touch sentinel-1);`touch sentinel-2` & b'
TWO = ["--nodes=2", "--ntasks-per-node=1"]
FOUR = ["--nodes=2", "--ntasks-per-node=2"]
NO_TEACHER: dict[str, object] = {
    "teacher__source": "none",
    "teacher__parallel__tensor": "null",
    "teacher__parallel__pipeline": "null",
}


class Checkout:
    """Provide the program, tiny data, and overrides that shrink the shipped run files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("examples", "tools", "megatron_kd"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "data").mkdir()
        tokens = write_tokens(folder / "data", tokens=60_000)
        self.small: dict[str, Any] = {
            "model.hidden_size": 32,
            "model.num_layers": 4,
            "model.num_attention_heads": 4,
            "model.num_query_groups": 2,
            "model.head_dim": 8,
            "model.ffn_hidden_size": 64,
            "model.vocab_size": 101,
            "model.vocab_size_multiple": 8,
            "data.tokenizer": "null",
            "data.train": tokens,
            "data.valid": json.dumps({"heldout": tokens}),
            "batch.global_batch_size": 4,
            "batch.micro_batch_size": 2,
            "batch.sequence_length": 24,
            "optimizer.warmup_steps": 2,
            "train.precision": "fp32",
            "train.device": "cpu",
            "train.evaluate_interval": 0,
            "train.evaluate_batches": 1,
            "train.timeout_seconds": 60,
            "checkpoint.interval": 0,
            "telemetry.log_interval": 1,
            "telemetry.tensorboard": "false",
            "telemetry.peak_tflops": 1,
        }

    def overrides(self, **more: object) -> list[str]:
        """Return the overrides as options; `a__b=1` is --a.b 1."""
        values = {**self.small, **{name.replace("__", "."): value for name, value in more.items()}}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


class Site(Checkout):
    """Run the jobs of a checkout on a test cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(folder)
        self.cluster = cluster

    def submit(
        self, script: str, options: list[str], overrides: list[str], **environment: str
    ) -> str:
        """Submit a job and return its number."""
        words = [
            "sbatch",
            "--parsable",
            "--gpus-per-node=2",
            "--cpus-per-task=1",
            *options,
            f"examples/slurm/{script}",
            *overrides,
        ]
        return self.cluster.ask(*words, cwd=self.folder, **environment)

    def log(self, job: str) -> Path:
        """Return the log file of a job."""
        return next(
            (path for path in self.folder.glob("*.log") if path.name.endswith(f"-{job}.log")),
            self.folder / f"-{job}.log",
        )

    def texts(self, array: str) -> str:
        """Return the logs of all tasks of an array."""
        return "\n".join(
            path.read_text()
            for path in sorted(self.folder.glob("*.log"))
            if f"-{array}_" in path.name
        )

    def ends(self, job: str, state: str = "COMPLETED", *, seconds: float = 200) -> str:
        """Wait for a job to end in a state, and return its log."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        reached = self.cluster.wait_for(job, *ends, seconds=seconds, log=self.log(job))
        text = self.log(job).read_text() if self.log(job).exists() else ""
        assert reached == state, f"{reached}\n{text}"
        return text

    def reaches(self, directory: str, step: int, job: str, *, seconds: float = 120) -> None:
        """Wait until a run has logged this step."""
        path = self.folder / directory / "metrics.jsonl"

        def logged() -> bool:
            self.cluster.hurry(job)
            return path.exists() and any(row["step"] >= step for row in whole_rows(path))

        self.cluster.wait(
            logged,
            f"step {step}",
            seconds=seconds,
            tell=lambda: self.log(job).read_text() if self.log(job).exists() else "",
        )

    def processes(self, job: str, program: str) -> list[psutil.Process]:
        """Return the processes of a program that srun started for a job or an array."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                names, words = process.environ(), process.cmdline()
                if (
                    names.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]
                    and "SLURM_PROCID" in names
                    and program in words
                ):
                    is_of_job = job in (names.get("SLURM_JOB_ID"), names.get("SLURM_ARRAY_JOB_ID"))
                    if (
                        is_of_job
                        and names.get("SLURM_STEP_ID", "").isdigit()
                        and Path(words[0]).name.startswith("python")
                    ):
                        processes.append(process)
        return processes

    def status(self, directory: str) -> dict[str, Any]:
        """Return the content of status.json of a run."""
        status: dict[str, Any] = json.loads((self.folder / directory / "status.json").read_text())
        return status

    def curve(self, directory: str) -> list[dict[str, Any]]:
        """Return the lines of its metrics without times and rates."""
        return [
            {k: v for k, v in row.items() if k not in RATES}
            for row in read_metrics(self.folder / directory)
        ]

    def weights(self, folder: str) -> bytes:
        """Return the weights of an exported model with one file."""
        (path,) = (self.folder / folder).glob("*.safetensors")
        return path.read_bytes()

    def untouched(self) -> None:
        """Assert that no name was run as a command."""
        folders = [
            self.folder,
            self.folder.parent,
            ROOT,
            self.cluster.folder,
            Path.home(),
            *self.cluster.folder.glob("spool-*"),
        ]
        assert [
            path
            for folder in folders
            for path in folder.iterdir()
            if path.name.startswith("sentinel")
        ] == []


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics file that may be growing."""
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]

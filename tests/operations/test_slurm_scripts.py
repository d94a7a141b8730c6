"""The Slurm scripts without Slurm: their syntax, run files, and the commands of dry runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import pytest

from megatron_kd.config import ModelSection, load_config
from megatron_kd.planning.memory import peak_rank, run_memory
from megatron_kd.planning.planned_run import PlannedRun
from tests.helpers.fake_slurm import SLURM_EXAMPLES
from tests.helpers.slurm import ROOT
from tests.helpers.slurm_site import HOSTILE, Checkout

SCRIPTS = sorted([*SLURM_EXAMPLES.glob("*.sh"), *SLURM_EXAMPLES.glob("*.sbatch")])
LLAMA_8B = ModelSection(preset="llama-3.1-8b")
LLAMA_70B = LLAMA_8B.model_copy(
    update={
        "hidden_size": 8192,
        "num_layers": 80,
        "num_attention_heads": 64,
        "ffn_hidden_size": 28672,
    }
)


def test_syntax() -> None:
    assert len(SCRIPTS) >= 14
    for script in SCRIPTS:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is missing: apt-get install shellcheck"
)
def test_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["student_1b", "student_3b", "student_7b", "teacher"])
def test_a_run_file_fits_its_ranks_and_memory(name: str) -> None:
    """On the ranks of its script, with 80 GB each, of which the framework takes some."""
    script = (SLURM_EXAMPLES / f"{name}.sbatch").read_text()
    nodes, per_node = (
        int(re.search(rf"^#SBATCH --{key}=(\d+)$", script, re.M)[1])
        for key in ("nodes", "ntasks-per-node")
    )  # type: ignore[index]
    ranks = nodes * per_node
    config = load_config(["--config", str(SLURM_EXAMPLES / f"{name}.toml")])
    assert f"{nodes} nodes of {per_node} GPUs" in (SLURM_EXAMPLES / f"{name}.toml").read_text()
    assert config.num_microbatches(ranks) >= 2 * (config.parallel.pipeline - 1)
    assert config.data_parallel_size(ranks) >= 1
    tokens = config.train.steps * config.batch.global_batch_size * config.batch.sequence_length
    assert abs(tokens / (200e9 if name == "teacher" else 100e9) - 1) < 0.01
    teacher = {"7b": LLAMA_70B, "1b": LLAMA_8B, "3b": LLAMA_8B}.get(name[-2:])
    memory = peak_rank(run_memory(PlannedRun(config, 128256, teacher), ranks))
    assert 5 * 2**30 < memory.total < 70 * 2**30, memory


def printed_command(text: str, title: str) -> list[str]:
    """Return the command that a dry run printed under a title, as a shell would read it."""
    lines = text.splitlines()
    return shlex.split(lines[lines.index(f"slurm: {title}:") + 1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("scripts") / HOSTILE)


def dry_runs(
    checkout: Checkout, jobs: list[tuple[str, list[str], dict[str, str]]]
) -> list[tuple[int, str]]:
    """Run scripts in parallel; return exit code and output of each."""
    base = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "KD_"))
    }
    base |= {"PYTHONPATH": str(ROOT), "KD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "cwd": checkout.folder,
    }
    processes = [
        subprocess.Popen(
            ["bash", f"examples/slurm/{script}", *words], env={**base, **environment}, **pipes
        )
        for script, words, environment in jobs
    ]
    return [
        (process.communicate(timeout=100)[0], process.returncode)[::-1] for process in processes
    ]


IMAGE = "it's a $(touch sentinel-7).sif"


def small_overrides(checkout: Checkout) -> list[str]:
    """Return the options of a tiny student without a teacher."""
    return checkout.overrides(
        teacher__source="none", teacher__parallel__tensor="null", teacher__parallel__pipeline="null"
    )


@pytest.fixture(scope="module")
def outputs(checkout: Checkout) -> dict[str, tuple[int, str]]:
    """Return exit code and output of a dry run of every script."""
    jobs: dict[str, tuple[str, list[str], dict[str, str]]] = {
        "student": (
            "student_7b.sbatch",
            ["--dry-run", *small_overrides(checkout), "--batch.global_batch_size", "1024"],
            {},
        ),
        "torchrun": (
            "student_7b.sbatch",
            ["--dry-run"],
            {"KD_CONTAINER": "pyxis", "KD_IMAGE": IMAGE, "KD_LAUNCHER": "torchrun"},
        ),
        "cache": ("cache.sbatch", ["--dry-run"], {"KD_CONTAINER": "apptainer", "KD_IMAGE": IMAGE}),
        "students": ("students_from_cache.sbatch", ["--dry-run"], {}),
        "evaluate": ("evaluate.sbatch", ["--dry-run"], {}),
        "pieces": ("preprocess.sbatch", ["--dry-run"], {}),
        "preprocess": ("preprocess.sh", ["--dry-run", "--nodes=1", "--", "--text-key", "it's"], {}),
        "two_phase": ("two_phase.sh", ["--dry-run"], {}),
        "chain": ("chain.sh", ["2", "examples/slurm/student_1b.sbatch", "--dry-run"], {}),
    }
    return dict(zip(jobs, dry_runs(checkout, list(jobs.values())), strict=True))


@pytest.mark.fault(14)
def test_dry_run_of_a_student(checkout: Checkout, outputs: dict[str, tuple[int, str]]) -> None:
    """Print the plan and every command."""
    code, output = outputs["student"]
    assert code == 0, output
    assert "16 nodes x 8 tasks = 128 ranks" in output, output
    assert "tensor 2 x pipeline 2 x data 32" in output, output
    training = printed_command(output, "training")
    assert training[training.index("--config") + 2 :] == [
        *small_overrides(checkout),
        "--batch.global_batch_size",
        "1024",
    ]
    assert "--ntasks=128" in training
    assert "tools/check_node.py" in printed_command(output, "health check")
    assert "exported/student-7b" in printed_command(output, "export")


@pytest.mark.fault(14)
def test_dry_run_in_a_container(checkout: Checkout, outputs: dict[str, tuple[int, str]]) -> None:
    """Print the commands even if inputs are missing."""
    code, output = outputs["torchrun"]
    words = printed_command(output, "training")
    folder = str(checkout.folder)
    assert code == 2
    assert "--ntasks=16" in words
    assert "--nproc-per-node=8" in words
    assert "teachers/llama-3.1-70b" in output
    assert {
        f"--container-image={IMAGE}",
        f"--container-mounts={folder}:{folder}",
        f"--container-workdir={folder}",
    } <= set(words)
    words = printed_command(outputs["cache"][1], "extraction")
    container_command = [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        f"{folder}:{folder}",
        "--pwd",
        folder,
        IMAGE,
        sys.executable,
        "tools/cache_teacher.py",
    ]
    assert words[words.index("apptainer") :][: len(container_command)] == container_command
    assert words[words.index("--worker") + 1] == "0"


@pytest.mark.fault(14)
def test_dry_runs_of_the_other_scripts(outputs: dict[str, tuple[int, str]]) -> None:
    """Print the commands and the dependencies of the jobs."""
    students, evaluate, pieces, preprocess, two_phase, chain = (
        outputs[name]
        for name in ("students", "evaluate", "pieces", "preprocess", "two_phase", "chain")
    )
    assert "caches/llama-3.1-70b" in printed_command(students[1], "training")
    assert "tasks" in printed_command(evaluate[1], "tasks")
    assert "runs/student-7b" in printed_command(evaluate[1], "perplexity")
    assert "--shard" in printed_command(pieces[1], "preprocessing")
    assert [code for code, _ in (evaluate, pieces, preprocess, two_phase, chain)] == [0] * 5
    assert preprocess[1].count("sbatch --parsable") == 2
    assert "afterok:0" in preprocess[1]
    assert "it\\'s" in preprocess[1]
    assert "afterok:0" in two_phase[1]
    assert chain[1].count("--dependency=singleton") == 2


@pytest.mark.fault(14)
@pytest.mark.usefixtures("outputs")
def test_dry_runs_start_nothing(checkout: Checkout) -> None:
    assert sorted(path.name for path in checkout.folder.iterdir()) == [
        "data",
        "examples",
        "megatron_kd",
        "tools",
    ]


def test_the_page_names_files_and_variables() -> None:
    """README.md has every file, and every variable that cluster.sh does not set."""
    page = (SLURM_EXAMPLES / "README.md").read_text()
    assert len(page.splitlines()) <= 120
    for path in SLURM_EXAMPLES.iterdir():
        assert f"`{path.name}`" in page or path.name == "README.md", path
    read = {name for path in SCRIPTS for name in re.findall(r"\bKD_[A-Z_]+\b", path.read_text())}
    assert {name for name in read if name not in page} == set()

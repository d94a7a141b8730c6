"""The Slurm scripts without a Slurm: their syntax, run files, what they would start, and what follows from how an attempt ends.

For the last, programs of Slurm's names stand first in PATH, note how they were called, and start what srun is given to start.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ModelSection, load_config
from megatron_kd.planning.memory import peak_rank, run_memory
from megatron_kd.planning.planned_run import PlannedRun
from tests.helpers.slurm import ROOT
from tests.helpers.slurm_site import HOSTILE, Checkout

FOLDER = ROOT / "examples/slurm"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
LLAMA_8B = ModelSection(preset="llama-3.1-8b")
LLAMA_70B = LLAMA_8B.model_copy(
    update={
        "hidden_size": 8192,
        "num_layers": 80,
        "num_attention_heads": 64,
        "ffn_hidden_size": 28672,
    }
)
NAMES = ("srun", "scontrol", "squeue", "scancel", "sleep", "python")
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

FAKE = """
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
        calls.write(json.dumps(["meet", os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]]) + "\\n")
    if "FAKE_STATE" in os.environ:
        content = {"state": os.environ["FAKE_STATE"], "step": int(os.environ["FAKE_STEP"]), "steps": 9, "time": os.urandom(4).hex()}
        content["message"] = 'say "state": "finished"\\n"state": "finished",'
        with open(os.environ["FAKE_DIRECTORY"] + "/status.json", "w") as out:
            out.write(json.dumps(content, indent=2))
    sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""


class Fake:
    """A checkout, a run directory and programs that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / HOSTILE
        self.folder.mkdir()
        for name in ("examples", "tools"):
            (self.folder / name).symlink_to(ROOT / name)
        programs = folder / "programs"
        programs.mkdir()
        for name in NAMES:
            (programs / name).write_text(f"#!{sys.executable} -S\n{FAKE}")
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
        """Exit code and output of a batch script; its calls are new."""
        self.calls_file.write_text("")
        command = ["bash", str(FOLDER / script), *words]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    def calls(self, *begin: str) -> list[list[str]]:
        """Of those that begin so."""
        found: list[list[str]] = [
            json.loads(line) for line in self.calls_file.read_text().splitlines()
        ]
        return [words for words in found if words[: len(begin)] == list(begin)]

    def requeued(self) -> list[str]:
        """What was given back to Slurm."""
        return [words[2] for words in self.calls("scontrol", "requeue")]

    def untouched(self) -> bool:
        """Nothing in a value was run."""
        places = (self.folder, self.folder.parent, ROOT)
        return not [
            path for place in places for path in place.iterdir() if path.name.startswith("sentinel")
        ]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


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
def test_a_run_file_divides_and_fits(name: str) -> None:
    """The ranks that its script asks for; 80 GB on each, of which the framework takes some."""
    script = (FOLDER / f"{name}.sbatch").read_text()
    nodes, per_node = (
        int(re.search(rf"^#SBATCH --{key}=(\d+)$", script, re.M)[1])
        for key in ("nodes", "ntasks-per-node")
    )  # type: ignore[index]
    ranks = nodes * per_node
    config = load_config(["--config", str(FOLDER / f"{name}.toml")])
    assert f"{nodes} nodes of {per_node} GPUs" in (FOLDER / f"{name}.toml").read_text()
    assert config.num_microbatches(ranks) >= 2 * (config.parallel.pipeline - 1)
    assert config.data_parallel_size(ranks) >= 1
    tokens = config.train.steps * config.batch.global_batch_size * config.batch.sequence_length
    assert abs(tokens / (200e9 if name == "teacher" else 100e9) - 1) < 0.01
    teacher = {"7b": LLAMA_70B, "1b": LLAMA_8B, "3b": LLAMA_8B}.get(name[-2:])
    memory = peak_rank(run_memory(PlannedRun(config, 128256, teacher), ranks))
    assert 5 * 2**30 < memory.total < 70 * 2**30, memory


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "requeues"),
    [
        ("finished", 143, 0, 0),  # srun's code where --kill-on-bad-exit hit a rank that was leaving
        ("requeue", 143, 85, 1),
        ("requeue", 0, 85, 1),
        ("stopped", 93, 93, 0),
        ("failed", 1, 85, 1),
        ("failed", 93, 93, 0),
        ("failed", 2, 93, 0),
        ("running", 137, 85, 1),
        (None, 0, 85, 1),  # nothing was written: nobody knows that it is finished
        (None, 85, 85, 1),
    ],
)
def test_what_follows(
    fake: Fake, state: str | None, code: int, exit_code: int, requeues: int
) -> None:
    """status.json goes before the launcher's code, but only where this attempt has written it."""
    (fake.folder / fake.run).mkdir()
    (fake.folder / fake.run / "status.json").write_text(
        json.dumps({"state": "finished", "step": 3, "message": ""}, indent=2)
    )
    environment = {} if state is None else {"FAKE_STATE": state, "FAKE_STEP": "5"}
    found, log = fake.job(
        *PAYLOADS, FAKE_CODE=str(code), FAKE_TOKENIZER="it's a tokenizer", **environment
    )
    assert (found, fake.requeued()) == (exit_code, ["50"] * requeues), log
    (training,) = fake.calls("python", "-m", "megatron_kd.pretrain")
    assert training[3:] == ["--config", "examples/slurm/student_1b.toml", *PAYLOADS]
    ranks = next(words for words in fake.calls("srun") if "megatron_kd.pretrain" in words)
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"} <= set(ranks)
    export = [
        "tools/convert_checkpoint.py",
        "to-huggingface",
        fake.run,
        "--output",
        "exported/student-1b",
        "--tokenizer",
        "it's a tokenizer",
    ]
    assert fake.calls("python", "tools/convert_checkpoint.py") == [["python", *export]] * (
        exit_code == 0
    )
    assert fake.untouched()
    assert (fake.folder / fake.run / "slurm/job-50-restart-0.log").exists()


@pytest.mark.fault(18)
def test_attempts_without_progress_end(fake: Fake) -> None:
    """Three in a row; one that came further begins the count anew; another job's do not count."""
    codes = []
    for restart, (job, step) in enumerate(
        [("49", 0), ("50", 0), ("50", 0), ("50", 4), ("50", 4), ("50", 4), ("50", 4)]
    ):
        environment = {
            "FAKE_STATE": "failed",
            "FAKE_STEP": str(step),
            "FAKE_CODE": "1",
            "SLURM_RESTART_COUNT": str(restart),
        }
        found, log = fake.job(SLURM_JOB_ID=job, **environment)
        codes.append((found, len(fake.requeued())))
    assert codes == [(85, 1)] * 6 + [(93, 0)], log
    assert "3 attempts in a row" in log
    assert fake.untouched()


def test_where_ranks_meet(fake: Fake) -> None:
    """On the first node, at a port that belongs to the job and its restart."""
    ports = []
    for job, restart in (("50", "0"), ("50", "1"), ("51", "0"), ("4294901757", "70")):
        fake.job(
            SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart, FAKE_STATE="finished", FAKE_STEP="9"
        )
        ((_, address, port),) = fake.calls("meet")
        assert address == "localhost"
        ports.append(int(port))
    assert len(set(ports)) == 4
    assert all(20000 <= port < 50000 for port in ports)


def test_other_ends(fake: Fake) -> None:
    """A bad run file stops, a check that could not be made is made again; a bad node; a failed export; KD_EXPORT=no; a task of an array."""
    assert fake.job(FAKE_CHECK="2")[0] == 93
    assert not fake.requeued()
    assert fake.job(FAKE_CHECK="1")[0] == 85
    assert fake.requeued() == ["50"]
    assert fake.job(FAKE_CHECK="1", SLURM_RESTART_COUNT="3")[0] == 93
    assert not fake.requeued()
    (fake.folder / fake.run / "slurm").mkdir(parents=True)
    (fake.folder / fake.run / "slurm/exclude").write_text("node2\n")
    code, log = fake.job(FAKE_HEALTH="1")
    assert code == 85
    assert "sbatch --exclude=node2" in log
    assert not fake.calls("python", "-m")
    finished = {"FAKE_STATE": "finished", "FAKE_STEP": "9"}
    assert fake.job(FAKE_EXPORT="1", **finished)[0] == 85
    assert fake.requeued() == ["50"]
    assert fake.job(KD_EXPORT="no", **finished)[0] == 0
    assert not fake.calls("python", "tools/convert_checkpoint.py")
    array = {
        "SLURM_ARRAY_JOB_ID": "50",
        "SLURM_ARRAY_TASK_ID": "2",
        "FAKE_STATE": "requeue",
        "FAKE_STEP": "11",
    }
    assert fake.job(script="students_from_cache.sbatch", **array)[0] == 85
    assert fake.requeued() == ["50_2"]
    code, log = fake.job(SLURM_NTASKS="6")
    assert code == 93
    assert "not --ntasks" in log
    assert not fake.calls("srun")


def test_chains(fake: Fake) -> None:
    """Its own links are left to go on, or taken out of the queue; a name left over from another chain means nothing."""
    chain = {"KD_CHAIN": "chain-1", "SLURM_JOB_NAME": "chain-1", "FAKE_STEP": "3"}
    assert fake.job(FAKE_STATE="requeue", FAKE_CODE="85", **chain)[0] == 85
    assert not fake.requeued()
    assert not fake.calls("scancel")
    assert fake.job(FAKE_STATE="finished", **chain)[0] == 0
    assert fake.calls("scancel")[0][-1] == "--name=chain-1"
    assert fake.job(FAKE_STATE="stopped", FAKE_CODE="93", **chain)[0] == 93
    assert fake.calls("scancel")[0][-1] == "--name=chain-1"
    assert fake.job(FAKE_STATE="finished", **chain)[0] == 93
    assert not fake.calls("python", "-m")
    assert fake.job(FAKE_STATE="requeue", **{**chain, "SLURM_JOB_NAME": "x"})[0] == 85
    assert fake.requeued() == ["50"]


@pytest.mark.fault(14)
def test_newlines_are_refused(fake: Fake) -> None:
    """In whatever a user can set; nothing is started."""
    cases: list[tuple[str, list[str], dict[str, str]]] = [
        ("student_1b.sbatch", ["--run.directory", "a\ntouch sentinel-4"], {}),
        *[
            ("student_1b.sbatch", [], {name: "a\nb"})
            for name in ("SLURM_JOB_NAME", "KD_PYTHON", "KD_IMAGE", "KD_EXPORTS", "KD_CONTAINER")
        ],
        ("cache.sbatch", [], {"KD_CACHE": "a\rb"}),
        ("evaluate.sbatch", [], {"KD_RUN": "a\nb"}),
        ("preprocess.sbatch", [], {"KD_HOLDOUT": "a\nb"}),
        ("two_phase.sh", ["--", "a\nb"], {}),
        ("chain.sh", ["2", "examples/slurm/student_1b.sbatch", "--comment=a\nb"], {}),
    ]
    for script, words, environment in cases:
        code, log = fake.job(*words, script=script, **environment)
        assert code == (2 if script.endswith(".sh") else 93), (
            script,
            words,
            environment,
            log,
        )
        assert "control character" in log, (
            script,
            words,
            environment,
            log,
        )
        assert not fake.calls("srun")
        assert fake.untouched()


def shown(text: str, title: str) -> list[str]:
    """The command that a dry run printed under this title, as a shell would read it."""
    lines = text.splitlines()
    return shlex.split(lines[lines.index(f"slurm: {title}:") + 1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("scripts") / HOSTILE)


def dry_runs(
    checkout: Checkout, jobs: list[tuple[str, list[str], dict[str, str]]]
) -> list[tuple[int, str]]:
    """Exit code and output of each; they run side by side."""
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
    started = [
        subprocess.Popen(
            ["bash", f"examples/slurm/{script}", *words], env={**base, **environment}, **pipes
        )
        for script, words, environment in jobs
    ]
    return [(each.communicate(timeout=100)[0], each.returncode)[::-1] for each in started]


@pytest.mark.fault(14)
def test_dry_runs(checkout: Checkout) -> None:
    """The plan and every command, word by word; nothing is started. With inputs that are not there the commands are shown all the same."""
    small = checkout.overrides(
        teacher__source="none", teacher__parallel__tensor="null", teacher__parallel__pipeline="null"
    )
    image = "it's a $(touch sentinel-7).sif"
    jobs: list[tuple[str, list[str], dict[str, str]]] = [
        ("student_7b.sbatch", ["--dry-run", *small, "--batch.global_batch_size", "1024"], {}),
        (
            "student_7b.sbatch",
            ["--dry-run"],
            {"KD_CONTAINER": "pyxis", "KD_IMAGE": image, "KD_LAUNCHER": "torchrun"},
        ),
        ("cache.sbatch", ["--dry-run"], {"KD_CONTAINER": "apptainer", "KD_IMAGE": image}),
        ("students_from_cache.sbatch", ["--dry-run"], {}),
        ("evaluate.sbatch", ["--dry-run"], {}),
        ("preprocess.sbatch", ["--dry-run"], {}),
        ("preprocess.sh", ["--dry-run", "--nodes=1", "--", "--text-key", "it's"], {}),
        ("two_phase.sh", ["--dry-run"], {}),
        ("chain.sh", ["2", "examples/slurm/student_1b.sbatch", "--dry-run"], {}),
    ]
    own, torchrun, cache, students, evaluate, pieces, preprocess, two_phase, chain = dry_runs(
        checkout, jobs
    )
    assert own[0] == 0, own
    assert "16 nodes x 8 tasks = 128 ranks" in own[1], own
    assert "tensor 2 x pipeline 2 x data 32" in own[1], own
    training = shown(own[1], "training")
    assert training[training.index("--config") + 2 :] == [
        *small,
        "--batch.global_batch_size",
        "1024",
    ]
    assert "--ntasks=128" in training
    assert "tools/check_node.py" in shown(own[1], "health check")
    assert "exported/student-7b" in shown(own[1], "export")
    words = shown(torchrun[1], "training")
    where = str(checkout.folder)
    assert torchrun[0] == 2
    assert "--ntasks=16" in words
    assert "--nproc-per-node=8" in words
    assert "teachers/llama-3.1-70b" in torchrun[1]
    assert {
        f"--container-image={image}",
        f"--container-mounts={where}:{where}",
        f"--container-workdir={where}",
    } <= set(words)
    words = shown(cache[1], "extraction")
    inside = [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        f"{where}:{where}",
        "--pwd",
        where,
        image,
        sys.executable,
        "tools/cache_teacher.py",
    ]
    assert words[words.index("apptainer") :][: len(inside)] == inside
    assert words[words.index("--worker") + 1] == "0"
    assert "caches/llama-3.1-70b" in shown(students[1], "training")
    assert "tasks" in shown(evaluate[1], "tasks")
    assert "runs/student-7b" in shown(evaluate[1], "perplexity")
    assert "--shard" in shown(pieces[1], "preprocessing")
    assert [code for code, _ in (evaluate, pieces, preprocess, two_phase, chain)] == [0] * 5
    assert preprocess[1].count("sbatch --parsable") == 2
    assert "afterok:0" in preprocess[1]
    assert "it\\'s" in preprocess[1]
    assert "afterok:0" in two_phase[1]
    assert chain[1].count("--dependency=singleton") == 2
    assert sorted(path.name for path in checkout.folder.iterdir()) == [
        "data",
        "examples",
        "megatron_kd",
        "tools",
    ]


def test_pages_name_what_is_there() -> None:
    """The table of files in README.md, and every variable that a script reads is set in cluster.sh or named there."""
    page = (FOLDER / "README.md").read_text()
    assert len(page.splitlines()) <= 120
    for path in FOLDER.iterdir():
        assert f"`{path.name}`" in page or path.name == "README.md", path
    read = {name for path in SCRIPTS for name in re.findall(r"\bKD_[A-Z_]+\b", path.read_text())}
    assert {name for name in read if name not in page} == set()

"""The shipped Slurm scripts with small overrides on a real Slurm with two nodes.

Run with pytest -m slow tests/operations. The name of the folder runs commands if it is pasted into
a shell. The short test of the plain suite is test_slurm.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.slurm import ROOT, Cluster, missing
from tests.helpers.slurm_site import FOUR, HOSTILE, NO_TEACHER, TWO, Site
from tests.helpers.text import make_tokenizers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TEACHER = "runs/it's a $(touch sentinel-t)eacher"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster(folder / "c") as cluster:
        yield Site(cluster, folder / HOSTILE)


@pytest.fixture(scope="module")
def teacher(site: Site) -> str:
    """Train a teacher with the shipped script."""
    words = site.overrides(train__steps=20, optimizer__decay_steps=5, run__directory=TEACHER)
    log = site.ends(site.submit("teacher.sbatch", FOUR, words))
    assert "4 ranks on 2 nodes are fit" in log
    assert "finished at 20" in log
    return TEACHER


@pytest.mark.fault(4)
def test_the_7b_student_through_a_preemption(site: Site, teacher: str) -> None:
    """Metrics and exported weights equal those of an undisturbed run, which torchrun starts.

    Two nodes at TP2 x PP2, with the teacher in a separate layout.
    """
    shared = site.overrides(
        train__steps=30, distill__top_k=5, teacher__checkpoint=teacher, teacher__parallel__tensor=2
    )
    name = '$(touch sentinel-3)";touch sentinel-4 `touch sentinel-5`'
    job = site.submit(
        "student_7b.sbatch",
        [*FOUR, f"--job-name={name}"],
        [*shared, "--run.directory", "runs/preempted"],
    )
    site.reaches("runs/preempted", 5, job)
    urgent = site.cluster.ask(
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "-N2",
        "--exclusive",
        "--wrap",
        "sleep 1",
        cwd=site.folder,
    )
    site.cluster.wait_for(urgent, "COMPLETED")
    log = site.ends(job)
    assert site.cluster.show(job, "Restarts") == "1", log
    assert "saved and stopped: SIGTERM requested it" in log
    assert "restart 1" in log
    assert site.status("runs/preempted")["state"] == "finished"
    logs = sorted(path.name for path in (site.folder / "runs/preempted/slurm").glob("*.log"))
    assert logs == [f"job-{job}-restart-{number}.log" for number in (0, 1)]
    config = json.loads((site.folder / "exported/student-7b/config.json").read_text())
    assert config["vocab_size"] == 101
    assert config["num_hidden_layers"] == 4
    site.untouched()

    environment = {"KD_LAUNCHER": "torchrun", "KD_LEAD_SECONDS": "60", "KD_EXPORTS": "e2"}
    log = site.ends(
        site.submit(
            "student_7b.sbatch", FOUR, [*shared, "--run.directory", "runs/alone"], **environment
        )
    )
    assert "torch.distributed.run" in log
    assert "--train.minutes" in log
    assert site.curve("runs/preempted") == site.curve("runs/alone")
    assert len(site.curve("runs/alone")) >= 30
    assert site.weights("exported/student-7b") == site.weights("e2/student-7b")


@pytest.mark.fault(4, 7)
def test_time_limit_and_node_failure(site: Site) -> None:
    """Both runs end equal to an undisturbed one; a dead node costs steps since the checkpoint."""
    shared = site.overrides(
        **NO_TEACHER, train__steps=150, checkpoint__interval=40, train__timeout_seconds=300
    )
    words = [*shared, "--run.directory", "runs/limited"]
    job = site.submit(
        "student_1b.sbatch",
        [*TWO, "--time=2", "--signal=USR1@40"],
        words,
        KD_EXPORTS="e4",
        KD_HEALTH_CHECK="no",
    )
    site.reaches("runs/limited", 10, job)
    # The signal comes late for so short a run: its tasks are suspended until it arrives.
    tasks = site.processes(job, "megatron_kd.pretrain")
    for task in tasks:
        task.suspend()
    site.ends(
        site.submit(
            "student_1b.sbatch", TWO, [*shared, "--run.directory", "runs/whole"], KD_EXPORTS="e3"
        )
    )
    site.cluster.wait(lambda: not any(is_suspended(task) for task in tasks), "SIGUSR1", seconds=150)
    for task in tasks:
        with contextlib.suppress(psutil.NoSuchProcess):
            task.resume()
    log = site.ends(job)
    assert len(tasks) == 2, log
    assert int(site.cluster.show(job, "Restarts")) >= 1, log
    assert "saved and stopped: SIGUSR1 requested it" in log, log
    assert site.curve("runs/limited") == site.curve("runs/whole")
    assert site.weights("e3/student-1b") == site.weights("e4/student-1b")

    job = site.submit(
        "student_1b.sbatch", TWO, [*shared, "--run.directory", "runs/failed"], KD_EXPORTS="e5"
    )
    site.reaches("runs/failed", 45, job)
    site.cluster.kill_node("node2")
    site.cluster.wait(
        lambda: site.cluster.show(job, "Restarts") != "0",
        "a restart",
        seconds=90,
        tell=lambda: site.log(job).read_text(),
    )
    site.cluster.start_node("node2")
    log = site.ends(job)
    assert "starts at  step 40" in log, log
    assert site.curve("runs/failed") == site.curve("runs/whole")
    assert site.weights("e3/student-1b") == site.weights("e5/student-1b")


def is_suspended(task: psutil.Process) -> bool:
    """Return True if the process is stopped and no SIGUSR1 is pending."""
    try:
        (mask,) = re.findall(
            r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{task.pid}/status").read_text(), re.M
        )
        return (
            bool(task.status() == psutil.STATUS_STOPPED)
            and not int(mask, 16) >> (signal.SIGUSR1 - 1) & 1
        )
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


@pytest.mark.fault(3)
def test_two_phases_with_a_killed_task(site: Site, teacher: str) -> None:
    """An array stores the targets, although a task is killed; an array of students follows."""
    words = site.overrides(
        teacher__checkpoint=teacher, distill__top_k=5, train__steps=6, parallel__tensor=1
    )
    words += ["--parallel.pipeline", "1", "--parallel.sequence_parallel", "false"]
    options = [
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        "--array=0-1",
    ]
    command = ["bash", "examples/slurm/two_phase.sh", *options, "--", *words]
    output = site.cluster.ask(
        *command,
        cwd=site.folder,
        KD_CACHE="it's a cache",
        KD_RUNS="r$(touch sentinel-6)",
        KD_EXPORT="no",
    )
    cache, students = (line.split()[1] for line in output.splitlines())
    site.cluster.wait(
        lambda: bool(site.processes(cache, "tools/cache_teacher.py")),
        "an extraction",
        tell=lambda: site.texts(cache),
    )
    site.processes(cache, "tools/cache_teacher.py")[0].kill()
    for task in (0, 1):
        site.ends(f"{cache}_{task}")
    assert {site.cluster.show(f"{cache}_{task}", "Restarts") for task in (0, 1)} == {"0", "1"}, (
        site.texts(cache)
    )
    for task, name in enumerate(("student_1b", "student_3b")):
        log = site.ends(f"{students}_{task}")
        assert "cached" in log
        assert site.status(f"r$(touch sentinel-6)/cached-{name}")["step"] == 6
        assert all(
            row["kd_loss"] > 0
            for row in site.curve(f"r$(touch sentinel-6)/cached-{name}")
            if "kd_loss" in row
        )
    assert not (site.folder / "exported/cached-student_1b").exists()
    site.untouched()


def test_text_and_measurement(site: Site, teacher: str) -> None:
    """An array makes token files, a job joins them, and another measures perplexity."""
    (site.folder / "corpus").mkdir()
    for number, path in enumerate(sorted((ROOT / "megatron_kd").rglob("*.py"))[:40]):
        (site.folder / f"corpus/{number}.txt").write_text(path.read_text())
    tokenizer = make_tokenizers(site.folder / "data")["huggingface"]
    options = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--array=1-2"]
    words = ["--pattern", "*.txt", "--tokenizer", str(tokenizer), "--output", "data/it's joined"]
    output = site.cluster.ask(
        "bash",
        "examples/slurm/preprocess.sh",
        *options,
        "--",
        *words,
        cwd=site.folder,
        KD_HOLDOUT="heldout=0.2",
    )
    join = output.splitlines()[1].split()[1]
    measured = site.submit(
        "evaluate.sbatch",
        TWO,
        ["--device", "cpu", "--max-sequences", "4"],
        KD_RUN=teacher,
        KD_TASKS="no",
    )
    log = site.ends(f"{join}_0")
    assert json.loads((site.folder / "data/it's joined.json").read_text())["documents"] > 30, log
    log = site.ends(measured)
    assert json.loads((site.folder / teacher / "perplexity.json").read_text()), log
    site.untouched()


@pytest.mark.fault(18)
def test_a_chain_stops(site: Site) -> None:
    """A loss that is not finite ends a chain (93); a finished run cancels the rest of it too."""
    bad = site.overrides(
        **NO_TEACHER,
        train__steps=50,
        optimizer__learning_rate=1e30,
        optimizer__min_learning_rate=1e30,
    )
    good = site.overrides(**NO_TEACHER, train__steps=5)
    for number, (words, code, state) in enumerate(
        [(bad, "93:0", "stopped"), (good, "0:0", "finished")]
    ):
        words = [*words, "--run.directory", f"runs/chain-{number}"]
        options = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        command = [
            "bash",
            "examples/slurm/chain.sh",
            "3",
            "examples/slurm/student_1b.sbatch",
            *options,
            "--",
            *words,
        ]
        output = site.cluster.ask(*command, cwd=site.folder, KD_EXPORT="no", KD_HEALTH_CHECK="no")
        first, second, third = (line.split()[-1] for line in output.splitlines())
        site.ends(first, "FAILED" if number == 0 else "COMPLETED")
        assert site.cluster.show(first, "ExitCode") == code
        assert site.status(f"runs/chain-{number}")["state"] == state
        for later in (second, third):
            assert site.cluster.wait_for(later, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
            assert not site.log(later).exists()

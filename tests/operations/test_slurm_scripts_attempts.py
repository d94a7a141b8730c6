"""The Slurm scripts without Slurm: what follows from the end of an attempt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.fake_slurm import PAYLOADS, FakeSlurm


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "requeues"),
    [
        (
            "finished",
            143,
            0,
            0,
        ),  # srun's code if --kill-on-bad-exit hits a rank that is shutting down
        ("requeue", 143, 85, 1),
        ("requeue", 0, 85, 1),
        ("stopped", 93, 93, 0),
        ("failed", 1, 85, 1),
        ("failed", 93, 93, 0),
        ("failed", 2, 93, 0),
        ("running", 137, 85, 1),
        (None, 0, 85, 1),  # nothing was written: it may not be finished
        (None, 85, 85, 1),
    ],
)
def test_exit_code_and_requeue(
    fake: FakeSlurm, state: str | None, code: int, exit_code: int, requeues: int
) -> None:
    """status.json wins over the launcher's code, but only if this attempt wrote it."""
    (fake.folder / fake.run).mkdir()
    (fake.folder / fake.run / "status.json").write_text(
        json.dumps({"state": "finished", "step": 3, "message": ""}, indent=2)
    )
    environment = {} if state is None else {"FAKE_STATE": state, "FAKE_STEP": "5"}
    result, log = fake.job(
        *PAYLOADS, FAKE_CODE=str(code), FAKE_TOKENIZER="it's a tokenizer", **environment
    )
    assert (result, fake.requeued()) == (exit_code, ["50"] * requeues), log
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
def test_attempts_without_progress_end(fake: FakeSlurm) -> None:
    """Three in a row end it; progress restarts the count; other jobs do not count."""
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
        code, log = fake.job(SLURM_JOB_ID=job, **environment)
        codes.append((code, len(fake.requeued())))
    assert codes == [(85, 1)] * 6 + [(93, 0)], log
    assert "3 attempts in a row" in log
    assert fake.untouched()


def test_rendezvous_address(fake: FakeSlurm) -> None:
    """It is the first node, with a port of its own for each job and restart."""
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


def test_failed_checks_exports_and_array_tasks(fake: FakeSlurm) -> None:
    """A bad run file stops the job; a failed check, a bad node or a failed export requeues it."""
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


def test_chains(fake: FakeSlurm) -> None:
    """The jobs of a chain continue or are cancelled; the name of another chain is ignored."""
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
def test_newlines_are_refused(fake: FakeSlurm) -> None:
    """In everything that a user can set; nothing is started."""
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

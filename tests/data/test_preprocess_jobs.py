"""Test that preprocessing jobs survive kills, full disks, concurrent runs and Slurm."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.jobs.execution import join_pieces, locked, make_share
from megatron_kd.data.preparation.jobs.slurm_execution import ignore_report
from megatron_kd.data.preparation.jobs.text_job import TextRequest, plan_text
from megatron_kd.data.token_file_checks import check_token_file
from tests.data.preprocessing import command, environment, run_process, run_tool, write_lines
from tests.helpers.text import (
    awkward_text,
    plain_encoder,
    same_tokens,
    write_as_megatron,
)
from tests.losses.cases import fresh_seed


def test_a_killed_run_resumes_to_the_same_bytes(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    rng = random.Random(fresh_seed())
    source = write_lines(tmp_path / "a.jsonl", [awkward_text(rng, 200) for _ in range(3000)])
    path = tokenizers["unigram"]
    options = ("--workers", "2", "--holdout", "valid=0.2")
    full = run_process(source, path, tmp_path / "full", *options)
    for name in ("full", "valid"):
        for ending in (".bin", ".idx"):
            os.rename(tmp_path / f"{name}{ending}", tmp_path / f"expected_{name}{ending}")
    for _ in range(2):
        process = subprocess.Popen(
            command(source, path, tmp_path / "full", *options),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(1.0, 1.5 + full["seconds"]))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        assert not killed or not list(tmp_path.glob("full.idx")) or list(tmp_path.glob("full.bin"))
    summary = run_process(source, path, tmp_path / "full", *options)
    assert same_tokens(tmp_path / "full", tmp_path / "expected_full")
    assert same_tokens(tmp_path / "valid", tmp_path / "expected_valid")
    assert summary["outputs"] == full["outputs"]
    assert not list(tmp_path.glob("*.pieces"))
    assert not list(tmp_path.glob(".*partial*"))
    assert run_process(source, path, tmp_path / "full", *options)["kept"] is True


def test_finished_pieces_of_the_same_job_are_kept(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "files"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.txt").write_text(f"document {number} " * 80_000)
    path, output = tokenizers["huggingface"], tmp_path / "out"

    def shard(text: str) -> dict[str, Any]:
        assert run_tool(source, path, output, "--shard", text) == 0
        summary: dict[str, Any] = json.loads(capsys.readouterr().out)
        return summary

    assert shard("0/2")["pieces"] == 3
    assert shard("0/2")["kept_pieces"] == 3
    assert not list(tmp_path.glob("out.[bi]*"))
    (source / "2.txt").write_text("changed " * 160_000)  # the same length
    assert shard("0/2")["kept_pieces"] == 2, "a changed input must be read again"
    (next((tmp_path / "out.pieces").glob("*4.0.ids"))).write_bytes(b"cut")
    (tmp_path / "out.pieces/piece-000001.0.ids.partial-99").write_bytes(b"left by a killed run")
    assert run_tool(source, path, output) == 0
    assert json.loads(capsys.readouterr().out)["kept_pieces"] == 2
    plain, end = plain_encoder("huggingface", path)
    write_as_megatron(
        tmp_path / "megatron",
        [file.read_text() for file in sorted(source.iterdir())],
        plain,
        end,
        1000,
    )
    assert same_tokens(output, tmp_path / "megatron")
    # Other settings, another tokenizer or other input never touch what is finished.
    for more in (["--no-append-eod"], ["--exclude", "0.txt"], ["--end-of-document", "a"]):
        assert run_tool(source, path, output, *more) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert same_tokens(output, tmp_path / "megatron")
    assert run_tool(source, path, output, "--exclude", "0.txt", "--overwrite") == 0
    assert not same_tokens(output, tmp_path / "megatron")


def test_a_full_disk_has_a_separate_exit_code(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["some words " * 400] * 600)

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    process = subprocess.run(
        command(source, tokenizers["huggingface"], tmp_path / "out/train", "--workers", "2"),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
    )
    assert process.returncode == 5, process.stderr
    assert process.stderr.startswith("preprocess_data: no space is left"), process.stderr
    assert process.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.[bi]*"))
    assert not list(tmp_path.rglob("*partial*"))
    run_process(source, tokenizers["huggingface"], tmp_path / "out/train")
    assert check_token_file(tmp_path / "out/train", vocab_size=1000).num_documents == 600


def test_two_runs_on_one_output(tokenizers: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["text"] * 10)
    tokenizer = str(tokenizers["tiktoken"])
    plan = plan_text(
        TextRequest(inputs=[str(source)], output=tmp_path / "out", tokenizer=tokenizer)
    )
    with locked(plan):
        assert run_tool(source, tokenizers["tiktoken"], tmp_path / "out") == 2
    assert "another process is making" in capsys.readouterr().err
    make_share(plan, (0, 1), 1, ignore_report)
    source.write_text(source.read_text() + "\n")
    with pytest.raises(ConfigError, match="a.jsonl changed while it was being read"):
        join_pieces(plan)


SBATCH = """#!/bin/sh
# A stand-in for Slurm: run the array tasks of the script in turn and print a job id.
for last in "$@"; do :; done
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
for task in $(seq 0 "${tasks:-0}"); do
    export SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NODEID=0 SLURM_NODELIST=localhost
    bash "$last" >>"$SBATCH_LOG" 2>&1 || exit 1
done
echo "Submitted batch job 7"
"""


def test_slurm_through_datatrove(
    tokenizers: dict[str, Path], texts: list[str], tmp_path: Path
) -> None:
    """The scripts of datatrove run under stand-ins for sbatch and srun."""
    pytest.importorskip("datatrove")
    (tmp_path / "bin").mkdir()
    srun = '#!/bin/sh\n[ "$1 $2 $3" = "-l -n 1" ] && shift 3\nexec "$@"\n'
    for name, script in (
        ("sbatch", SBATCH),
        ("srun", srun),
        ("scontrol", "#!/bin/sh\necho here\n"),
    ):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "text").mkdir()
    for number in range(3):
        write_lines(tmp_path / f"text/{number}.jsonl", texts[number::3] * 9)
    path = tokenizers["huggingface"]
    run_process(tmp_path / "text", path, tmp_path / "local", "--workers", "1")
    options = ("--executor", "slurm", "--slurm-partition", "cpu", "--tasks", "2")
    env = environment() | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SBATCH_LOG": str(tmp_path / "log"),
        "HOME": str(tmp_path),
    }
    process = subprocess.run(
        command(tmp_path / "text", path, tmp_path / "slurm", *options),
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert process.returncode == 0, process.stderr + log
    assert same_tokens(tmp_path / "local", tmp_path / "slurm"), process.stderr + log

"""The planner: its arithmetic by hand, its layouts by the program's own checks, and the tool as it is typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ConfigError, ModelSection, RunConfig, dump_toml, load_config
from megatron_kd.head.sizes import chunk_size
from megatron_kd.planning import memory as planned
from megatron_kd.planning.budget import Prices, Steps, budget
from megatron_kd.planning.flops import flops_per_token, peak_tflops
from megatron_kd.planning.hardware import GIB, GPUS, Cluster, cluster_of, known_gpu
from megatron_kd.planning.machine_rates import (
    KIND,
    bench_job,
    bench_runs,
    calibrate,
    read_calibration,
)
from megatron_kd.planning.memory import Job, fullest, run_memory
from megatron_kd.planning.search import evaluate, search
from megatron_kd.planning.shape import microbatches_in_flight
from megatron_kd.planning.step_time import Rates, step_time, student_time, teacher_time

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 512,
    "num_layers": 8,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 1536,
    "vocab_size": 32000,
}
# Round numbers: 1 TFLOP/s, 100 GB/s of memory, 10 and 1 GB/s of links.
CLUSTER = Cluster(8, 4, 64 * GIB, 1e12, 1e11, 1e10, 1e9, latency=0.0, framework=0.0)
ONLINE = {
    "teacher": {"source": "online", "checkpoint": "none"},
    "distill": {"top_k": 16, "tail": "bucket"},
}


def job_of(
    *, taught_by: dict[str, Any] | None = None, device: str = "cuda", **sections: dict[str, Any]
) -> Job:
    content: dict[str, Any] = {
        "model": SHAPE,
        "data": {"train": ["none"]},
        "batch": {"global_batch_size": 64, "micro_batch_size": 2, "sequence_length": 1024},
        "optimizer": {"learning_rate": 1e-4},
        "train": {"steps": 1},
        "run": {"directory": "none"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return Job(
        RunConfig.model_validate(content),
        32000,
        None if taught_by is None else ModelSection.model_validate(taught_by),
        device,
    )


RATES = Rates(4e11, 5e11)
TEACHER = {
    **SHAPE,
    "hidden_size": 1024,
    "num_layers": 12,
    "num_attention_heads": 16,
    "ffn_hidden_size": 4096,
}


def test_chunks_are_those_of_the_head() -> None:
    for device in ("cuda", "cpu"):
        for vocab, tokens in ((1000, 5000), (32000, 8192), (200_000, 16384)):
            job = replace(
                job_of(
                    batch={"micro_batch_size": 1, "sequence_length": tokens},
                    model={"vocab_size": vocab},
                ),
                vocab_size=vocab,
            )
            expected = chunk_size(None, vocab, tokens, on_cuda=device == "cuda")
            assert (
                planned.chunk_tokens(
                    replace(job, device=device), replace(job, device=device).student
                )
                == expected
            )


def test_states_by_hand() -> None:
    """bf16: 2 bytes of weight, 4 of gradient, 12 of main weight and moments, those over the data-parallel ranks under ZeRO-1."""
    (whole,) = run_memory(job_of(), 8)
    (shared,) = run_memory(job_of(optimizer={"distributed": True}), 8)
    count = whole.parts["weights"] / 2
    layer = 512 * (2 * 512 + 2 * 256) + 3 * 512 * 1536 + 2 * 512
    assert count == 8 * layer + 2 * 32000 * 512 + 512
    assert whole.parts["gradients"] == 4 * count
    assert whole.parts["optimizer"] == 12 * count
    assert shared.parts["optimizer"] == 12 * count / 8
    assert whole.total == sum(whole.parts.values())
    assert set(whole.parts) == set(planned.PARTS)


def test_what_saves_memory_does() -> None:
    base = fullest(run_memory(job_of(batch={"micro_batch_size": 8}), 8))
    for sections in (
        {"model": {"recompute": "full"}},
        {"parallel": {"tensor": 2}},
        {"batch": {"micro_batch_size": 4}},
    ):
        merged = {"batch": {"micro_batch_size": 8}, **sections}
        assert (
            fullest(run_memory(job_of(**merged), 8)).parts["activations"]
            < 0.7 * base.parts["activations"]
        ), sections
    split, whole = ({"tensor": 2, "sequence_parallel": on} for on in (True, False))
    assert (
        run_memory(job_of(parallel=split), 8)[0].parts["activations"]
        < run_memory(job_of(parallel=whole), 8)[0].parts["activations"]
    )


def test_microbatches_in_flight() -> None:
    """1F1B: the first stage of four holds four; interleaved as megatron-core counts its warm-up; never more than there are."""
    assert [microbatches_in_flight(4, 1, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [microbatches_in_flight(4, 2, stage, 16) for stage in range(4)] == [11, 9, 7, 5]
    assert microbatches_in_flight(8, 1, 0, 2) == 2


def test_seconds_by_hand() -> None:
    """One rank a replica: FLOPs over rate, and passes over logits."""
    job = job_of(optimizer={"distributed": False})
    parts = student_time(job, CLUSTER, RATES.student)
    tokens = 64 * 1024 / 8
    rows = planned_passes(job) * tokens * 32000 / 1e11
    assert parts["student"] == pytest.approx(
        tokens * flops_per_token(job.config.model, 32000, 1024) / RATES.student + rows
    )
    assert parts["bubble"] == pytest.approx(0, abs=1e-9)
    assert parts["tensor"] == parts["pipeline"] == 0
    count = run_memory(job, 8)[0].parts["weights"] / 2
    # Two nodes of four: each of the four members of the group in a node has a network card.
    assert parts["data"] == pytest.approx(2 * 4 * count * 7 / 8 / 4e9)


def planned_passes(job: Job) -> float:
    from megatron_kd.planning.step_time import LOSS_PASSES

    return 4.0 * LOSS_PASSES[job.device]


def test_the_bubble_of_equal_stages() -> None:
    """(p - 1) / (v m) of the work, arXiv 2104.04473; a head of nothing makes the stages equal."""
    for virtual in (1, 2):
        job = job_of(
            parallel={"pipeline": 4, "virtual_pipeline": virtual},
            model={"vocab_size": 2, "vocab_size_multiple": 2},
        )
        parts = student_time(replace(job, vocab_size=2), CLUSTER, RATES.student)
        microbatches = job.config.num_microbatches(8)
        work = parts["student"] + parts["pipeline"]
        assert parts["bubble"] == pytest.approx(work * 3 / (virtual * microbatches), rel=2e-3)


def test_sums_over_the_tensor_group() -> None:
    """Four all-reduces of [n, H] a layer and microbatch, on a CPU none of them hidden; recomputation sums twice more."""
    for recompute, sums in (("none", 4), ("full", 6)):
        job = job_of(device="cpu", parallel={"tensor": 2}, model={"recompute": recompute})
        parts = student_time(job, CLUSTER, RATES.student)
        one = 2 * (2 * 1024 * 512 * 2) / 2 / 1e10
        assert parts["tensor"] == pytest.approx(job.config.num_microbatches(8) * 8 * sums * one)
    hidden = student_time(job_of(parallel={"tensor": 2}), CLUSTER, RATES.student)["tensor"]
    assert (
        0
        < hidden
        < student_time(job_of(parallel={"tensor": 2}, device="cpu"), CLUSTER, RATES.student)[
            "tensor"
        ]
    )


def test_links() -> None:
    """Within a node its links; across nodes one network card for each member of the group in a node."""
    assert CLUSTER.bandwidth(4, 1) == 1e10
    assert CLUSTER.bandwidth(2, 2) == 1e10
    assert CLUSTER.bandwidth(8, 1) == 4e9
    assert CLUSTER.bandwidth(2, 4) == 1e9
    assert CLUSTER.nodes == 2
    assert all(peak_tflops(gpu.device) for gpu in GPUS.values())


def test_the_teachers_part() -> None:
    """A forward pass: a third of training, in a pipeline of its own."""
    job = job_of(taught_by=TEACHER, **ONLINE)
    assert job.teacher is not None
    tokens = 64 * 1024 / 8
    forward = tokens * flops_per_token(job.teacher, 32000, 1024, forward_only=True) / RATES.teacher
    assert teacher_time(job, CLUSTER, RATES.teacher, bare=True) == pytest.approx(forward)
    section = job.config.teacher.model_validate({**ONLINE["teacher"], "parallel": {"tensor": 2}})
    split = replace(job, config=job.config.model_copy(update={"teacher": section}))
    both = step_time(split, CLUSTER, RATES)
    # There: 2 teacher ranks share 16 samples; back: 8 samples of 1024 tokens of 16 ids and values of 4 bytes, log_tail and entropy.
    assert both.parts["exchange"] == pytest.approx((16 * 4 * 1028 + 8 * 1024 * (16 * 8 + 8)) / 1e9)
    assert both.seconds == pytest.approx(sum(both.parts.values()))
    assert both.parts["teacher"] > forward
    assert (
        run_memory(split, 8)[0].parts["teacher weights"]
        < 0.55 * run_memory(job, 8)[0].parts["teacher weights"]
    )


def test_search_ranks_what_the_program_would_run(tmp_path: Path) -> None:
    job = job_of(taught_by=TEACHER, **ONLINE)
    found = search(job, CLUSTER, RATES)
    seconds = [plan.time.seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    assert len(found.plans) == 40
    assert found.least is not None
    # A run file that differs from every plan in every key: what is printed must set them all.
    contrary = {
        "parallel": {
            "tensor": 4,
            "pipeline": 2,
            "virtual_pipeline": 2,
            "sequence_parallel": True,
            "overlap_grad_reduce": True,
        },
        "model": {"recompute": "full"},
        "optimizer": {"distributed": True},
        "batch": {"micro_batch_size": 4},
        "distill": ONLINE["distill"],
        "teacher": {
            **ONLINE["teacher"],
            "parallel": {"tensor": 4, "pipeline": 2},
            "micro_batch_size": 4,
        },
    }
    (tmp_path / "run.toml").write_text(dump_toml(job_of(taught_by=TEACHER, **contrary).config))
    for plan in found.plans[::7]:
        typed = load_config(["--config", str(tmp_path / "run.toml"), *plan.overrides])
        again = evaluate(replace(job, config=typed), CLUSTER, RATES)
        assert again.time.parts == plan.time.parts
        assert again.fullest.total == plan.fullest.total
        assert plan.fullest.total <= CLUSTER.memory
    # The fastest of all is at least as fast as any layout one would think of.
    for tensor, pipeline in ((1, 1), (2, 2), (4, 1)):
        given = evaluate(
            job_of(taught_by=TEACHER, parallel={"tensor": tensor, "pipeline": pipeline}, **ONLINE),
            CLUSTER,
            RATES,
        )
        assert seconds[0] <= given.time.seconds
    alone = search(job_of(), CLUSTER, RATES)
    assert alone.plans[0].time.parts["teacher"] == 0
    assert alone.plans[0].time.seconds < seconds[0]


def test_a_teacher_that_cannot_be_cut_as_it_stands() -> None:
    job = job_of(taught_by={**TEACHER, "num_layers": 13}, parallel={"pipeline": 2}, **ONLINE)
    with pytest.raises(
        ConfigError,
        match="the teacher has num_layers = 13, which 2 pipeline-parallel ranks cannot share",
    ):
        evaluate(job, CLUSTER, RATES)


def test_a_large_teacher_gets_a_layout_of_its_own() -> None:
    """70 billion weights beside a small student: more ranks a layer than the student's, because of memory alone."""
    large = {
        **TEACHER,
        "hidden_size": 8192,
        "num_layers": 80,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "ffn_hidden_size": 28672,
    }
    cluster = cluster_of(known_gpu("h100"), 16)
    best = search(job_of(taught_by=large, **ONLINE), cluster, Rates(4e14, 4e14)).plans[0]
    tensor, pipeline, _ = best.job.config.teacher_layout(16)
    assert tensor * pipeline > 1
    assert best.job.config.parallel.tensor == 1
    assert best.fullest.total < cluster.memory


def test_nothing_fits() -> None:
    with pytest.raises(
        ConfigError,
        match=r"nothing fits: .* takes \d+\.\d GiB a rank of 0\.0: take GPUs with more memory",
    ):
        search(job_of(), replace(CLUSTER, memory=GIB / 50), RATES)
    with pytest.raises(ConfigError, match="no layout of 7 ranks divides"):
        search(job_of(), replace(CLUSTER, ranks=7, gpus_per_node=7), RATES)


def test_budget_by_hand() -> None:
    """3 s with a live teacher, 1 s with a stored one, 2 s of the teacher alone: two students break even, three with dear storage."""
    steps = Steps(tokens=1000, online=3.0, teacher=2.0, cached=1.0, extraction=3.5)
    cluster = replace(CLUSTER, ranks=10, gpus_per_node=5)
    found = budget(
        steps, cluster, tokens=3.6e6, readers=2, bytes_per_token=70.0, students=4, prices=Prices()
    )
    assert (found.steps, found.online_hours, found.cached_hours, found.extraction_hours) == (
        3600,
        30,
        10,
        35,
    )
    assert found.cache_bytes == 70 * 3.6e6
    assert found.read_bandwidth == 2 * 70_000
    assert found.read_bandwidth_per_node == 70_000
    assert found.break_even == 2
    assert found.online_cost is None
    tib_months = 70 * 3.6e6 / 2**40 * 3600 * (3.5 + 4) / (30 * 86400)
    dear = Prices(2.0, 30 / tib_months)
    priced = budget(
        steps, cluster, tokens=3.6e6, readers=2, bytes_per_token=70.0, students=4, prices=dear
    )
    assert priced.online_cost == 240
    assert priced.cached_cost == pytest.approx(2 * 75 + 30)
    assert priced.break_even == 3
    slower = budget(
        replace(steps, cached=3.5),
        cluster,
        tokens=1e6,
        readers=1,
        bytes_per_token=70.0,
        students=1,
        prices=Prices(),
    )
    assert slower.break_even is None


# --- calibration --------------------------------------------------------------------------------------------------------------------------

SETTINGS = {
    **{
        "device": "auto",
        "precision": "fp32",
        "rounds": 3,
        "hidden": 256,
        "layers": 4,
        "teacher_hidden": 384,
        "teacher_layers": 6,
    },
    **{
        "vocab": 8192,
        "sequence": 256,
        "batch": 8,
        "micro_batch": 4,
        "top_k": 64,
        "tensor": 1,
        "pipeline": 1,
    },
    **{"teacher_tensor": None, "teacher_pipeline": None, "teacher_micro_batch": None},
}


def measured(rates: Rates, **changed: Any) -> dict[str, Any]:
    """A calibration file of a machine that is exactly as the model says, but for the online step, which is absurd."""
    found: dict[str, Any] = {
        "kind": KIND,
        "device": "CPU",
        "world": 2,
        "latency": 1e-4,
        "intra_bandwidth": 1e9,
        "memory_bandwidth": 2e10,
    }
    found["row_bandwidth"] = 3e9
    cluster = Cluster(
        2,
        2,
        1e12,
        1.0,
        2e10,
        1e9,
        1e9,
        latency=1e-4,
        framework=0.0,
        device="cpu",
        measured_row_bandwidth=3e9,
    )
    student = {"tensor": 1, "pipeline": 1}
    plain = bench_job(SETTINGS, {"kind": "plain", "student": student}, "cpu")
    bare = bench_job(SETTINGS, {"kind": "teacher", "student": student}, "cpu")
    seconds = {
        "plain": sum(student_time(plain, cluster, rates.student).values()),
        "teacher": teacher_time(bare, cluster, rates.teacher, bare=True),
        "online": 1e6,
    }
    result = {
        "settings": SETTINGS,
        "seconds": {
            name: {"median": value, "min": value, "max": value} for name, value in seconds.items()
        },
    }
    return {**found, "settings": SETTINGS, "runs": bench_runs(result, 2), **changed}


def test_calibration_finds_the_rates_and_leaves_the_online_run_alone() -> None:
    truth = Rates(3e10, 5e10)
    found = calibrate(measured(truth))
    assert found.rates.student == pytest.approx(truth.student, rel=1e-6)
    assert found.rates.teacher == pytest.approx(truth.teacher, rel=1e-6)
    run = {
        "kind": "online",
        "student": {"tensor": 1, "pipeline": 1},
        "teacher": {"tensor": 2, "pipeline": 1},
        "world": 2,
    }
    assert found.predict(bench_job(SETTINGS, run, "cpu")).seconds == pytest.approx(
        step_time(bench_job(SETTINGS, run, "cpu"), found.cluster, truth).seconds, rel=1e-6
    )


def test_calibrations_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='no run of kind "teacher"'):
        calibrate({**measured(RATES), "runs": measured(RATES)["runs"][:1]})
    with pytest.raises(ConfigError, match="shorter than its messages"):
        calibrate(measured(RATES, intra_bandwidth=1.0))
    for text, message in (
        ("{", "cannot be read"),
        ('{"world": 2}', "has no intra_bandwidth"),
        (json.dumps({**measured(RATES), "kind": "x"}), "is not of kind"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_calibration(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="plan.py calibrate --output"):
        read_calibration(tmp_path / "none.json")


def test_a_benchmarks_run_is_described_as_it_is_run(tmp_path: Path) -> None:
    from tools.bench_step import run_config, teacher_section, teacher_shape

    for own in (None, 2):
        arguments = Namespace(**{**SETTINGS, "teacher_tensor": own, "tensor": 2})
        real = run_config(arguments, tmp_path, "online", tensor=2, pipeline=1)
        run = {
            "kind": "online",
            "student": {"tensor": 2, "pipeline": 1},
            "teacher": own and {"tensor": own, "pipeline": None},
        }
        job = bench_job(vars(arguments), run, "cpu")
        described = job.config
        assert job.teacher == teacher_shape(arguments, real.model).model_copy(
            update={"vocab_size": 8192}
        )
        assert described.model == real.model
        assert described.batch == real.batch
        assert described.parallel == real.parallel
        assert described.teacher.parallel == teacher_section(arguments, tmp_path).parallel
        assert described.train.precision == real.train.precision
        assert described.distill.top_k == real.distill.top_k


# --- the tool -----------------------------------------------------------------------------------------------------------------------------


def plan(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/plan.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_tool(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(
        'gpus = 16\ngpu = "h100"\nprice_per_gpu_hour = 2.5\ntokens = 1e11\n'
    )
    words = [
        "--preset",
        "llama-3.2-1b",
        "--teacher-preset",
        "llama-3.1-8b",
        "--cluster",
        tmp_path / "cluster.toml",
        "--show",
        3,
    ]
    text = plan(*words, "--picture", tmp_path / "plan.png")
    assert text.returncode == 0, text.stderr
    assert "llama-3.2-1b from llama-3.1-8b on 16 x h100" in text.stdout
    assert "--parallel.tensor" in text.stdout
    assert (tmp_path / "plan.png").stat().st_size > 20_000
    found = json.loads(plan(*words, "--json").stdout)
    assert len(found["layouts"]) == 3
    assert found["budget"]["break_even"] >= 1
    first = found["layouts"][0]
    assert first["seconds"]["step"] == pytest.approx(
        sum(value for name, value in first["seconds"].items() if name != "step")
    )
    assert found["budget"]["online_cost"] == pytest.approx(2.5 * found["budget"]["online_hours"])
    assert found["budget"]["online_hours"] == pytest.approx(
        1e11 / first["tokens_per_second"] * 16 / 3600, rel=1e-3
    )
    again = json.loads(plan(*words, "--as-given", "--json", *first["overrides"]).stdout)
    assert again["layouts"][0]["seconds"] == first["seconds"]
    assert again["layouts"][0]["memory"] == first["memory"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--gpus must be at least 1"),
        (["--gpus", 8], "say which --gpu"),
        (["--gpus", 8, "--gpu", "abacus"], "--gpu abacus is not known"),
        (["--gpus", 8, "--gpu", "h100", "--mfu", 45], r"--mfu must be in \(0, 1\]"),
        (["--gpus", 8, "--gpu", "h100", "--tokens", -1], "--tokens must be above 0"),
        (["--gpus", 8, "--gpu", "h100", "--preset", "lama"], "preset"),
        (
            ["--gpus", 8, "--gpu", "h100", "--preset", "llama-3.2-1b", "--teacher-preset", "lama"],
            "teacher-preset.*did you mean",
        ),
        (["--gpus", 1, "--gpu", "l40s", "--preset", "llama-3.1-8b"], "nothing fits"),
        (
            [
                "--gpus",
                8,
                "--gpu",
                "h100",
                "--preset",
                "llama-3.2-1b",
                "--calibration",
                "none.json",
            ],
            "none.json does not exist",
        ),
        (["--cluster", "setup.py"], "--cluster setup.py cannot be read"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_bad_input_is_one_sentence(words: list[object], message: str) -> None:
    done = plan(*words)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


def test_planning_needs_no_torch() -> None:
    modules = "megatron_kd.planning.search, megatron_kd.planning.machine_rates, megatron_kd.planning.report"
    code = f"import sys; import {modules}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0

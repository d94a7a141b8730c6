"""Seconds of a step, counted by hand, and the links between ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_kd.planning.flops import flops_per_token, peak_tflops
from megatron_kd.planning.hardware import GPUS
from megatron_kd.planning.memory import run_memory
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.step_time import LOSS_PASSES, step_time, student_time, teacher_time
from tests.planning.cases import CLUSTER, ONLINE, RATES, TEACHER, planned_run


def loss_bytes_per_logit(run: PlannedRun) -> float:
    return 4.0 * LOSS_PASSES[run.device]


def test_seconds_by_hand() -> None:
    """One rank per replica: FLOPs over rate, and passes over logits."""
    run = planned_run(optimizer={"distributed": False})
    parts = student_time(run, CLUSTER, RATES.student)
    tokens = 64 * 1024 / 8
    loss_seconds = loss_bytes_per_logit(run) * tokens * 32000 / 1e11
    assert parts["student"] == pytest.approx(
        tokens * flops_per_token(run.config.model, 32000, 1024) / RATES.student + loss_seconds
    )
    assert parts["bubble"] == pytest.approx(0, abs=1e-9)
    assert parts["tensor"] == 0
    assert parts["pipeline"] == 0
    count = run_memory(run, 8)[0].parts["weights"] / 2
    # Two nodes of four: each of the four members of the group in a node has a network card.
    assert parts["data"] == pytest.approx(2 * 4 * count * 7 / 8 / 4e9)


@pytest.mark.parametrize("virtual", [1, 2])
def test_bubble_of_equal_stages(virtual: int) -> None:
    """(p - 1) / (v m) of the work, arXiv 2104.04473; a tiny head makes the stages equal."""
    run = planned_run(
        parallel={"pipeline": 4, "virtual_pipeline": virtual},
        model={"vocab_size": 2, "vocab_size_multiple": 2},
    )
    parts = student_time(replace(run, vocab_size=2), CLUSTER, RATES.student)
    microbatches = run.config.num_microbatches(8)
    work = parts["student"] + parts["pipeline"]
    assert parts["bubble"] == pytest.approx(work * 3 / (virtual * microbatches), rel=2e-3)


@pytest.mark.parametrize(("recompute", "sums"), [("none", 4), ("full", 6)])
def test_sums_over_the_tensor_group(recompute: str, sums: int) -> None:
    """Four all-reduces of [n, H] per layer and microbatch; recomputation sums twice more.

    On a CPU none of them are hidden.
    """
    run = planned_run(device="cpu", parallel={"tensor": 2}, model={"recompute": recompute})
    parts = student_time(run, CLUSTER, RATES.student)
    one_sum = 2 * (2 * 1024 * 512 * 2) / 2 / 1e10
    microbatches = run.config.num_microbatches(8)
    assert parts["tensor"] == pytest.approx(microbatches * 8 * sums * one_sum)


def test_a_gpu_hides_sums_of_the_backward_pass() -> None:
    gpu, cpu = (
        student_time(planned_run(parallel={"tensor": 2}, device=device), CLUSTER, RATES.student)
        for device in ("cuda", "cpu")
    )
    assert 0 < gpu["tensor"] < cpu["tensor"]


def test_links() -> None:
    """Across nodes, a group has one network card for each of its members in a node."""
    assert CLUSTER.bandwidth(4, 1) == 1e10
    assert CLUSTER.bandwidth(2, 2) == 1e10
    assert CLUSTER.bandwidth(8, 1) == 4e9
    assert CLUSTER.bandwidth(2, 4) == 1e9
    assert CLUSTER.nodes == 2


def test_every_gpu_has_a_peak() -> None:
    assert all(peak_tflops(gpu.device) for gpu in GPUS.values())


def test_the_teachers_forward_pass() -> None:
    run = planned_run(teacher_shape=TEACHER, **ONLINE)
    assert run.teacher is not None
    tokens = 64 * 1024 / 8
    flops = tokens * flops_per_token(run.teacher, 32000, 1024, forward_only=True)
    seconds = teacher_time(run, CLUSTER, RATES.teacher, forward_only=True)
    assert seconds == pytest.approx(flops / RATES.teacher)


def test_a_teacher_in_a_separate_layout() -> None:
    run = planned_run(teacher_shape=TEACHER, **ONLINE)
    section = run.config.teacher.model_validate({**ONLINE["teacher"], "parallel": {"tensor": 2}})
    separate = replace(run, config=run.config.model_copy(update={"teacher": section}))
    time = step_time(separate, CLUSTER, RATES)
    # To the teacher: 2 ranks share 16 samples. Back: 8 samples of 1024 tokens of 16 ids and values
    # of 4 bytes, log_tail and entropy.
    assert time.parts["exchange"] == pytest.approx((16 * 4 * 1028 + 8 * 1024 * (16 * 8 + 8)) / 1e9)
    assert time.seconds == pytest.approx(sum(time.parts.values()))
    assert time.parts["teacher"] > teacher_time(run, CLUSTER, RATES.teacher, forward_only=True)
    weights, shared_weights = (
        run_memory(planned, 8)[0].parts["teacher weights"] for planned in (separate, run)
    )
    assert weights < 0.55 * shared_weights

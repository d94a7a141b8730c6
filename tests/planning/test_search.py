"""The search of layouts, against the program's own checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ConfigError, dump_toml, load_config
from megatron_kd.planning.hardware import GIB, cluster_of, known_gpu
from megatron_kd.planning.search import SearchResult, evaluate, search
from megatron_kd.planning.step_time import ComputeRates
from tests.planning.cases import CLUSTER, ONLINE, RATES, TEACHER, planned_run

# Other values of every key that a plan sets.
CONTRARY: dict[str, Any] = {
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


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(planned_run(teacher_shape=TEACHER, **ONLINE), CLUSTER, RATES)


def test_layouts_are_ranked_by_time(result: SearchResult) -> None:
    seconds = [plan.time.seconds for plan in result.plans]
    assert seconds == sorted(seconds)
    assert len(result.plans) == 40
    assert result.smallest is not None


def test_printed_overrides_set_the_whole_layout(result: SearchResult, tmp_path: Path) -> None:
    run = planned_run(teacher_shape=TEACHER, **ONLINE)
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(planned_run(teacher_shape=TEACHER, **CONTRARY).config))
    for plan in result.plans[::7]:
        config = load_config(["--config", str(run_file), *plan.overrides])
        loaded = evaluate(replace(run, config=config), CLUSTER, RATES)
        assert loaded.time.parts == plan.time.parts
        assert loaded.peak.total == plan.peak.total
        assert plan.peak.total <= CLUSTER.memory


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2), (4, 1)])
def test_the_fastest_is_not_slower_than_plain_layouts(
    result: SearchResult, tensor: int, pipeline: int
) -> None:
    layout = {"tensor": tensor, "pipeline": pipeline}
    plain = evaluate(planned_run(teacher_shape=TEACHER, parallel=layout, **ONLINE), CLUSTER, RATES)
    assert result.plans[0].time.seconds <= plain.time.seconds


def test_a_run_without_a_teacher_is_faster(result: SearchResult) -> None:
    alone = search(planned_run(), CLUSTER, RATES)
    assert alone.plans[0].time.parts["teacher"] == 0
    assert alone.plans[0].time.seconds < result.plans[0].time.seconds


def test_a_teacher_that_the_layout_cannot_divide() -> None:
    run = planned_run(
        teacher_shape={**TEACHER, "num_layers": 13}, parallel={"pipeline": 2}, **ONLINE
    )
    with pytest.raises(
        ConfigError,
        match="the teacher has num_layers = 13, which 2 pipeline-parallel ranks cannot share",
    ):
        evaluate(run, CLUSTER, RATES)


def test_a_large_teacher_gets_a_separate_layout() -> None:
    """70 billion weights beside a small student need more ranks per layer, because of memory."""
    large = {
        **TEACHER,
        "hidden_size": 8192,
        "num_layers": 80,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "ffn_hidden_size": 28672,
    }
    cluster = cluster_of(known_gpu("h100"), 16)
    run = planned_run(teacher_shape=large, **ONLINE)
    best = search(run, cluster, ComputeRates(4e14, 4e14)).plans[0]
    tensor, pipeline, _ = best.run.config.teacher_layout(16)
    assert tensor * pipeline > 1
    assert best.run.config.parallel.tensor == 1
    assert best.peak.total < cluster.memory


def test_no_layout_fits() -> None:
    with pytest.raises(
        ConfigError,
        match=r"nothing fits: .* takes \d+\.\d GiB a rank of 0\.0: take GPUs with more memory",
    ):
        search(planned_run(), replace(CLUSTER, memory=GIB / 50), RATES)


def test_no_layout_divides_the_batch() -> None:
    with pytest.raises(ConfigError, match="no layout of 7 ranks divides"):
        search(planned_run(), replace(CLUSTER, ranks=7, gpus_per_node=7), RATES)

"""Train one run in every layout: losses of each step and final weights are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import Trained, run_all, worst_loss, worst_weight

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 20
LOSS_FP32, LOSS_BF16, WEIGHT_FP32 = 1e-5, 2e-3, 1e-4

DISTILL = {
    "alpha": 0.7,
    "top_k": 8,
    "tail": "bucket",
    "temperature": 2.0,
    "temperature_squared": True,
    "chunk_tokens": 30,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "dp2": {},
    # Four microbatches: with two, messages of the interleaved pipeline schedule cannot be swapped
    # or overwritten.
    "pp2_vp2": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "batch": {"micro_batch_size": 1},
    },
    "dp2_distributed": {"optimizer": {"distributed": True}},
    "dp2_overlap": {
        "optimizer": {"distributed": True},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "batch": {"micro_batch_size": 1},
    },
    "tp2_other_microbatches": {"parallel": {"tensor": 2}, "batch": {"micro_batch_size": 4}},
}
WIDE = {
    "tp2_pp2": {"parallel": {"tensor": 2, "pipeline": 2}},
    "tp2_sp_dp2_distributed": {
        "parallel": {"tensor": 2, "sequence_parallel": True},
        "optimizer": {"distributed": True},
    },
}
# Run with and without a teacher. The others run without one in slow tests only.
WITH_AND_WITHOUT = ("tp2_sp", "pp2_vp2")
# These run in slow tests only.
SLOW_ONLY = ("tp2", "dp2_overlap", "tp2_other_microbatches")
# Name -> layout of the first half, layout of the second half, settings of both.
RESUMED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "again_tp2_sp": ("tp2_sp", "tp2_sp", {}),
    "distributed_bf16_tp2_to_dp2": (
        "tp2",
        "dp2",
        {"optimizer": {"distributed": True}, "train": {"precision": "bf16"}},
    ),
}
RESUMED_SLOW: dict[str, tuple[str, str, dict[str, Any]]] = {
    "again_dp2_distributed": ("dp2_distributed", "dp2_distributed", {}),
    "tp2_to_vp2": ("tp2", "pp2_vp2", {}),
    "vp2_to_dp2": ("pp2_vp2", "dp2", {}),
    "distributed_dp2_to_tp2": ("dp2_distributed", "tp2", {"optimizer": {"distributed": True}}),
}
WITHIN = {"data": {"document_attention": "within"}}
# Tied embeddings, norms on queries and keys, and biases are sharded differently.
VARIANT = {"model": {"tied_embeddings": True, "qk_norm": True, "qkv_bias": True}}


class Bench:
    """Make run files that start from one common checkpoint, in a folder with data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_tokens(folder)
        self.valid = write_tokens(folder, tokens=1_500, seed=1)

    def config(
        self, name: str, *, teacher: bool, start: str | None = "common", **overrides: Any
    ) -> RunConfig:
        content: dict[str, Any] = {key: dict(value) for key, value in overrides.items()}
        content["data"] = {"valid": {"held_out": self.valid}, **content.get("data", {})}
        if start is not None:
            content["checkpoint"] = {"initialize_from": str(self.folder / start)}
        if teacher:
            content["teacher"] = {"source": "online", "checkpoint": str(self.folder / "teacher")}
            content["distill"] = DISTILL
        return tiny(self.folder / name, self.data, **content)

    def runs(self, layouts: dict[str, dict[str, Any]], *, teacher: bool) -> dict[str, RunConfig]:
        """Return the run of each layout, with or without a teacher."""
        return {
            f"{name}{'_kd' if teacher else ''}": self.config(
                f"{name}{teacher}", teacher=teacher, **overrides
            )
            for name, overrides in layouts.items()
        }

    def resumed(
        self, cases: dict[str, tuple[str, str, dict[str, Any]]]
    ) -> dict[str, tuple[RunConfig, int, bool]]:
        """Return two runs in one directory: the first half in one layout, the rest in another."""
        jobs = {}
        for name, (first, second, extra) in cases.items():
            jobs[f"{name}_first"] = (
                self.config(name, teacher=True, **merge(LAYOUTS[first], extra)),
                STEPS // 2,
                True,
            )
            jobs[f"{name}_second"] = (
                self.config(name, teacher=True, **merge(LAYOUTS[second], extra)),
                STEPS,
                False,
            )
        return jobs


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, Trained]:
    """Train on one process, and write the checkpoints that all runs start from."""
    wide_teacher = {"model": {"hidden_size": 48, "ffn_hidden_size": 96}}
    jobs = {
        "teacher": (
            bench.config("teacher", teacher=False, start=None, train={"steps": 60}, **wide_teacher),
            60,
            True,
        ),
        "common": (bench.config("common", teacher=False, start=None, train={"seed": 11}), 2, True),
    }
    for precision in ("fp32", "bf16"):
        for teacher in (False, True):
            name = f"{precision}{'_kd' if teacher else ''}"
            jobs[name] = (
                bench.config(name, teacher=teacher, train={"precision": precision}),
                STEPS,
                False,
            )
    jobs["within_kd"] = (bench.config("within", teacher=True, **WITHIN), STEPS, False)
    jobs["variant"] = (bench.config("variant", teacher=False, start=None, **VARIANT), STEPS, False)
    return dict(zip(jobs, run_ranks(run_all, 1, list(jobs.values()))[0], strict=True))


@pytest.fixture(scope="module")
def two_ranks(bench: Bench, single: dict[str, Trained]) -> dict[str, Trained]:
    """Train on two ranks, in one world, what the fast tests compare."""
    configs = bench.runs(
        {name: overrides for name, overrides in LAYOUTS.items() if name not in SLOW_ONLY},
        teacher=True,
    )
    configs |= bench.runs({name: LAYOUTS[name] for name in WITH_AND_WITHOUT}, teacher=False)
    configs["bf16_tp2_sp_kd"] = bench.config(
        "bf16_tp2_sp", teacher=True, **LAYOUTS["tp2_sp"], train={"precision": "bf16"}
    )
    configs["variant_tp2"] = bench.config(
        "variant_tp2", teacher=False, start=None, **VARIANT, **LAYOUTS["tp2"]
    )
    configs["within_tp2_sp_kd"] = bench.config(
        "within_tp2_sp", teacher=True, **LAYOUTS["tp2_sp"], **WITHIN
    )
    jobs = {name: (config, STEPS, False) for name, config in configs.items()} | bench.resumed(
        RESUMED
    )
    return dict(zip(jobs, run_ranks(run_all, 2, list(jobs.values()), timeout=500)[0], strict=True))


@pytest.fixture(scope="module")
def two_ranks_slow(bench: Bench, two_ranks: dict[str, Trained]) -> dict[str, Trained]:
    """Train on two ranks what the slow tests compare too."""
    configs = bench.runs(
        {name: overrides for name, overrides in LAYOUTS.items() if name not in WITH_AND_WITHOUT},
        teacher=False,
    )
    configs |= bench.runs({name: LAYOUTS[name] for name in SLOW_ONLY}, teacher=True)
    for name in ("pp2_vp2", "dp2_distributed"):
        configs[f"bf16_{name}_kd"] = bench.config(
            f"bf16_{name}", teacher=True, **LAYOUTS[name], train={"precision": "bf16"}
        )
    for name in ("pp2", "pp2_vp2"):
        configs[f"variant_{name}"] = bench.config(
            f"variant_{name}", teacher=False, start=None, **VARIANT, **LAYOUTS[name]
        )
    configs["within_pp2_vp2_kd"] = bench.config(
        "within_pp2_vp2", teacher=True, **LAYOUTS["pp2_vp2"], **WITHIN
    )
    jobs = {name: (config, STEPS, False) for name, config in configs.items()} | bench.resumed(
        RESUMED_SLOW
    )
    return two_ranks | dict(
        zip(jobs, run_ranks(run_all, 2, list(jobs.values()), timeout=500)[0], strict=True)
    )


def merge(layout: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {**layout.get(section, {}), **extra.get(section, {})}
        for section in {**layout, **extra}
    }


def check(result: Trained, reference: Trained, loss: float, weight: float | None) -> None:
    assert len(result.records) == STEPS
    assert all(record["updated"] for record in result.records)
    assert worst_loss(result, reference) <= loss
    norms = [
        (record["grad_norm"], other["grad_norm"])
        for record, other in zip(result.records, reference.records, strict=True)
    ]
    assert all(abs(norm / other - 1) <= 10 * loss for norm, other in norms)
    if weight is not None:
        assert worst_weight(result, reference) <= weight
    for name, value in reference.validation["held_out"].items():
        other = result.validation["held_out"][name]
        assert (value is None) == (other is None), name
        assert value is None or abs(other - value) <= 10 * loss * max(1.0, abs(value)), name


def test_training_learns_and_the_teacher_matters(single: dict[str, Trained]) -> None:
    records = single["fp32_kd"].records
    assert records[-1]["kd_loss"] < records[0]["kd_loss"]
    assert worst_weight(single["fp32"], single["fp32_kd"]) > 1e-3
    assert 0 < records[0]["teacher_mass"] < 1
    assert records[0]["teacher_entropy"] > 0
    assert 0 <= records[0]["top1_agreement"] <= 1


def fast_and_slow(fast: list[str], slow: list[str]) -> list[Any]:
    """Return the parameters of runs in fast and in slow tests, with the fixture that has them."""
    return [
        *(pytest.param(name, "two_ranks", id=name) for name in fast),
        *(pytest.param(name, "two_ranks_slow", id=name, marks=pytest.mark.slow) for name in slow),
    ]


@pytest.fixture
def runs(request: pytest.FixtureRequest, fixture: str) -> dict[str, Trained]:
    """Return the runs of the fixture that a parameter names."""
    trained: dict[str, Trained] = request.getfixturevalue(fixture)
    return trained


@pytest.mark.parametrize(
    ("layout", "fixture"),
    fast_and_slow(
        [*(f"{name}_kd" for name in LAYOUTS if name not in SLOW_ONLY), *WITH_AND_WITHOUT],
        [
            *(f"{name}_kd" for name in SLOW_ONLY),
            *(name for name in LAYOUTS if name not in WITH_AND_WITHOUT),
        ],
    ),
)
def test_two_ranks_equal_one(
    layout: str, single: dict[str, Trained], runs: dict[str, Trained]
) -> None:
    check(
        runs[layout],
        single["fp32_kd" if layout.endswith("_kd") else "fp32"],
        LOSS_FP32,
        WEIGHT_FP32,
    )


@pytest.mark.parametrize(
    ("layout", "fixture"), fast_and_slow(["tp2_sp"], ["pp2_vp2", "dp2_distributed"])
)
def test_bf16_layouts(layout: str, single: dict[str, Trained], runs: dict[str, Trained]) -> None:
    check(runs[f"bf16_{layout}_kd"], single["bf16_kd"], LOSS_BF16, None)


@pytest.mark.parametrize(("layout", "fixture"), fast_and_slow(["tp2"], ["pp2", "pp2_vp2"]))
def test_tied_head_qk_norm_and_biases(
    layout: str, single: dict[str, Trained], runs: dict[str, Trained]
) -> None:
    """Start from random weights, not from a checkpoint: every layout has the same model."""
    check(runs[f"variant_{layout}"], single["variant"], LOSS_FP32, WEIGHT_FP32)


@pytest.mark.parametrize(("layout", "fixture"), fast_and_slow(["tp2_sp"], ["pp2_vp2"]))
def test_attention_within_documents(
    layout: str, single: dict[str, Trained], runs: dict[str, Trained]
) -> None:
    check(runs[f"within_{layout}_kd"], single["within_kd"], LOSS_FP32, WEIGHT_FP32)
    assert worst_loss(single["within_kd"], single["fp32_kd"]) > 1e-3, (
        "the documents before must matter"
    )


@pytest.mark.parametrize(("name", "fixture"), fast_and_slow([*RESUMED], [*RESUMED_SLOW]))
@pytest.mark.fault(10)
def test_resume(
    name: str, single: dict[str, Trained], runs: dict[str, Trained], measured: Callable[[str], None]
) -> None:
    first, second, extra = (RESUMED | RESUMED_SLOW)[name]
    first_half, second_half = runs[f"{name}_first"], runs[f"{name}_second"]
    assert [record["step"] for record in first_half.records + second_half.records] == list(
        range(1, STEPS + 1)
    )
    precision = extra.get("train", {}).get("precision", "fp32")
    measured(
        f"{first} to {second}, {precision}: "
        f"{worst_loss(second_half, single[f'{precision}_kd']):.0e}"
    )
    if first == second:
        # In one layout the interrupted run is bit-identical to the uninterrupted one.
        uninterrupted = runs[f"{first}_kd"]
        assert first_half.records + second_half.records == uninterrupted.records
        assert worst_weight(second_half, uninterrupted) == 0.0
    elif precision == "fp32":
        assert worst_loss(second_half, single["fp32_kd"]) <= LOSS_FP32
        assert worst_weight(second_half, single["fp32_kd"]) <= WEIGHT_FP32
    else:
        assert worst_loss(second_half, single["bf16_kd"]) <= LOSS_BF16


@pytest.mark.slow
def test_four_ranks_equal_one(bench: Bench, single: dict[str, Trained]) -> None:
    configs = bench.runs(WIDE, teacher=True) | bench.runs(
        {"tp2_pp2": WIDE["tp2_pp2"]}, teacher=False
    )
    results = dict(
        zip(
            configs,
            run_ranks(run_all, 4, [(c, STEPS, False) for c in configs.values()], timeout=500)[0],
            strict=True,
        )
    )
    for name, trained in results.items():
        check(
            trained, single["fp32_kd" if name.endswith("_kd") else "fp32"], LOSS_FP32, WEIGHT_FP32
        )

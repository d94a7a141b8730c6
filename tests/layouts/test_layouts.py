"""One run, every layout: the same losses at each step and the same weights at the end, from one common checkpoint."""

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
    # Four microbatches: with two, messages of the interleaved schedule cannot be swapped or overwritten.
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
# With a teacher and without; the others with one only, and in the longer tests without.
BOTH_WAYS = ("tp2_sp", "pp2_vp2")
# In the longer tests alone, with a teacher too.
RARE = ("tp2", "dp2_overlap", "tp2_other_microbatches")
# Name: layout of the first half, layout of the second, and what both have in common.
RESUMED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "again_tp2_sp": ("tp2_sp", "tp2_sp", {}),
    "distributed_bf16_tp2_to_dp2": (
        "tp2",
        "dp2",
        {"optimizer": {"distributed": True}, "train": {"precision": "bf16"}},
    ),
}
LATER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "again_dp2_distributed": ("dp2_distributed", "dp2_distributed", {}),
    "tp2_to_vp2": ("tp2", "pp2_vp2", {}),
    "vp2_to_dp2": ("pp2_vp2", "dp2", {}),
    "distributed_dp2_to_tp2": ("dp2_distributed", "tp2", {"optimizer": {"distributed": True}}),
}
WITHIN = {"data": {"document_attention": "within"}}
# Tied head, norms on queries and keys, biases: what shards in other ways.
VARIANT = {"model": {"tied_embeddings": True, "qk_norm": True, "qkv_bias": True}}


class Bench:
    """A folder with data, a trained teacher and one common student checkpoint, and the configs of runs that start from it."""

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
        """Each layout with or without a teacher."""
        return {
            f"{name}{'_kd' if teacher else ''}": self.config(
                f"{name}{teacher}", teacher=teacher, **over
            )
            for name, over in layouts.items()
        }

    def resumed(
        self, cases: dict[str, tuple[str, str, dict[str, Any]]]
    ) -> dict[str, tuple[RunConfig, int, bool]]:
        """The same directory twice: half of the run in one layout, saved, and the rest in another process's shape."""
        jobs = {}
        for name, (first, then, extra) in cases.items():
            jobs[f"{name}_first"] = (
                self.config(name, teacher=True, **merged(LAYOUTS[first], extra)),
                STEPS // 2,
                True,
            )
            jobs[f"{name}_then"] = (
                self.config(name, teacher=True, **merged(LAYOUTS[then], extra)),
                STEPS,
                False,
            )
        return jobs


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, Trained]:
    """The runs on one process, and the checkpoints everything starts from."""
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
def pair(bench: Bench, single: dict[str, Trained]) -> dict[str, Trained]:
    """What the plain suite runs on two ranks, in one world."""
    configs = bench.runs(
        {name: over for name, over in LAYOUTS.items() if name not in RARE}, teacher=True
    )
    configs |= bench.runs({name: LAYOUTS[name] for name in BOTH_WAYS}, teacher=False)
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
def more(bench: Bench, pair: dict[str, Trained]) -> dict[str, Trained]:
    """And what the longer tests do besides."""
    configs = bench.runs(
        {name: over for name, over in LAYOUTS.items() if name not in BOTH_WAYS}, teacher=False
    )
    configs |= bench.runs({name: LAYOUTS[name] for name in RARE}, teacher=True)
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
    jobs = {name: (config, STEPS, False) for name, config in configs.items()} | bench.resumed(LATER)
    return pair | dict(
        zip(jobs, run_ranks(run_all, 2, list(jobs.values()), timeout=500)[0], strict=True)
    )


def merged(layout: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {**layout.get(section, {}), **extra.get(section, {})}
        for section in {**layout, **extra}
    }


def check(found: Trained, wanted: Trained, loss: float, weight: float | None) -> None:
    assert len(found.rows) == STEPS
    assert all(row["updated"] for row in found.rows)
    assert worst_loss(found, wanted) <= loss
    norms = [
        (row["grad_norm"], other["grad_norm"])
        for row, other in zip(found.rows, wanted.rows, strict=True)
    ]
    assert all(abs(here / there - 1) <= 10 * loss for here, there in norms)
    if weight is not None:
        assert worst_weight(found, wanted) <= weight
    for name, value in wanted.validation["held_out"].items():
        other = found.validation["held_out"][name]
        assert (value is None) == (other is None), name
        assert value is None or abs(other - value) <= 10 * loss * max(1.0, abs(value)), name


def test_training_learns_and_the_teacher_matters(single: dict[str, Trained]) -> None:
    rows = single["fp32_kd"].rows
    assert rows[-1]["kd_loss"] < rows[0]["kd_loss"]
    assert worst_weight(single["fp32"], single["fp32_kd"]) > 1e-3
    assert 0 < rows[0]["teacher_mass"] < 1
    assert rows[0]["teacher_entropy"] > 0
    assert 0 <= rows[0]["top1_agreement"] <= 1


def in_turn(plain: list[str], later: list[str]) -> list[Any]:
    """Names of the plain suite's runs, and those of the longer tests."""
    return [
        *(pytest.param(name, "pair", id=name) for name in plain),
        *(pytest.param(name, "more", id=name, marks=pytest.mark.slow) for name in later),
    ]


@pytest.fixture
def runs(request: pytest.FixtureRequest, where: str) -> dict[str, Trained]:
    """The runs that a name is among."""
    found: dict[str, Trained] = request.getfixturevalue(where)
    return found


@pytest.mark.parametrize(
    ("layout", "where"),
    in_turn(
        [*(f"{name}_kd" for name in LAYOUTS if name not in RARE), *BOTH_WAYS],
        [*(f"{name}_kd" for name in RARE), *(name for name in LAYOUTS if name not in BOTH_WAYS)],
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


@pytest.mark.parametrize(("layout", "where"), in_turn(["tp2_sp"], ["pp2_vp2", "dp2_distributed"]))
def test_bf16_layouts(layout: str, single: dict[str, Trained], runs: dict[str, Trained]) -> None:
    check(runs[f"bf16_{layout}_kd"], single["bf16_kd"], LOSS_BF16, None)


@pytest.mark.parametrize(("layout", "where"), in_turn(["tp2"], ["pp2", "pp2_vp2"]))
def test_tied_head_qk_norm_and_biases(
    layout: str, single: dict[str, Trained], runs: dict[str, Trained]
) -> None:
    """Started from weights drawn by name, not from a checkpoint: the same model in every layout."""
    check(runs[f"variant_{layout}"], single["variant"], LOSS_FP32, WEIGHT_FP32)


@pytest.mark.parametrize(("layout", "where"), in_turn(["tp2_sp"], ["pp2_vp2"]))
def test_attention_within_documents(
    layout: str, single: dict[str, Trained], runs: dict[str, Trained]
) -> None:
    check(runs[f"within_{layout}_kd"], single["within_kd"], LOSS_FP32, WEIGHT_FP32)
    assert worst_loss(single["within_kd"], single["fp32_kd"]) > 1e-3, (
        "the documents in front must matter"
    )


@pytest.mark.parametrize(("name", "where"), in_turn([*RESUMED], [*LATER]))
@pytest.mark.fault(10)
def test_resume(
    name: str, single: dict[str, Trained], runs: dict[str, Trained], measured: Callable[[str], None]
) -> None:
    first, then, extra = (RESUMED | LATER)[name]
    begun, ended = runs[f"{name}_first"], runs[f"{name}_then"]
    assert [row["step"] for row in begun.rows + ended.rows] == list(range(1, STEPS + 1))
    precision = extra.get("train", {}).get("precision", "fp32")
    measured(f"{first} to {then}, {precision}: {worst_loss(ended, single[f'{precision}_kd']):.0e}")
    if first == then:
        # The same layout: the interrupted run is the uninterrupted one, to the bit.
        whole = runs[f"{first}_kd"]
        assert begun.rows + ended.rows == whole.rows
        assert worst_weight(ended, whole) == 0.0
    elif precision == "fp32":
        assert worst_loss(ended, single["fp32_kd"]) <= LOSS_FP32
        assert worst_weight(ended, single["fp32_kd"]) <= WEIGHT_FP32
    else:
        assert worst_loss(ended, single["bf16_kd"]) <= LOSS_BF16


@pytest.mark.slow
def test_four_ranks_equal_one(bench: Bench, single: dict[str, Trained]) -> None:
    configs = bench.runs(WIDE, teacher=True) | bench.runs(
        {"tp2_pp2": WIDE["tp2_pp2"]}, teacher=False
    )
    found = dict(
        zip(
            configs,
            run_ranks(run_all, 4, [(c, STEPS, False) for c in configs.values()], timeout=500)[0],
            strict=True,
        )
    )
    for name, trained in found.items():
        check(
            trained, single["fp32_kd" if name.endswith("_kd") else "fp32"], LOSS_FP32, WEIGHT_FP32
        )

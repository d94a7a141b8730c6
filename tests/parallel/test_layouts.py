"""One run, every layout: the same losses at each step and the same weights at the end, from one common checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.parallel.layouts import Trained, run_all, worst_loss, worst_weight

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 20
LOSS_FP32, LOSS_BF16, WEIGHT_FP32 = 1e-5, 2e-3, 1e-4

DISTILL = {"alpha": 0.7, "top_k": 8, "tail": "bucket", "temperature": 2.0, "temperature_squared": True, "chunk_tokens": 30}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "dp2": {},
    # Four microbatches: with two, messages of the interleaved schedule cannot be swapped or overwritten.
    "pp2_vp2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "batch": {"micro_batch_size": 1}},
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
    "tp2_sp_dp2_distributed": {"parallel": {"tensor": 2, "sequence_parallel": True}, "optimizer": {"distributed": True}},
}
# Name: layout of the first half, layout of the second, and what both have in common.
RESUMED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "again_tp2_sp": ("tp2_sp", "tp2_sp", {}),
    "again_dp2_distributed": ("dp2_distributed", "dp2_distributed", {}),
    "tp2_to_vp2": ("tp2", "pp2_vp2", {}),
    "vp2_to_dp2": ("pp2_vp2", "dp2", {}),
    "distributed_dp2_to_tp2": ("dp2_distributed", "tp2", {"optimizer": {"distributed": True}}),
    "distributed_bf16_tp2_to_dp2": ("tp2", "dp2", {"optimizer": {"distributed": True}, "train": {"precision": "bf16"}}),
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

    def config(self, name: str, *, teacher: bool, start: str | None = "common", **overrides: Any) -> RunConfig:
        content: dict[str, Any] = {key: dict(value) for key, value in overrides.items()}
        content["data"] = {"valid": {"held_out": self.valid}, **content.get("data", {})}
        if start is not None:
            content["checkpoint"] = {"initialize_from": str(self.folder / start)}
        if teacher:
            content["teacher"] = {"source": "online", "checkpoint": str(self.folder / "teacher")}
            content["distill"] = DISTILL
        return tiny(self.folder / name, self.data, **content)

    def pairs(self, layouts: dict[str, dict[str, Any]]) -> dict[str, RunConfig]:
        """Each layout without and with a teacher."""
        return {
            f"{name}{'_kd' if teacher else ''}": self.config(f"{name}{teacher}", teacher=teacher, **over)
            for name, over in layouts.items()
            for teacher in (False, True)
        }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, Trained]:
    """The runs on one process, and the checkpoints everything starts from."""
    wide_teacher = {"model": {"hidden_size": 48, "ffn_hidden_size": 96}}
    jobs = {
        "teacher": (bench.config("teacher", teacher=False, start=None, train={"steps": 60}, **wide_teacher), 60, True),
        "common": (bench.config("common", teacher=False, start=None, train={"seed": 11}), 2, True),
    }
    for precision in ("fp32", "bf16"):
        for teacher in (False, True):
            name = f"{precision}{'_kd' if teacher else ''}"
            jobs[name] = (bench.config(name, teacher=teacher, train={"precision": precision}), STEPS, False)
    jobs["within_kd"] = (bench.config("within", teacher=True, **WITHIN), STEPS, False)
    jobs["variant"] = (bench.config("variant", teacher=False, start=None, **VARIANT), STEPS, False)
    return dict(zip(jobs, run_ranks(run_all, 1, list(jobs.values()))[0], strict=True))


@pytest.fixture(scope="module")
def pair(bench: Bench, single: dict[str, Trained]) -> dict[str, Trained]:
    """Everything that needs two ranks, in one world."""
    configs = bench.pairs(LAYOUTS)
    bf16 = {"train": {"precision": "bf16"}}
    for name in ("tp2_sp", "pp2_vp2", "dp2_distributed"):
        configs[f"bf16_{name}_kd"] = bench.config(f"bf16_{name}", teacher=True, **LAYOUTS[name], **bf16)
    for name in ("tp2", "pp2", "pp2_vp2"):
        configs[f"variant_{name}"] = bench.config(f"variant_{name}", teacher=False, start=None, **VARIANT, **LAYOUTS[name])
    for name in ("tp2_sp", "pp2_vp2"):
        configs[f"within_{name}_kd"] = bench.config(f"within_{name}", teacher=True, **LAYOUTS[name], **WITHIN)
    jobs = {name: (config, STEPS, False) for name, config in configs.items()}
    for name, (first, then, extra) in RESUMED.items():
        # The same directory twice: half of the run in one layout, saved, and the rest in another process's shape.
        jobs[f"{name}_first"] = (bench.config(name, teacher=True, **merged(LAYOUTS[first], extra)), STEPS // 2, True)
        jobs[f"{name}_then"] = (bench.config(name, teacher=True, **merged(LAYOUTS[then], extra)), STEPS, False)
    return dict(zip(jobs, run_ranks(run_all, 2, list(jobs.values()), timeout=500)[0], strict=True))


def merged(layout: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return {section: {**layout.get(section, {}), **extra.get(section, {})} for section in {**layout, **extra}}


def check(found: Trained, wanted: Trained, loss: float, weight: float | None) -> None:
    assert len(found.rows) == STEPS and all(row["updated"] for row in found.rows)
    assert worst_loss(found, wanted) <= loss
    norms = [(row["grad_norm"], other["grad_norm"]) for row, other in zip(found.rows, wanted.rows, strict=True)]
    assert all(abs(here / there - 1) <= 10 * loss for here, there in norms)
    if weight is not None:
        assert worst_weight(found, wanted) <= weight
    for name, value in wanted.validation["held_out"].items():
        other = found.validation["held_out"][name]
        assert (value is None) == (other is None) and (value is None or abs(other - value) <= 10 * loss * max(1.0, abs(value))), name


def test_training_learns_and_the_teacher_matters(single: dict[str, Trained]) -> None:
    rows = single["fp32_kd"].rows
    assert rows[-1]["kd_loss"] < rows[0]["kd_loss"]
    assert worst_weight(single["fp32"], single["fp32_kd"]) > 1e-3
    assert 0 < rows[0]["teacher_mass"] < 1 and rows[0]["teacher_entropy"] > 0 and 0 <= rows[0]["top1_agreement"] <= 1


@pytest.mark.parametrize("teacher", ["", "_kd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(layout: str, teacher: str, single: dict[str, Trained], pair: dict[str, Trained]) -> None:
    check(pair[layout + teacher], single["fp32" + teacher], LOSS_FP32, WEIGHT_FP32)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_vp2", "dp2_distributed"])
def test_bf16_layouts(layout: str, single: dict[str, Trained], pair: dict[str, Trained]) -> None:
    check(pair[f"bf16_{layout}_kd"], single["bf16_kd"], LOSS_BF16, None)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2_vp2"])
def test_tied_head_qk_norm_and_biases(layout: str, single: dict[str, Trained], pair: dict[str, Trained]) -> None:
    """Started from weights drawn by name, not from a checkpoint: the same model in every layout."""
    check(pair[f"variant_{layout}"], single["variant"], LOSS_FP32, WEIGHT_FP32)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2_vp2"])
def test_attention_within_documents(layout: str, single: dict[str, Trained], pair: dict[str, Trained]) -> None:
    check(pair[f"within_{layout}_kd"], single["within_kd"], LOSS_FP32, WEIGHT_FP32)
    assert worst_loss(single["within_kd"], single["fp32_kd"]) > 1e-3, "the documents in front must matter"


@pytest.mark.parametrize("name", RESUMED)
def test_resume(name: str, single: dict[str, Trained], pair: dict[str, Trained]) -> None:
    first, then, extra = RESUMED[name]
    begun, ended = pair[f"{name}_first"], pair[f"{name}_then"]
    assert [row["step"] for row in begun.rows + ended.rows] == list(range(1, STEPS + 1))
    precision = extra.get("train", {}).get("precision", "fp32")
    if first == then:
        # The same layout: the interrupted run is the uninterrupted one, to the bit.
        whole = pair[f"{first}_kd"]
        assert begun.rows + ended.rows == whole.rows
        assert worst_weight(ended, whole) == 0.0
    elif precision == "fp32":
        assert worst_loss(ended, single["fp32_kd"]) <= LOSS_FP32
        assert worst_weight(ended, single["fp32_kd"]) <= WEIGHT_FP32
    else:
        assert worst_loss(ended, single["bf16_kd"]) <= LOSS_BF16


def test_four_ranks_equal_one(bench: Bench, single: dict[str, Trained]) -> None:
    configs = bench.pairs(WIDE)
    found = dict(zip(configs, run_ranks(run_all, 4, [(c, STEPS, False) for c in configs.values()], timeout=500)[0], strict=True))
    for name, trained in found.items():
        check(trained, single["fp32_kd" if name.endswith("_kd") else "fp32"], LOSS_FP32, WEIGHT_FP32)

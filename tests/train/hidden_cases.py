"""Define the runs that compare hidden states, and the checks that their tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import Trained, worst_loss, worst_weight
from tests.losses.cases import fresh_seed
from tests.train.hidden_ranks import RankResult, run_masked

# Run, last step, whether to save.
Job = tuple[RunConfig, int, bool]

STEPS, HALF, PLAIN_STEPS = 10, 5, 3
# Of the wide teacher. The student and the other teacher have width 32 and 4 layers.
WIDTH, LAYERS = 48, 6
# At pipeline size 2, the teacher's layer of the first pair is sent back one stage and that of the
# second forward one. The others stay.
PAIRS = [
    {"student_layer": 1, "teacher_layer": 6, "loss": "mse", "weight": 0.5},
    {"student_layer": 4, "teacher_layer": 1, "loss": "cosine", "weight": 0.3},
    {"student_layer": 2, "teacher_layer": 3, "loss": "mse", "weight": 0.7},
    {"student_layer": 2, "teacher_layer": 3, "loss": "cosine", "weight": 0.1},
    {"student_layer": 3, "teacher_layer": 4, "loss": "mse", "weight": 0.2},
]
SAME = [
    {"student_layer": 2, "teacher_layer": 3, "loss": "cosine", "weight": 0.6},
    {"student_layer": 4, "teacher_layer": 4, "weight": 5.0},
]
SELF = [{"student_layer": layer, "teacher_layer": layer, "weight": 1.0} for layer in (1, 4)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}, "model": {"recompute": "full"}},
    "pp2_vp2": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "batch": {"micro_batch_size": 1},
    },
    "dp2_overlap": {
        "optimizer": {"distributed": True},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "batch": {"micro_batch_size": 1},
    },
}
# Name: layout of the first half, layout of the second half.
RESUMED = {"vp2_to_dp2": ("pp2_vp2", "dp2_overlap")}
RESUMED_SLOW = {
    "again_tp2_sp": ("tp2_sp", "tp2_sp"),
    "again_dp2": ("dp2_overlap", "dp2_overlap"),
    "tp2_sp_to_pp2": ("tp2_sp", "pp2"),
}


class Bench:
    """Hold a folder with data and teachers, and configure runs that start from one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, fresh_seed()
        self.data, self.valid = write_tokens(folder), write_tokens(folder, tokens=1_500, seed=1)

    def plain(self, name: str, **overrides: Any) -> RunConfig:
        """Return a run without a teacher."""
        return tiny(self.folder / name, self.data, **overrides)

    def config(
        self,
        name: str,
        pairs: list[dict[str, Any]] = PAIRS,
        *,
        teacher_run: str = "wide",
        **overrides: Any,
    ) -> RunConfig:
        """Return a run that distils from `teacher_run` and compares pairs of layers."""
        content: dict[str, Any] = {
            "teacher": {"source": "online", "checkpoint": str(self.folder / teacher_run)},
            "distill": {"alpha": 0.4, "top_k": 8, "tail": "bucket", "hidden_states": pairs},
            "checkpoint": {"initialize_from": str(self.folder / "common")},
            "data": {"valid": {"held_out": self.valid}},
            "train": {"seed": self.seed % 2**31, "evaluate_batches": 1},
        }
        for section, keys in overrides.items():
            content[section] = {**content.get(section, {}), **keys}
        return self.plain(name, **content)


# Runs that plain torch repeats: teacher, pairs, alpha.
REPEATED: dict[str, tuple[str, list[dict[str, Any]], float]] = {
    "wide": ("wide", PAIRS, 0.4),
    "same": ("same", SAME, 1.0),
    "layers alone": ("wide", PAIRS[:1], 0.0),
}


def repeated_run(bench: Bench, name: str) -> tuple[RunConfig, int]:
    """Return a run that plain torch repeats, and its number of steps.

    Its eps is large. With a small one, the sign of a gradient that is only rounding error would
    move its weight by a whole learning rate.
    """
    teacher, pairs, alpha = REPEATED[name]
    optimizer = {"clip_grad": 0.2, "weight_decay": 0.1, "eps": 1e-4}
    config = bench.config(
        f"repeated {name}",
        pairs,
        teacher_run=teacher,
        optimizer=optimizer,
        distill={"alpha": alpha},
    )
    return config, PLAIN_STEPS


def single_jobs(bench: Bench) -> dict[str, Job]:
    """Return the runs on one process: teachers, the common start, and the students."""
    wide = {"hidden_size": WIDTH, "ffn_hidden_size": 96, "num_layers": LAYERS}
    faint = [{**pair, "weight": 1e-30} for pair in PAIRS]
    from_one = {"initialize_from": str(bench.folder / "one")}
    return {
        "wide": (bench.plain("wide", model=wide), 10, True),
        "same": (bench.plain("same"), 10, True),
        "common": (bench.plain("common", train={"seed": 11}), 1, True),
        "one": (bench.config("one"), STEPS, True),
        "first_half": (bench.config("again"), HALF, True),
        "second_half": (bench.config("again"), STEPS, False),
        "recompute": (bench.config("recompute", model={"recompute": "full"}), HALF, False),
        "none": (bench.config("none", []), HALF, False),
        "faint": (bench.config("faint", faint), HALF, False),
        "same_width": (bench.config("same_width", SAME, teacher_run="same"), STEPS, True),
        # "one" has projections. It teaches "pupil", and starts "restart", which has other pairs.
        "pupil": (
            bench.config("pupil", SELF, teacher_run="one", checkpoint=from_one),
            1,
            False,
        ),
        "restart": (bench.config("restart", PAIRS[1:2], checkpoint=from_one), 1, False),
        "bf16": (bench.config("bf16", train={"precision": "bf16"}), HALF, False),
    }


def resumed_jobs(bench: Bench, layouts_by_name: dict[str, tuple[str, str]]) -> dict[str, Job]:
    """Return two jobs in one directory: the first half in one layout, the rest in another."""
    jobs = {}
    for name, layouts in layouts_by_name.items():
        distributed = {"distributed": "dp2_overlap" in layouts}
        for part, layout, stop in zip(("first", "second"), layouts, (HALF, STEPS), strict=True):
            jobs[f"{name}_{part}"] = (
                bench.config(name, **{**LAYOUTS[layout], "optimizer": distributed}),
                stop,
                True,
            )
    return jobs


@dataclass
class TwoRankRun:
    """Hold the result of a run on two ranks.

    Attributes:
        trained: Result on the first rank.
        sent: Bytes of hidden states that each rank sent, None without an exchange.
    """

    trained: Trained
    sent: list[int | None]


def run_on_two_ranks(jobs: dict[str, Job]) -> dict[str, TwoRankRun]:
    """Run all jobs in one world of two ranks."""
    ranks: list[RankResult] = run_ranks(run_masked, 2, list(jobs.values()), timeout=500)
    return {
        name: TwoRankRun(ranks[0].trained[number], [rank.sent[number] for rank in ranks])
        for number, name in enumerate(jobs)
    }


def check_run(run: Trained, reference: Trained, name: str) -> None:
    """Compare the curves of two runs, and weights and evaluation if both end at the same step."""
    records = {record["step"]: record for record in reference.records}
    assert worst_loss(run, reference) <= 1e-5, name
    for record in run.records:
        other, case = records[record["step"]], (name, record["step"])
        assert record["hidden_loss"] == pytest.approx(other["hidden_loss"], rel=1e-5), case
        assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), case
        assert record["loss_tokens"] == other["loss_tokens"], case
    if run.records[-1]["step"] == reference.records[-1]["step"]:
        assert worst_weight(run, reference) <= 1e-4, name
        for metric, value in reference.validation["held_out"].items():
            expected = value if value is None else pytest.approx(value, rel=1e-4)
            assert run.validation["held_out"][metric] == expected, (name, metric)


def check_resumed(
    layouts_by_name: dict[str, tuple[str, str]],
    single: dict[str, Any],
    runs: dict[str, TwoRankRun],
) -> None:
    """Compare runs resumed in another layout with one process.

    Those resumed in the same layout also equal the uninterrupted run in it, bit for bit.
    """
    for name, (first_layout, second_layout) in layouts_by_name.items():
        first, second = runs[f"{name}_first"].trained, runs[f"{name}_second"].trained
        records = first.records + second.records
        assert [record["step"] for record in records] == list(range(1, STEPS + 1)), name
        if first_layout == second_layout:
            uninterrupted = runs[first_layout].trained
            assert records == uninterrupted.records, name
            assert worst_weight(second, uninterrupted) == 0.0, name
        check_run(first, single["one"], name)
        check_run(second, single["one"], name)

"""Train with other divergences than the fast one: from sparse targets and from all logits."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_kd.config import ConfigError, RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import Trained, run_all, worst_loss, worst_weight

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 12
DISTILLS: dict[str, dict[str, Any]] = {
    "reverse_kl": {"divergence": "reverse_kl", "tail": "bucket", "top_k": 8},
    "dense": {"dense": True, "temperature": 2.0},
    "dense_js": {
        "dense": True,
        "divergence": "jensen_shannon",
        "js_beta": 0.3,
        "head_schedule": "chunk",
        "chunk_tokens": 30,
    },
    # The same forward KL as "dense", from a sparse target that holds all ids.
    "all_ids": {"top_k": 101, "tail": "bucket", "temperature": 2.0},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2_vp2": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "batch": {"micro_batch_size": 1},
    },
}


def run_pairs(rendezvous: str, jobs: list[Any], invalid: RunConfig) -> tuple[list[Trained], str]:
    """Return the trained jobs, and the error that rejects `invalid` before a group is made."""
    from megatron_kd.train.build import build_run

    try:
        build_run(invalid, rendezvous=f"{rendezvous}-refused")
    except ConfigError as error:
        return run_all(rendezvous, jobs), str(error)
    return [], "not refused"


@pytest.fixture(scope="module")
def runs_and_error(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trained], str]:
    folder = tmp_path_factory.mktemp("divergences")
    data, valid = write_tokens(folder), write_tokens(folder, tokens=1_500, seed=1)
    # The teacher pads its vocabulary by another multiple than the student.
    wide = {"hidden_size": 48, "ffn_hidden_size": 96, "vocab_size_multiple": 2 * 52}

    def config(name: str, distill: dict[str, Any], **overrides: Any) -> RunConfig:
        teacher = {"source": "online", "checkpoint": str(folder / "teacher")}
        shared = {
            "data": {"valid": {"held_out": valid}},
            "teacher": teacher,
            "distill": {"alpha": 0.9, **distill},
        }
        return tiny(folder / name, data, **shared, **overrides)

    first = {
        "teacher": (tiny(folder / "teacher", data, model=wide, train={"steps": 40}), 40, True),
        **{name: (config(name, distill), STEPS, False) for name, distill in DISTILLS.items()},
    }
    single = dict(zip(first, run_ranks(run_all, 1, list(first.values()))[0], strict=True))
    pairs = {
        name: (config(name, DISTILLS["dense"], **layout), STEPS, False)
        for name, layout in LAYOUTS.items()
    }
    invalid = config(
        "refused", DISTILLS["dense"], parallel={"tensor": 2}, model={"vocab_size_multiple": 2}
    )
    trained, error = run_ranks(run_pairs, 2, list(pairs.values()), invalid)[0]
    return single | dict(zip(pairs, trained, strict=True)), error


@pytest.fixture(scope="module")
def runs(runs_and_error: tuple[dict[str, Trained], str]) -> dict[str, Trained]:
    return runs_and_error[0]


def test_vocabularies_padded_differently_are_refused(
    runs_and_error: tuple[dict[str, Trained], str],
) -> None:
    """Reject shards of 51 rows for a teacher with 52, both of 101 ids on two ranks."""
    assert "set model.vocab_size_multiple (2) to the teacher's 104" in runs_and_error[1]


@pytest.mark.parametrize("name", DISTILLS)
def test_the_distillation_loss_falls(runs: dict[str, Trained], name: str) -> None:
    records = runs[name].records
    assert all(record["updated"] for record in records)
    first, last = records[0], records[-1]
    assert last["kd_loss"] < 0.8 * first["kd_loss"], (first["kd_loss"], last["kd_loss"])
    if name in ("reverse_kl", "dense_js"):
        assert abs(first["kd_loss"] / first["kl"] - 1) > 0.03, "this is the forward KL"
    held_out = runs[name].validation["held_out"]
    for metrics in (first, held_out):
        for column in (
            "teacher_mass",
            "teacher_entropy",
            "student_entropy",
            "top1_agreement",
            "kl",
            "kd_loss",
        ):
            assert metrics[column] is not None, column
            assert 0 <= metrics[column] < 10, column


def test_dense_teacher_equals_sparse_target_of_all_ids(runs: dict[str, Trained]) -> None:
    assert worst_loss(runs["dense"], runs["all_ids"]) <= 1e-5
    assert worst_weight(runs["dense"], runs["all_ids"]) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_teacher_in_another_layout(runs: dict[str, Trained], layout: str) -> None:
    assert worst_loss(runs[layout], runs["dense"]) <= 1e-5
    assert worst_weight(runs[layout], runs["dense"]) <= 1e-4

"""Runs with other divergences than the fast one: from sparse targets, and from the whole teacher in any layout."""

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
    # Forward KL twice: all ids as a sparse target, and the whole teacher.
    "all_ids": {"top_k": 101, "tail": "bucket", "temperature": 2.0},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2_vp2": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "batch": {"micro_batch_size": 1},
    },
}


def run_pairs(rendezvous: str, jobs: list[Any], refused: RunConfig) -> tuple[list[Trained], str]:
    """What `run_all` gives, and the sentence that `refused` ends with before a group is made."""
    from megatron_kd.train.build import build_run

    try:
        build_run(refused, rendezvous=f"{rendezvous}-refused")
    except ConfigError as error:
        return run_all(rendezvous, jobs), str(error)
    return [], "not refused"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trained], str]:
    folder = tmp_path_factory.mktemp("divergences")
    data, valid = write_tokens(folder), write_tokens(folder, tokens=1_500, seed=1)
    # The teacher pads its vocabulary otherwise, to the same size.
    wide = {"hidden_size": 48, "ffn_hidden_size": 96, "vocab_size_multiple": 2 * 52}

    def config(name: str, distill: dict[str, Any], **overrides: Any) -> RunConfig:
        teacher = {"source": "online", "checkpoint": str(folder / "teacher")}
        shared = {
            "data": {"valid": {"held_out": valid}},
            "teacher": teacher,
            "distill": {"alpha": 0.9, **distill},
        }
        return tiny(folder / name, data, **shared, **overrides)

    alone = {name: (config(name, distill), STEPS, False) for name, distill in DISTILLS.items()}
    first = {
        "teacher": (tiny(folder / "teacher", data, model=wide, train={"steps": 40}), 40, True),
        **alone,
    }
    found = dict(zip(first, run_ranks(run_all, 1, list(first.values()))[0], strict=True))
    pairs = {
        name: (config(name, DISTILLS["dense"], **layout), STEPS, False)
        for name, layout in LAYOUTS.items()
    }
    refused = config(
        "refused", DISTILLS["dense"], parallel={"tensor": 2}, model={"vocab_size_multiple": 2}
    )
    pair, sentence = run_ranks(run_pairs, 2, list(pairs.values()), refused)[0]
    return found | dict(zip(pairs, pair, strict=True)), sentence


@pytest.fixture(scope="module")
def runs(both: tuple[dict[str, Trained], str]) -> dict[str, Trained]:
    return both[0]


def test_vocabularies_padded_otherwise_are_refused(both: tuple[dict[str, Trained], str]) -> None:
    """101 ids on two ranks: 51 rows each are not 52 each."""
    assert "set model.vocab_size_multiple (2) to the teacher's 104" in both[1]


@pytest.mark.parametrize("name", DISTILLS)
def test_the_distillation_loss_falls(runs: dict[str, Trained], name: str) -> None:
    rows = runs[name].records
    assert all(row["updated"] for row in rows)
    assert rows[-1]["kd_loss"] < 0.8 * rows[0]["kd_loss"], (rows[0]["kd_loss"], rows[-1]["kd_loss"])
    if name in ("reverse_kl", "dense_js"):
        assert abs(rows[0]["kd_loss"] / rows[0]["kl"] - 1) > 0.03, "this is the forward KL"
    held_out = runs[name].validation["held_out"]
    for report in (rows[0], held_out):
        for column in (
            "teacher_mass",
            "teacher_entropy",
            "student_entropy",
            "top1_agreement",
            "kl",
            "kd_loss",
        ):
            assert report[column] is not None, column
            assert 0 <= report[column] < 10, column


def test_whole_teacher_equals_all_ids_of_it(runs: dict[str, Trained]) -> None:
    assert worst_loss(runs["dense"], runs["all_ids"]) <= 1e-5
    assert worst_weight(runs["dense"], runs["all_ids"]) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_teacher_in_another_layout(runs: dict[str, Trained], layout: str) -> None:
    assert worst_loss(runs[layout], runs["dense"]) <= 1e-5
    assert worst_weight(runs[layout], runs["dense"]) <= 1e-4

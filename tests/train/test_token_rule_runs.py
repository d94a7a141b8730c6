"""Runs whose tokens differ in weight and temperature: the same curve in every layout, and across a restart."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_kd.config import RunConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import Trained, run_all, worst_loss, worst_weight

pytestmark = pytest.mark.dist

STEPS = 12
DISTILLS: dict[str, dict[str, Any]] = {
    "routed": {
        "weights": "keep_ce",
        "alpha_schedule": "period",
        "alpha_period_fraction": 0.5,
        "top_p": 0.9,
        "truncate": "untempered",
        "routing": {"fraction": 0.3},
        "adaptive": {"method": "entropy"},
    },
    "adakd": {
        "alpha_schedule": "wsd_ce",
        "temperature_squared": True,
        "adaptive": {"method": "adakd", "keep": 0.7},
        "token_weight": "confidence",
        "routing": {"fraction": 0.2, "scope": "sequence", "ce_weight": "share"},
    },
    "normkd": {"adaptive": {"method": "normkd"}, "weights": "keep_kd"},
    "wttm": {
        "adaptive": {"method": "wttm"},
        "token_weight": "entropy",
        "alpha_schedule": "linear_up",
    },
    "deviation": {
        "adaptive": {"method": "deviation_inverse"},
        "temperature_on": "teacher",
        "alpha_schedule": "linear_down",
    },
    "label": {"tail": "label", "temperature": 1.0, "routing": {"threshold": 0.5}},
    "drawn": {
        "num_draws": 8,
        "draws": "probabilities",
        "draw_power": 0.8,
        "temperature_on": "teacher",
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"batch": {"micro_batch_size": 1}},
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
}
ACROSS = ("routed", "adakd")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("rules")
    data = write_tokens(folder)

    def config(name: str, distill: dict[str, Any], **overrides: Any) -> RunConfig:
        teacher = {"source": "online", "checkpoint": str(folder / "teacher")}
        temperature = {"alpha": 0.8, "temperature": 1.5} | (
            {} if "num_draws" in distill else {"top_k": 8}
        )
        return tiny(
            folder / name,
            data,
            teacher=teacher,
            distill=temperature | distill,
            **{"train": {"steps": STEPS}, **overrides},
        )

    first = {"teacher": (tiny(folder / "teacher", data, train={"steps": 40}), 40, True)}
    first |= {name: (config(name, distill), STEPS, False) for name, distill in DISTILLS.items()}
    first |= {
        f"{name} half": (config(f"{name} again", distill), 7, True)
        for name, distill in DISTILLS.items()
    }
    first |= {
        f"{name} again": (config(f"{name} again", distill), STEPS, False)
        for name, distill in DISTILLS.items()
    }
    found = dict(zip(first, run_ranks(run_all, 1, list(first.values()))[0], strict=True))
    pairs = {
        f"{name} {at}": (config(f"{name} {at}", DISTILLS[name], **layout), STEPS, False)
        for name in ACROSS
        for at, layout in LAYOUTS.items()
    }
    return found | dict(zip(pairs, run_ranks(run_all, 2, list(pairs.values()))[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ACROSS)
def test_every_layout_equals_one_process(runs: dict[str, Trained], name: str, layout: str) -> None:
    assert worst_loss(runs[f"{name} {layout}"], runs[name]) <= 1e-5
    assert worst_weight(runs[f"{name} {layout}"], runs[name]) <= 1e-4


@pytest.mark.parametrize("name", DISTILLS)
def test_a_restart_changes_nothing(runs: dict[str, Trained], name: str) -> None:
    again = runs[f"{name} again"]
    assert [row["step"] for row in again.records] == list(range(8, STEPS + 1))
    assert worst_loss(again, runs[name]) == 0
    assert worst_weight(again, runs[name]) == 0


def test_what_rows_say(runs: dict[str, Trained]) -> None:
    """The share of routed tokens is what was asked for, of 96 in a step; every variant moves the weights its own way."""
    assert {round(row["routed_share"] * 96) for row in runs["routed"].records} >= {29}
    assert runs["routed"].records[0]["routed_share"] == 29 / 96
    assert all(0.2 < row["routed_share"] < 0.6 for row in runs["adakd"].records)
    assert all(0.5 <= row["teacher_temperature"] <= 2 for row in runs["routed"].records)
    assert 0 <= runs["label"].records[0]["routed_share"] < 1
    assert runs["label"].records[0]["teacher_mass"] == pytest.approx(1.0, abs=1e-5)
    assert runs["drawn"].records[0]["routed_share"] is None
    names = list(DISTILLS)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            assert worst_weight(runs[name], runs[other]) > 1e-3, (name, other)

"""Train with weights and temperatures per token: one curve in all layouts and after a restart."""

from __future__ import annotations

from itertools import combinations
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
# Variants trained in every layout.
IN_LAYOUTS = ("routed", "adakd")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("rules")
    data = write_tokens(folder)

    def config(name: str, distill: dict[str, Any], **overrides: Any) -> RunConfig:
        teacher = {"source": "online", "checkpoint": str(folder / "teacher")}
        support = {} if "num_draws" in distill else {"top_k": 8}
        return tiny(
            folder / name,
            data,
            teacher=teacher,
            distill={"alpha": 0.8, "temperature": 1.5} | support | distill,
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
    single = dict(zip(first, run_ranks(run_all, 1, list(first.values()))[0], strict=True))
    pairs = {
        f"{name} {layout}": (config(f"{name} {layout}", DISTILLS[name], **sizes), STEPS, False)
        for name in IN_LAYOUTS
        for layout, sizes in LAYOUTS.items()
    }
    return single | dict(zip(pairs, run_ranks(run_all, 2, list(pairs.values()))[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IN_LAYOUTS)
def test_every_layout_equals_one_process(runs: dict[str, Trained], name: str, layout: str) -> None:
    assert worst_loss(runs[f"{name} {layout}"], runs[name]) <= 1e-5
    assert worst_weight(runs[f"{name} {layout}"], runs[name]) <= 1e-4


@pytest.mark.parametrize("name", DISTILLS)
def test_a_restart_changes_nothing(runs: dict[str, Trained], name: str) -> None:
    resumed = runs[f"{name} again"]
    assert [record["step"] for record in resumed.records] == list(range(8, STEPS + 1))
    assert worst_loss(resumed, runs[name]) == 0
    assert worst_weight(resumed, runs[name]) == 0


def test_metrics_of_variants(runs: dict[str, Trained]) -> None:
    """Check the share of routed tokens, of 96 in a step, and that variants train other weights."""
    assert {round(record["routed_share"] * 96) for record in runs["routed"].records} >= {29}
    assert runs["routed"].records[0]["routed_share"] == 29 / 96
    assert all(0.2 < record["routed_share"] < 0.6 for record in runs["adakd"].records)
    assert all(0.5 <= record["teacher_temperature"] <= 2 for record in runs["routed"].records)
    assert 0 <= runs["label"].records[0]["routed_share"] < 1
    assert runs["label"].records[0]["teacher_mass"] == pytest.approx(1.0, abs=1e-5)
    assert runs["drawn"].records[0]["routed_share"] is None
    for name, other in combinations(DISTILLS, 2):
        assert worst_weight(runs[name], runs[other]) > 1e-3, (name, other)

"""Compare perplexity and calibration with the run's validation and with whole logits."""

from __future__ import annotations

import json
import math

import pytest

from tests.helpers.tools import Done
from tests.inference.student import Student
from tests.inference.use_ranks import MEASURED

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def test_perplexity_is_the_runs_own_validation(student: Student) -> None:
    results = student.results
    for layout, (cross_entropy, tokens) in results.perplexity.items():
        assert tokens == results.validation["loss_tokens"], layout
        assert abs(cross_entropy - (results.validation["ce_loss"] or 0.0)) <= 1e-5, layout


def test_measured_values_equal_those_of_whole_logits(student: Student) -> None:
    """Hold in every layout, to the precision of fp32.

    A token whose confidence lies on the edge of a bin may fall to either side.
    """
    results = student.results
    assert list(results.measured) == ["one", "one near", "tp2", "tp2 near", "pp2", "pp2 near"]
    for name, measured in results.measured.items():
        assert measured["tokens"] == MEASURED * 48, name
        for key, value in results.plain[name[3:]].items():
            bound = 1e-2 if key == "calibration_error" else 2e-5
            assert abs(measured[key] - value) <= bound, (name, key, measured[key], value)


def test_layouts_measure_the_same(student: Student) -> None:
    measured = student.results.measured
    for name in measured:
        for key, value in measured[f"one{name[3:]}"].items():
            if isinstance(value, float):
                bound = 1e-2 if "calibration" in key else 2e-5 * max(1.0, value)
                assert abs(measured[name][key] - value) <= bound, (name, key)


def test_bits_per_byte(student: Student) -> None:
    for name, measured in student.results.measured.items():
        bits = measured["cross_entropy"] / math.log(2) / 4
        assert measured["bits_per_byte"] == pytest.approx(bits), name


def test_measured_values_are_not_trivial(student: Student) -> None:
    """Check that accuracy and agreement are neither 0 nor 1, which weaker code could return."""
    plain = student.results.plain
    assert 0 < plain[""]["accuracy"] < 1
    assert plain[""]["teacher_kl"] > 0.01
    assert 0 < plain[" near"]["teacher_agreement"] < 1


def test_perplexity_tool(student: Student, tool_calls: dict[str, Done]) -> None:
    assert tool_calls["perplexity"].code == 0, tool_calls["perplexity"]
    assert "held_out  perplexity" in tool_calls["perplexity"].out, tool_calls["perplexity"]
    results = json.loads((student.folder / "out/results.json").read_text())["results"]["held_out"]
    assert (results["cross_entropy"], results["tokens"]) == pytest.approx(
        student.results.perplexity["one"], abs=1e-6
    )


def test_perplexity_tool_beside_a_teacher(student: Student, tool_calls: dict[str, Done]) -> None:
    assert tool_calls["beside a teacher"].code == 0, tool_calls["beside a teacher"]
    results = json.loads((student.folder / "both.json").read_text())["results"]
    assert set(results) == {"in", "out"}
    for key, value in student.results.measured["one"].items():
        if isinstance(value, float):
            assert results["in"][key] == pytest.approx(value, abs=1e-5), key
    assert results["in"]["cross_entropy"] != results["out"]["cross_entropy"]
    assert results["out"]["teacher_kl"] > 0

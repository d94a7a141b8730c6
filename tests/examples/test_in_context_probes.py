"""Test the probes of the in-context example on models whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.examples.in_context import IDS, language, prepare, probe
from tests.losses.cases import fresh_seed


def induction_model(reach: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a model that repeats the id after the last occurrence of the current id.

    It sees the last `reach` ids alone.
    """

    def predict_top(tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor(
            [
                [induced_id(ids, position, reach) for position in range(len(ids))]
                for ids in tokens.tolist()
            ]
        )

    return predict_top


def induced_id(ids: list[int], position: int, reach: int) -> int:
    """Return the prediction of the induction model at a position."""
    if position and ids[position - 1] == IDS["?"]:
        return IDS[":"]  # the value follows the colon
    if ids[position] == IDS["<again>"]:
        return ids[1]
    query = ids[position - 1] if ids[position] == IDS[":"] else ids[position]
    earlier = [
        index for index in range(max(0, position - reach), position - 1) if ids[index] == query
    ]
    return ids[earlier[-1] + 1] if earlier else IDS["answer"]


def test_probes_of_a_model_with_full_reach() -> None:
    """Copy everything, and find every value."""
    probes, _ = prepare.draw_probes(np.random.default_rng(fresh_seed()), 2, 3)
    copies = probe.score_copies(probes["copy"], induction_model(1000))
    needles = probe.score_needles(probes["needle"], induction_model(1000))
    assert copies["accuracy"] == needles["accuracy"] == 1.0
    distances = [entry["distance"] for entry in copies["by_distance"]]
    assert distances == [9 + gap for gap in prepare.GAPS]
    assert {entry["count"] for entry in copies["by_distance"]} == {3 * 8}
    assert {entry["count"] for entry in needles["by_depth"]} == {3 * 4}


def test_probes_of_a_model_with_short_reach() -> None:
    probes, _ = prepare.draw_probes(np.random.default_rng(fresh_seed()), 2, 3)
    copies = probe.score_copies(probes["copy"], induction_model(20))
    needles = probe.score_needles(probes["needle"], induction_model(30))
    # The id after <again> is known at any reach. All others of the last three are too far away.
    accuracies = [round(entry["accuracy"], 3) for entry in copies["by_distance"]]
    assert accuracies == [1.0, 1.0, 0.125, 0.125, 0.125]
    assert needles["by_depth"][-1]["accuracy"] == 1.0
    assert needles["by_depth"][0]["accuracy"] == 0.25
    assert needles["by_context"][0]["accuracy"] == 1.0
    assert needles["by_context"][-1]["accuracy"] < 0.5


class KnownSolver:
    """Solve the first of three problems in 5 of 20 tries, the second in 10, the third in none."""

    def __init__(self, terms: list[list[int]]) -> None:
        self.solutions = [sorted(language.right_solutions(problem)) for problem in terms]
        self.temperatures: list[float] = []

    def sample(self, prompts: Sequence[Sequence[int]], temperature: float) -> list[list[int]]:
        """Return continuations that are right below temperature 0.7 at known positions."""
        self.temperatures.append(temperature)
        assert [prompt[0] for prompt in prompts] == [0] * 20 + [1] * 20 + [2] * 20
        continuations = []
        for index, (problem,) in enumerate(prompts):
            solved = {0: index % 4 == 0, 1: index % 2 == 0, 2: False}[problem]
            # The first problem is always solved in one way, the second in both.
            words = self.solutions[problem][index // 2 % 2 if problem else 0]
            right = solved and temperature < 0.7
            continuations.append(language.encode(words if right else words[-2:]))
        return continuations


def test_sum_probe() -> None:
    """Compare counts, estimator, best value and different solutions with values by hand."""
    terms = [[5, -3, 4], [2, 3], [9, 1]]
    probes = [{"prompt": [index], "terms": problem} for index, problem in enumerate(terms)]
    solver = KnownSolver(terms)
    scores = probe.score_sums(probes, solver.sample, 20)
    assert solver.temperatures == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert scores["problems"] == 3
    first = scores["points"][0]
    assert first["pass_1"] == pytest.approx((5 / 20 + 10 / 20 + 0) / 3)
    assert first["pass"][19] == pytest.approx(2 / 3)
    assert len(first["pass"]) == 20
    assert first["pass_16"] == first["pass"][15]
    assert first["pass"] == sorted(first["pass"])
    # The solutions of the first problem are alike, those of the second are of two kinds.
    assert first["solutions"] == pytest.approx((1 + 2 + 0) / 3)
    assert scores["points"][4]["pass_16"] == 0.0
    assert scores["best_pass_16"] == first["pass_16"]
    assert scores["best_pass_1"] == first["pass_1"]

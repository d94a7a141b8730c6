"""Reject run files whose hidden states cannot be compared."""

from __future__ import annotations

from typing import Any

import pytest

from tests.train.hidden_cases import PAIRS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("hidden"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": {"source": "none", "checkpoint": None}},
            'not of teacher.source = "none": set teacher.source = "online"',
        ),
        ({"teacher": {"source": "cached", "cache": "c"}}, 'not of teacher.source = "cached"'),
        (
            {"teacher": {"source": "cached", "cache": "c", "on_miss": "online"}},
            'not of teacher.source = "cached"',
        ),
        ({"teacher": {"source": "huggingface"}}, 'not of teacher.source = "huggingface"'),
        (
            {"teacher": {"parallel": {"tensor": 1}}},
            "needs the teacher in the student's layout: unset teacher.parallel",
        ),
        ({"teacher": {"micro_batch_size": 2}}, "needs the teacher in the student's layout"),
        (
            {"capture": {"directory": "c"}},
            "capture.directory stores a teacher's targets, not its layers",
        ),
        (
            {"model": {"mcore": {"recompute_granularity": "full"}}},
            'set model.recompute = "full" in place of',
        ),
        (
            {"model": {"mcore": {"cuda_graph_impl": "local"}}},
            "a CUDA graph replays: remove model.mcore.cuda_graph_impl",
        ),
        (
            {"pairs": [{**PAIRS[0], "student_layer": 5}]},
            "names student_layer 5, but model.num_layers is 4",
        ),
        (
            {"pairs": [*PAIRS, PAIRS[2]]},
            "compares student_layer 2 with teacher_layer 3 by mse more than once",
        ),
        ({"pairs": [{**PAIRS[0], "weight": 0}]}, "greater than 0"),
        ({"pairs": [{**PAIRS[0], "student_layer": 0}]}, "greater than 0"),
    ],
)
def test_sections_that_exclude_hidden_states_are_refused(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bench.config("refused", **changes)

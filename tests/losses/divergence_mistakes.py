"""List calls of linear_divergence that must be refused, with a part of the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_kd.losses import DenseTeacher, linear_divergence
from megatron_kd.parallel.collectives import Group, group_size
from tests.losses.divergence_cases import DIVERGENCES
from tests.losses.mistakes import ROWS, B, H, Mistake, S, good_target


def _sparse_mistakes(vocab_size: int) -> list[tuple[dict[str, Any], str]]:
    """Return (changed arguments, message) for a sparse target."""
    draws = replace(good_target(), sampled=True)
    separate_terms = "has a term of its own for every id outside the kept ones"
    return [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, soft_cross_entropy"),
        (
            {"divergence": "mse_logits"},
            'divergence = "mse_logits" compares the logits of all ids: it needs the dense teacher',
        ),
        (
            {"tail": "renormalize"},
            'divergence = "reverse_kl" with tail = "renormalize" is infinite',
        ),
        ({"tail": "renormalize"}, 'use tail = "bucket"'),
        (
            {"tail": "drop"},
            'with a sparse target takes tail = "bucket" or "renormalize", not "drop"',
        ),
        (
            {"tail": "uniform", "divergence": "skew_kl"},
            'takes tail = "bucket" or "renormalize", not "uniform"',
        ),
        ({"divergence": "mse_probabilities", "tail": "renormalize"}, separate_terms),
        ({"divergence": "alpha_beta", "tail": "renormalize"}, separate_terms),
        ({"divergence": DIVERGENCES["alpha_beta 0 1"], "tail": "renormalize"}, "is infinite"),
        ({"teacher": draws}, "with random samples is infinite"),
        ({"teacher": draws, "divergence": "alpha_beta"}, separate_terms),
        ({"teacher": draws, "divergence": "hard_label"}, "which random samples do not tell"),
        ({"alpha": 1.5}, "alpha must be in [0, 1], not 1.5"),
        ({"temperature": 2.0}, "make it at the loss temperature"),
        ({"schedule": "eager"}, "schedule must be one of"),
        ({"teacher": None}, "alpha = 0.5 needs a target"),
        (
            {"labels": torch.full((S, B), vocab_size)},
            f"label {vocab_size} is not in the vocabulary",
        ),
    ]


def _dense_mistakes(lines: int, size: int) -> list[tuple[dict[str, Any], str]]:
    hidden, weight = torch.randn(lines, B, 6), torch.randn(ROWS, 6)
    fit = "must end in the same width and have the same type"
    mistakes_of_teacher: list[tuple[DenseTeacher, str]] = [
        (
            DenseTeacher(torch.randn(lines + 1, B, 6), weight),
            f"must have the student's leading shape ({lines}, 2)",
        ),
        (DenseTeacher(torch.randn(lines, B, 5), weight), fit),
        (DenseTeacher(hidden.half(), weight), fit),
        (DenseTeacher(hidden, torch.randn(6)), fit),
        (DenseTeacher(hidden.double(), weight.double()), "both must be float64, or neither"),
        (
            DenseTeacher(hidden, torch.randn(ROWS - 2, 6)),
            f"each rank must hold the same ids of the {ROWS * size - 1}, so pad both",
        ),
    ]
    if size > 1:
        # The ranks before the last hold as many ids; only their places differ.
        mistakes_of_teacher.append(
            (
                DenseTeacher(hidden, torch.randn(ROWS + 2, 6)),
                f"{ROWS + 2} vocabulary rows on each of {size} rank(s)",
            )
        )
    return [
        *(({"teacher": teacher}, message) for teacher, message in mistakes_of_teacher),
        ({"schedule": "recompute"}, 'schedule = "recompute" cannot serve a dense teacher'),
        ({"labels": torch.full((S, B), ROWS * size - 1)}, "is not in the vocabulary"),
        ({"alpha": -1.0}, "alpha must be in [0, 1], not -1.0"),
        ({"loss_mask": torch.ones(S)}, "loss_mask (8,) must have the labels' shape (8, 2)"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
    ]


def divergence_mistakes(group: Group, *, sequence_parallel: bool) -> list[Mistake]:
    """Return mistakes in calls of `linear_divergence`, each a change of a call that works."""
    size = group_size(group)
    lines, vocab_size = S // size if sequence_parallel else S, ROWS * size - 1
    options: dict[str, Any] = dict(
        divergence="reverse_kl", alpha=0.5, tail="bucket", vocab_size=vocab_size, tp_group=group
    )
    options |= dict(
        hidden=torch.randn(lines, B, H),
        weight=torch.randn(ROWS, H),
        labels=torch.zeros((S, B), dtype=torch.long),
    )
    options |= dict(sequence_parallel=sequence_parallel)
    dense = DenseTeacher(torch.randn(lines, B, 6), torch.randn(ROWS, 6))
    if group is None:
        for teacher in (good_target(), dense):
            linear_divergence(**options, teacher=teacher)
    return [
        Mistake(
            message,
            lambda changes=changes, teacher=teacher: linear_divergence(
                **{**options, "teacher": teacher, **changes}
            ),
            message,
        )  # type: ignore[misc]
        for teacher, mistakes in (
            (good_target(), _sparse_mistakes(vocab_size)),
            (dense, _dense_mistakes(lines, size)),
        )
        for changes, message in mistakes
    ]

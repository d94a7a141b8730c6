"""Test every refusal on one rank; for several see tests/layouts/test_head_ranks.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_kd.losses import linear_kd_cross_entropy
from tests.losses.mistakes import (
    B,
    H,
    K,
    S,
    good_target,
    loss_mistakes,
    problem_with,
    selection_mistakes,
)


def test_wrong_arguments_are_refused_with_a_reason() -> None:
    mistakes = [
        *loss_mistakes(None, sequence_parallel=False),
        *selection_mistakes(None, sequence_parallel=False),
    ]
    assert len(mistakes) > 90
    problems = [problem for mistake in mistakes if (problem := problem_with(mistake)) is not None]
    assert not problems, "\n".join(problems)


def test_the_list_starts_from_calls_that_work() -> None:
    """Check that the unchanged call works, so that each refusal is about its change.

    Labels of -100 and unused slots work too.
    """
    hidden, weight = torch.randn(S, B, H), torch.randn(10, H)
    labels = torch.zeros((S, B), dtype=torch.long)
    labels[0, 0], labels[1, 0] = -100, 8
    target = good_target()
    holes = replace(target, indices=target.indices.clone(), logprobs=target.logprobs.clone())
    holes.indices[..., 1:], holes.logprobs[..., 1:] = -1, -torch.inf
    for valid_target in (
        target,
        holes,
        replace(target, log_tail=None, entropy=None),
        replace(target, indices=target.indices.long()),
    ):
        loss = linear_kd_cross_entropy(
            hidden, weight, labels, valid_target, alpha=0.5, tail="bucket", vocab_size=9
        )
        assert bool(loss.total.isfinite().all())
    assert target.flatten().indices.shape == (S * B, K)
    assert target.flatten().slice(3, 5).entropy is not None

"""Test that a metric declared in one place reaches the report of the objective."""

from __future__ import annotations

import pytest
import torch

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import token_metrics
from megatron_kd.losses.objective import Objective
from megatron_kd.losses.spec import LossSpec
from megatron_kd.losses.token_metrics import TOKEN_METRICS, TokenMetric
from megatron_kd.targets.dense import DenseTarget
from tests.losses.cases import fresh_seed, hand_target, make_problem


@pytest.mark.parametrize("dense", [False, True])
def test_a_new_entry_is_reported(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    label_probability = TokenMetric(
        "label_probability", "in [0, 1]", "of the student", lambda tokens: (-tokens.ce).exp()
    )
    monkeypatch.setattr(token_metrics, "TOKEN_METRICS", (*TOKEN_METRICS, label_probability))
    problem = make_problem(fresh_seed())
    objective = Objective(LossSpec(0.5), HeadOptions(problem.vocab_size), token_metrics=True)
    target = hand_target(problem.teacher, top_k=8).map(lambda t: t.unsqueeze(1))
    labels = problem.labels.unsqueeze(0)
    mask = (labels >= 0).float()
    _, _, report = objective(
        problem.hidden.unsqueeze(1),
        weight=problem.weight,
        labels=labels,
        loss_mask=mask,
        target=DenseTarget(problem.hidden.unsqueeze(1), problem.weight) if dense else target,
    )
    log_p = problem.logits().log_softmax(1)
    p = log_p.gather(1, problem.labels.clamp(min=0).unsqueeze(1)).squeeze(1).exp()
    expected = torch.stack([(p * mask[0]).sum(), mask.sum()]).float()
    torch.testing.assert_close(report["label_probability"], expected)


def test_without_a_target_only_the_student_is_measured() -> None:
    problem = make_problem(fresh_seed())
    objective = Objective(LossSpec(0.5), HeadOptions(problem.vocab_size), token_metrics=True)
    labels = problem.labels.unsqueeze(0)
    _, _, report = objective(
        problem.hidden.unsqueeze(1),
        weight=problem.weight,
        labels=labels,
        loss_mask=(labels >= 0).float(),
        target=None,
    )
    assert report.keys() == {"total_loss", "ce_loss", "student_entropy"}

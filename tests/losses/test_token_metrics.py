"""Test the token metrics: values, reports, and that they change no loss."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import (
    DenseTeacher,
    reference_kd_cross_entropy,
    token_metrics,
)
from megatron_kd.losses.linear_loss import linear_loss
from megatron_kd.losses.objective import Objective
from megatron_kd.losses.spec import LossInputs, LossSpec
from megatron_kd.losses.token_metrics import TOKEN_METRICS, TokenMetric
from megatron_kd.targets.dense import DenseTarget
from tests.losses.cases import (
    fresh_seed,
    hand_target,
    make_problem,
    relative_error,
    say,
)
from tests.losses.divergence_cases import (
    DIVERGENCES,
    dense_problem,
    distributions,
    plain_divergence,
)

CHUNK = 17  # does not divide the 40 tokens


@pytest.mark.parametrize("dense", [False, True])
def test_a_new_entry_is_reported(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    toy_metric = TokenMetric(
        "toy_metric", "in [0, 1]", "of the student", lambda tokens: (-tokens.ce).exp()
    )
    monkeypatch.setattr(token_metrics, "TOKEN_METRICS", (*TOKEN_METRICS, toy_metric))
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
    torch.testing.assert_close(report["toy_metric"], expected)


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


@pytest.mark.usefixtures("small_sizes")
def test_token_metrics_of_whole_distributions() -> None:
    """Check that they are at temperature 1 whatever the loss uses."""
    seed = fresh_seed()
    case = dense_problem(seed)
    problem = case.problem
    inputs, options = LossInputs(problem.labels), HeadOptions(90, chunk_tokens=CHUNK)
    q, p = distributions(problem.logits(), problem.teacher, 1.0, None, "")
    expected = {
        "teacher_entropy": -(q * q.log()).sum(1),
        "student_entropy": -(p * p.log()).sum(1),
        "kl": plain_divergence(DIVERGENCES["forward_kl"], q, p),
    }
    agreement = (q.argmax(1) == p.argmax(1)).double()
    for temperature, name in product((1.0, 2.0), ("reverse_kl", "hard_label", "mse_logits")):
        _, metrics = linear_loss(
            problem.hidden,
            problem.weight,
            inputs,
            case.teacher(torch.float64),
            LossSpec(0.5, temperature, divergence=DIVERGENCES[name]),
            options,
            token_metrics=True,
        )
        assert torch.equal(metrics["teacher_mass"], torch.ones_like(metrics["kl"]))
        assert torch.equal(metrics["top1_agreement"], agreement), say(seed, name)
        for metric, values in expected.items():
            assert relative_error(metrics[metric], values) < 1e-12, say(seed, name, metric)


@pytest.mark.usefixtures("small_sizes")
def test_identical_models_agree_on_every_top_id() -> None:
    seed = fresh_seed()
    problem = dense_problem(seed).problem
    _, metrics = linear_loss(
        problem.hidden,
        problem.weight,
        LossInputs(problem.labels),
        DenseTeacher(problem.hidden, problem.weight),
        LossSpec(1.0, divergence=DIVERGENCES["reverse_kl"]),
        HeadOptions(90, chunk_tokens=CHUNK),
        token_metrics=True,
    )
    assert bool((metrics["top1_agreement"] == 1).all()), say(seed)


def test_token_metrics_change_no_bit_of_the_loss() -> None:
    """Check that the extra pass changes no loss, and the metrics against whole rows."""
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8)
    results = []
    for enabled in (False, True):
        hidden, weight = (
            t.detach().clone().requires_grad_() for t in (problem.hidden, problem.weight)
        )
        loss, metrics = linear_loss(
            hidden,
            weight,
            LossInputs(problem.labels),
            target,
            LossSpec(0.5, tail="bucket"),
            HeadOptions(90, chunk_tokens=7),
            token_metrics=enabled,
        )
        loss.total.sum().backward()
        results.append((*(t.detach() for t in loss), hidden.grad, weight.grad))
        assert bool(metrics) == enabled, say(seed)
    for without, with_metrics in zip(*results, strict=True):
        assert torch.equal(without, with_metrics), say(seed)
    log_p, log_q = problem.logits().log_softmax(1), problem.teacher.log_softmax(1)
    kl = reference_kd_cross_entropy(
        problem.logits(), problem.labels.clamp(min=0), target, alpha=1.0, tail="bucket"
    ).kd
    expected = {
        "teacher_mass": target.logprobs.exp().sum(1),
        "teacher_entropy": -(log_q.exp() * log_q).sum(1),
        "student_entropy": -(log_p.exp() * log_p).sum(1),
        "top1_agreement": (log_p.argmax(1) == log_q.argmax(1)).double(),
        "kl": kl,
    }
    assert metrics.keys() == expected.keys()
    for name, values in metrics.items():
        assert values.shape == (40,)
        assert not values.requires_grad
        assert relative_error(values, expected[name]) < 1e-12, say(seed, name)

"""Test rules that set weights and temperatures of tokens: formulas by hand, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses.spec import TokenTerms
from megatron_kd.losses.student_statistics import StudentStatistics, student_statistics
from megatron_kd.losses.token_rules import (
    DifficultyTemperature,
    EntropyRouting,
    EntropyWeight,
    InterpolatedTemperature,
    NormalizedTemperature,
    TokenContext,
    WeightedTargets,
    bounded_deviation,
    lowest_fraction,
    relative_entropy,
)
from megatron_kd.targets.sparse import SparseTarget
from tests.losses.cases import fresh_seed, make_problem, say

S, B, V = 20, 3, 30
EQUAL_TERMS = TokenTerms(0.25, 0.75)


def random_target(generator: torch.Generator) -> tuple[SparseTarget, Tensor]:
    """Return a target that keeps all V ids, and the teacher's logits [S, B, V], in fp64."""
    logits = 3 * torch.randn((S, B, V), dtype=torch.float64, generator=generator)
    log_q = logits.log_softmax(-1)
    ids = torch.arange(V, dtype=torch.int32).expand(S, B, V)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return SparseTarget(ids, log_q, torch.full((S, B), -math.inf), entropy), logits


def context_of(
    target: SparseTarget,
    *,
    threshold: float | None = None,
    student: StudentStatistics | None = None,
) -> TokenContext:
    entropy_threshold = None if threshold is None else torch.tensor(threshold)
    return TokenContext(target, torch.ones(S, B), entropy_threshold, student)


def test_lowest_fraction_of_the_counted_values() -> None:
    values, mask = torch.rand(S, B), torch.ones(S, B)
    mask[::4, 0] = 0.0
    for fraction in (0.0, 0.05, 0.15, 0.5, 1.0):
        threshold = lowest_fraction(values, mask, fraction)
        for column in range(B):
            counted = values[mask[:, column] > 0, column]
            share = int((counted <= threshold[0, column]).sum())
            assert share == math.ceil(round(fraction * len(counted), 9)), (fraction, column)


def test_lowest_fraction_includes_ties() -> None:
    mask = torch.ones(S, B)
    mask[::4, 0] = 0.0
    assert lowest_fraction(torch.zeros(S, B), mask, 0.1).max() == 0.0


def test_lowest_fraction_of_nothing() -> None:
    assert lowest_fraction(torch.rand(S, B), torch.zeros(S, B), 0.5).isinf().all()


@pytest.mark.parametrize("full", [True, False])
def test_routing_by_a_threshold_of_the_step(full: bool) -> None:
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    assert target.entropy is not None
    entropy = target.entropy
    context = context_of(target, threshold=float(entropy.median()))
    terms = EntropyRouting(0.0, full).apply(EQUAL_TERMS, context)
    routed = entropy <= entropy.median().float()
    assert torch.equal(terms.kd_weight, torch.where(routed, 0.0, 0.75))  # type: ignore[arg-type]
    expected = torch.where(routed, 1.0, 0.25) if full else 0.25
    assert torch.equal(torch.as_tensor(terms.ce_weight), torch.as_tensor(expected))


@pytest.mark.parametrize("full", [True, False])
def test_routing_by_a_share_of_each_sequence(full: bool) -> None:
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    terms = EntropyRouting(0.15, full).apply(EQUAL_TERMS, context_of(target))
    assert torch.equal((terms.kd_weight == 0).sum(0), torch.full((B,), 3))  # type: ignore[union-attr]
    terms = EntropyRouting(0.0, full).apply(EQUAL_TERMS, context_of(target))
    unchanged = torch.full((S, B), 0.75, dtype=torch.float32)
    assert torch.equal(terms.kd_weight, unchanged)  # type: ignore[arg-type]


def test_routing_needs_the_teachers_entropy() -> None:
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    without_entropy = SparseTarget(target.indices, target.logprobs)
    with pytest.raises(ValueError, match="do not hold the teacher's entropy"):
        EntropyRouting(0.1, True).apply(EQUAL_TERMS, context_of(without_entropy))


def test_entropy_weights() -> None:
    """A uniform teacher has full weight and a certain one none; inverse: the other way round."""
    logits = torch.zeros(S, B, V, dtype=torch.float64)
    logits[1::2, :, 0] = 1e4
    log_q = logits.log_softmax(-1)
    entropy = -(log_q.exp() * torch.where(log_q.exp() > 0, log_q, 0.0)).sum(-1)
    target = SparseTarget(torch.arange(V).int().expand(S, B, V), log_q, None, entropy)
    for inverse in (False, True):
        terms = EntropyWeight(V, inverse).apply(EQUAL_TERMS, context_of(target))
        ends = torch.tensor([0.0, 0.75] if inverse else [0.75, 0.0], dtype=torch.float64)
        expected = ends.repeat(S // 2).unsqueeze(1).expand(S, B)
        torch.testing.assert_close(terms.kd_weight, expected)


def test_wttm() -> None:
    """The weight is the sum of p^gamma, gamma = 1 / t."""
    target, logits = random_target(torch.Generator().manual_seed(fresh_seed()))
    terms = WeightedTargets(2.0).apply(EQUAL_TERMS, context_of(target))
    torch.testing.assert_close(terms.kd_weight, 0.75 * (logits.softmax(-1) ** 0.5).sum(-1))
    assert (terms.temperature, terms.teacher_temperature) == (1.0, 2.0)


def test_wttm_at_temperature_1_weighs_all_tokens_alike() -> None:
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    terms = WeightedTargets(1.0).apply(EQUAL_TERMS, context_of(target))
    torch.testing.assert_close(terms.kd_weight, torch.full((S, B), 0.75, dtype=torch.float64))


def test_normkd() -> None:
    target, logits = random_target(torch.Generator().manual_seed(fresh_seed()))
    deviation = torch.rand(S, B, dtype=torch.float64) + 0.5
    context = context_of(target, student=StudentStatistics(deviation, deviation))
    terms = NormalizedTemperature(1.5, squared=True).apply(EQUAL_TERMS, context)
    teacher = 1.5 * logits.std(-1, correction=0)
    torch.testing.assert_close(terms.teacher_temperature, teacher)
    torch.testing.assert_close(terms.temperature, 1.5 * deviation)
    torch.testing.assert_close(terms.kd_scale, teacher**2)


def test_normkd_of_a_single_kept_id() -> None:
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    single = SparseTarget(target.indices[..., :1], target.logprobs[..., :1])
    student = StudentStatistics(torch.zeros(S, B), torch.rand(S, B))
    context = context_of(single, student=student)
    terms = NormalizedTemperature(1.5, squared=False).apply(EQUAL_TERMS, context)
    assert (terms.teacher_temperature == 1.5).all()
    assert (terms.temperature == 1.5).all()


LOW, HIGH = 0.5, 3.0


def test_temperature_by_entropy() -> None:
    target, logits = random_target(torch.Generator().manual_seed(fresh_seed()))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    rule = InterpolatedTemperature(relative_entropy, LOW, HIGH, teacher_only=False, squared=True)
    terms = rule.apply(EQUAL_TERMS, context_of(target))
    expected = LOW + (HIGH - LOW) * (1 - entropy / math.log(V))
    torch.testing.assert_close(terms.temperature, expected)
    torch.testing.assert_close(terms.kd_scale, expected**2)


def test_temperature_by_deviation_on_the_teacher_alone() -> None:
    target, logits = random_target(torch.Generator().manual_seed(fresh_seed()))
    rule = InterpolatedTemperature(bounded_deviation, LOW, HIGH, teacher_only=True, squared=False)
    terms = rule.apply(EQUAL_TERMS, context_of(target))
    expected = LOW + (HIGH - LOW) / (1 + logits.std(-1, correction=0))
    torch.testing.assert_close(terms.teacher_temperature, expected)
    assert terms.temperature == 1.0
    assert terms.kd_scale == 1.0


@pytest.mark.parametrize("at_one,at_zero", [(LOW, HIGH), (HIGH, LOW)])
def test_temperature_by_entropy_at_its_ends(at_one: float, at_zero: float) -> None:
    """The ends are a uniform teacher and a certain one."""
    target, logits = random_target(torch.Generator().manual_seed(fresh_seed()))
    uniform = SparseTarget(target.indices, torch.full_like(logits, -math.log(V)))
    certain = SparseTarget(target.indices[..., :1], torch.zeros(S, B, 1))
    rule = InterpolatedTemperature(
        relative_entropy, at_one, at_zero, teacher_only=False, squared=False
    )
    torch.testing.assert_close(
        rule.apply(EQUAL_TERMS, context_of(uniform)).temperature,
        torch.full((S, B), at_one, dtype=torch.float64),
    )
    torch.testing.assert_close(
        rule.apply(EQUAL_TERMS, context_of(certain)).temperature, torch.full((S, B), at_zero)
    )


def test_adakd() -> None:
    """A sequence's median token has the run's temperature.

    Harder tokens have less, down to a factor of exp(-c), easier ones more.
    """
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    distance = torch.rand(S, B).double()
    distance[0] = 0.0
    context = context_of(target, student=StudentStatistics(distance, distance))
    terms = DifficultyTemperature(2.0, 0.5, 0.25, squared=True).apply(EQUAL_TERMS, context)
    ordered = distance.sort(0).values
    median = ordered[S // 2 - 1]
    expected = 2.0 * torch.exp(-0.5 * torch.tanh(torch.log((distance / median).clamp(min=1e-12))))
    torch.testing.assert_close(terms.temperature, expected)
    torch.testing.assert_close(terms.teacher_temperature, expected)
    torch.testing.assert_close(terms.kd_scale, expected**2)
    easiest = torch.full((B,), 2.0 * math.exp(0.5), dtype=torch.float64)
    torch.testing.assert_close(expected[0], easiest)
    assert torch.equal(terms.kd_weight > 0, distance > ordered[S * 3 // 4 - 1])  # type: ignore[operator]


def test_adakd_where_the_models_are_equal() -> None:
    target, _ = random_target(torch.Generator().manual_seed(fresh_seed()))
    zeros = torch.zeros(S, B)
    context = context_of(target, student=StudentStatistics(zeros, zeros))
    terms = DifficultyTemperature(2.0, 0.5, 1.0, squared=False).apply(EQUAL_TERMS, context)
    assert torch.isfinite(terms.temperature).all()  # type: ignore[arg-type]


def test_student_statistics() -> None:
    """Deviation at the kept ids and Hellinger distance, over whole rows in fp64."""
    seed = fresh_seed()
    problem = make_problem(seed)
    n, k = len(problem.labels), 8
    log_q = problem.teacher.log_softmax(1)
    ids = log_q.argsort(1, descending=True)[:, :k]
    log_q_kept = log_q.gather(1, ids)
    hidden = problem.hidden.view(n // 2, 2, -1).requires_grad_()
    weight = problem.weight.requires_grad_()
    target = SparseTarget(ids.int().view(n // 2, 2, k), log_q_kept.view(n // 2, 2, k))
    labels = problem.labels.view(n // 2, 2)
    options = HeadOptions(problem.vocab_size, chunk_tokens=7)
    statistics = student_statistics(hidden, weight, labels, target, options)
    logits = problem.logits().detach()
    p, q = logits.softmax(1).gather(1, ids), log_q_kept.exp()
    overlap = (p * q).sqrt().sum(1) + ((1 - p.sum(1)) * (1 - q.sum(1))).sqrt()
    torch.testing.assert_close(
        statistics.deviation.flatten(),
        logits.gather(1, ids).std(1, correction=0),
        msg=lambda message: message + say(seed),
    )
    torch.testing.assert_close(
        statistics.distance.flatten(),
        (1 - overlap).sqrt(),
        msg=lambda message: message + say(seed),
    )
    assert not statistics.distance.requires_grad
    assert hidden.grad is None

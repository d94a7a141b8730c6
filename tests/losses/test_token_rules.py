"""Rules that set weights and temperatures of tokens: formulas by hand, and where they end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_kd.losses.head import HeadOptions
from megatron_kd.losses.look import look_at
from megatron_kd.losses.spec import TokenTerms
from megatron_kd.losses.token_rules import (
    Between,
    ByDifficulty,
    EntropyWeight,
    Look,
    NormTemperature,
    Routing,
    ScaledTargets,
    Seen,
    bounded_deviation,
    lowest,
    relative_entropy,
)
from megatron_kd.targets.sparse import SparseTarget
from tests.losses.cases import fresh_seed, make_problem, say

S, B, V = 20, 3, 30
EVEN = TokenTerms(0.25, 0.75)


def some_target(generator: torch.Generator) -> tuple[SparseTarget, Tensor]:
    """All V ids kept, and the teacher's logits [S, B, V], in fp64."""
    logits = 3 * torch.randn((S, B, V), dtype=torch.float64, generator=generator)
    log_q = logits.log_softmax(-1)
    ids = torch.arange(V, dtype=torch.int32).expand(S, B, V)
    return SparseTarget(
        ids, log_q, torch.full((S, B), -math.inf), -(log_q.exp() * log_q).sum(-1)
    ), logits


def seen(
    target: SparseTarget,
    *,
    mask: Tensor | None = None,
    cut: float | None = None,
    look: Look | None = None,
) -> Seen:
    def looked() -> Look:
        assert look is not None, "this rule has no need to look"
        return look

    return Seen(
        target,
        torch.ones(S, B) if mask is None else mask,
        None if cut is None else torch.tensor(cut),
        looked,
    )


def test_the_lowest_of_those_that_count() -> None:
    values, mask = torch.rand(S, B), torch.ones(S, B)
    mask[::4, 0] = 0.0
    for fraction in (0.0, 0.05, 0.15, 0.5, 1.0):
        cut = lowest(values, mask, fraction)
        for column in range(B):
            counting = values[mask[:, column] > 0, column]
            share = int((counting <= cut[0, column]).sum())
            assert share == math.ceil(round(fraction * len(counting), 9)), (fraction, column)
    assert lowest(torch.zeros(S, B), mask, 0.1).max() == 0.0, "ties go together"
    assert lowest(values, torch.zeros(S, B), 0.5).isinf().all()


@pytest.mark.parametrize("full", [True, False])
def test_routing(full: bool) -> None:
    """By a cut of the step, and by each sequence's share."""
    target, _ = some_target(torch.Generator().manual_seed(fresh_seed()))
    assert target.entropy is not None
    entropy = target.entropy
    found = Routing(0.0, full)(EVEN, seen(target, cut=float(entropy.median())))
    routed = entropy <= entropy.median().float()
    assert torch.equal(found.kd_weight, torch.where(routed, 0.0, 0.75))  # type: ignore[arg-type]
    expected = torch.where(routed, 1.0, 0.25) if full else 0.25
    assert torch.equal(torch.as_tensor(found.ce_weight), torch.as_tensor(expected))
    share = Routing(0.15, full)(EVEN, seen(target))
    assert torch.equal((share.kd_weight == 0).sum(0), torch.full((B,), 3))  # type: ignore[union-attr]
    nothing = Routing(0.0, full)(EVEN, seen(target))
    assert torch.equal(nothing.kd_weight, torch.full((S, B), 0.75, dtype=torch.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not hold the teacher's entropy"):
        Routing(0.1, full)(EVEN, seen(SparseTarget(target.indices, target.logprobs)))


def test_entropy_weights() -> None:
    """A teacher that knows nothing counts all, one that is certain counts nothing; and the other way round."""
    logits = torch.zeros(S, B, V, dtype=torch.float64)
    logits[1::2, :, 0] = 1e4
    log_q = logits.log_softmax(-1)
    entropy = -(log_q.exp() * torch.where(log_q.exp() > 0, log_q, 0.0)).sum(-1)
    target = SparseTarget(torch.arange(V).int().expand(S, B, V), log_q, None, entropy)
    for inverse in (False, True):
        weight = EntropyWeight(V, inverse)(EVEN, seen(target)).kd_weight
        ends = torch.tensor([0.0, 0.75] if inverse else [0.75, 0.0], dtype=torch.float64)
        torch.testing.assert_close(weight, ends.repeat(S // 2).unsqueeze(1).expand(S, B))


def test_wttm() -> None:
    """Sum of p^gamma, gamma = 1 / t; at t = 1 every token counts the same."""
    target, logits = some_target(torch.Generator().manual_seed(fresh_seed()))
    found = ScaledTargets(2.0)(EVEN, seen(target))
    torch.testing.assert_close(found.kd_weight, 0.75 * (logits.softmax(-1) ** 0.5).sum(-1))
    assert (found.temperature, found.teacher_temperature) == (1.0, 2.0)
    torch.testing.assert_close(
        ScaledTargets(1.0)(EVEN, seen(target)).kd_weight,
        torch.full((S, B), 0.75, dtype=torch.float64),
    )


def test_normkd() -> None:
    target, logits = some_target(torch.Generator().manual_seed(fresh_seed()))
    student = torch.rand(S, B, dtype=torch.float64) + 0.5
    found = NormTemperature(1.5, squared=True)(EVEN, seen(target, look=Look(student, student)))
    theirs = 1.5 * logits.std(-1, correction=0)
    torch.testing.assert_close(found.teacher_temperature, theirs)
    torch.testing.assert_close(found.temperature, 1.5 * student)
    torch.testing.assert_close(found.kd_scale, theirs**2)
    alone = SparseTarget(target.indices[..., :1], target.logprobs[..., :1])
    one = NormTemperature(1.5, squared=False)(
        EVEN, seen(alone, look=Look(torch.zeros(S, B), student))
    )
    assert (one.teacher_temperature == 1.5).all()
    assert (one.temperature == 1.5).all()


def test_between_by_entropy_and_by_deviation() -> None:
    """End points: a uniform teacher and a certain one, in both directions; a formula between them."""
    target, logits = some_target(torch.Generator().manual_seed(fresh_seed()))
    low, high = 0.5, 3.0
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    found = Between(relative_entropy, low, high, teacher_only=False, squared=True)(
        EVEN, seen(target)
    )
    expected = low + (high - low) * (1 - entropy / math.log(V))
    torch.testing.assert_close(found.temperature, expected)
    torch.testing.assert_close(found.kd_scale, expected**2)
    spread = Between(bounded_deviation, low, high, teacher_only=True, squared=False)(
        EVEN, seen(target)
    )
    torch.testing.assert_close(
        spread.teacher_temperature, low + (high - low) / (1 + logits.std(-1, correction=0))
    )
    assert spread.temperature == 1.0
    assert spread.kd_scale == 1.0
    uniform = SparseTarget(target.indices, torch.full_like(logits, -math.log(V)))
    certain = SparseTarget(target.indices[..., :1], torch.zeros(S, B, 1))
    for first, last in ((low, high), (high, low)):
        by_entropy = Between(relative_entropy, first, last, teacher_only=False, squared=False)
        torch.testing.assert_close(
            by_entropy(EVEN, seen(uniform)).temperature,
            torch.full((S, B), first, dtype=torch.float64),
        )
        torch.testing.assert_close(
            by_entropy(EVEN, seen(certain)).temperature, torch.full((S, B), last)
        )


def test_adakd() -> None:
    """A sequence's median token has the run's temperature; harder ones have less, down to a factor of exp(-c), easier ones more."""
    target, _ = some_target(torch.Generator().manual_seed(fresh_seed()))
    distance = torch.rand(S, B).double()
    distance[0] = 0.0
    found = ByDifficulty(2.0, 0.5, 0.25, squared=True)(
        EVEN, seen(target, look=Look(distance, distance))
    )
    ordered = distance.sort(0).values
    median = ordered[S // 2 - 1]
    expected = 2.0 * torch.exp(-0.5 * torch.tanh(torch.log((distance / median).clamp(min=1e-12))))
    torch.testing.assert_close(found.temperature, expected)
    torch.testing.assert_close(found.teacher_temperature, expected)
    torch.testing.assert_close(found.kd_scale, expected**2)
    torch.testing.assert_close(
        expected[0], torch.full((B,), 2.0 * math.exp(0.5), dtype=torch.float64)
    )
    assert torch.equal(found.kd_weight > 0, distance > ordered[S * 3 // 4 - 1])  # type: ignore[operator]
    same = torch.zeros(S, B)
    equal = ByDifficulty(2.0, 0.5, 1.0, squared=False)(EVEN, seen(target, look=Look(same, same)))
    assert torch.isfinite(equal.temperature).all()  # type: ignore[arg-type]


def test_a_look_at_the_student() -> None:
    """Standard deviation of its logits at the kept ids, and the Hellinger distance, over whole rows in fp64; no gradient is left."""
    seed = fresh_seed()
    problem = make_problem(seed)
    n, k = len(problem.labels), 8
    log_q = problem.teacher.log_softmax(1)
    ids = log_q.argsort(1, descending=True)[:, :k]
    kept = log_q.gather(1, ids)
    hidden, weight = (
        problem.hidden.view(n // 2, 2, -1).requires_grad_(),
        problem.weight.requires_grad_(),
    )
    target = SparseTarget(ids.int().view(n // 2, 2, k), kept.view(n // 2, 2, k))
    labels = problem.labels.view(n // 2, 2)
    look = look_at(hidden, weight, labels, target, HeadOptions(problem.vocab_size, chunk_tokens=7))
    logits = problem.logits().detach()
    p, q = logits.softmax(1).gather(1, ids), kept.exp()
    overlap = (p * q).sqrt().sum(1) + ((1 - p.sum(1)) * (1 - q.sum(1))).sqrt()
    torch.testing.assert_close(
        look.deviation.flatten(),
        logits.gather(1, ids).std(1, correction=0),
        msg=lambda m: m + say(seed),
    )
    torch.testing.assert_close(
        look.distance.flatten(), (1 - overlap).sqrt(), msg=lambda m: m + say(seed)
    )
    assert not look.distance.requires_grad
    assert hidden.grad is None

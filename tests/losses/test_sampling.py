"""Draws from the teacher: unbiased, and a function of the seed and the token's key alone. Other layouts: tests/parallel."""

from __future__ import annotations

import pytest
import torch

from megatron_kd.losses import linear_kd_cross_entropy
from megatron_kd.targets import SampleSelection, SparseTarget, linear_targets, select_targets
from megatron_kd.targets.sample import uniform
from tests.losses.cases import fresh_seed, make_problem, relative_error, say

DRAWS = 4000


def shares(target: SparseTarget, vocab_size: int) -> torch.Tensor:
    """[N, V]: what a target says of each id."""
    empty = torch.zeros((target.indices.shape[0], vocab_size + 1), dtype=torch.float64)
    return empty.scatter_add_(1, target.indices.long() % (vocab_size + 1), target.logprobs.double().exp())[:, :vocab_size]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shares_converge_to_the_softmax(temperature: float) -> None:
    """Each id's count is binomial: in units of its standard deviation the errors have mean 0 and variance 1."""
    seed = fresh_seed()
    problem = make_problem(seed, vocab_size=90, rows=96)
    target = select_targets(problem.teacher, SampleSelection(DRAWS, seed, temperature), vocab_size=90)
    p = (problem.teacher / temperature).softmax(1)
    found = shares(target, 90)
    assert torch.allclose(found.sum(1), torch.ones(40, dtype=torch.float64), atol=1e-6), say(seed)
    errors = ((found - p) / (p * (1 - p) / DRAWS).sqrt())[p > 5 / DRAWS]
    assert abs(errors.mean()) < 5 / len(errors) ** 0.5 and 0.85 < errors.std() < 1.15, say(seed, errors.mean(), errors.std())
    assert not found[p * DRAWS < 1e-4].any(), say(seed)


def test_what_a_sampled_target_holds() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = select_targets(problem.teacher.float(), SampleSelection(16, seed, temperature=2.0))
    assert target.sampled and target.log_tail is None and target.temperature == 2.0
    assert target.indices.dtype == torch.int32 and target.logprobs.dtype == torch.float32 and target.indices.shape == (40, 16)
    used = target.indices >= 0
    counts = target.logprobs.exp() * 16
    assert torch.equal(used, target.logprobs > -torch.inf) and torch.allclose(counts.sum(1), torch.full((40,), 16.0))
    assert (counts - counts.round()).abs().max() < 1e-4
    for row in target.indices:
        assert len(set(row[row >= 0].tolist())) == int((row >= 0).sum())
    log_p = problem.teacher.log_softmax(1)
    assert target.entropy is not None and relative_error(target.entropy, -(log_p.exp() * log_p).sum(1)) < 1e-5, say(seed)


def test_draws_depend_on_seed_and_key_alone() -> None:
    """Another batch, order, chunk or device share of the tokens draws the same for a token; another seed or key does not."""
    seed = fresh_seed()
    problem = make_problem(seed)
    hidden, weight = problem.hidden, problem.weight
    keys = torch.randint(-(2**62), 2**62, (40,))
    selection = SampleSelection(32, seed)
    whole = linear_targets(hidden, weight, selection, vocab_size=90, row_keys=keys)
    order = torch.randperm(40)[:23]
    for chunk_tokens in (None, 7):
        some = linear_targets(hidden[order], weight, selection, vocab_size=90, row_keys=keys[order], chunk_tokens=chunk_tokens)
        assert torch.equal(some.indices, whole.indices[order]) and torch.equal(some.logprobs, whole.logprobs[order]), say(seed)
    for other, other_keys in ((SampleSelection(32, seed + 1), keys), (selection, keys + 1)):
        again = linear_targets(hidden, weight, other, vocab_size=90, row_keys=other_keys)
        assert not torch.equal(again.indices, whole.indices), say(seed)


def test_uniform_numbers() -> None:
    """Mean, variance and no correlation between neighbours, over keys and over draws; never 0 or 1."""
    seed = fresh_seed()
    numbers = uniform(seed, torch.arange(1000), 200)
    assert numbers.dtype == torch.float64 and 0 < numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5 and abs(numbers.var() - 1 / 12) < 0.001, say(seed)
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 / a.numel() ** 0.5, say(seed)
    assert len(numbers.flatten().unique()) == 200_000


def test_a_sure_teacher_and_huge_logits() -> None:
    logits = torch.full((4, 300), -1e4)
    logits[torch.arange(4), torch.tensor([0, 31, 32, 299])] = 1e4
    target = select_targets(logits, SampleSelection(8, 3))
    assert target.indices[:, 0].tolist() == [0, 31, 32, 299] and not target.logprobs[:, 0].any()
    assert (target.indices[:, 1:] == -1).all()


def test_the_loss_takes_draws_at_their_temperature_only() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = select_targets(problem.teacher.float(), SampleSelection(24, seed, temperature=2.0))
    hidden, weight = problem.hidden.float(), problem.weight.float()
    for tail in ("drop", "renormalize", "bucket"):
        loss = linear_kd_cross_entropy(hidden, weight, problem.labels, target, alpha=1.0, temperature=2.0, tail=tail, vocab_size=90)
        q = shares(target, 90)
        log_p = (problem.logits() / 2.0).log_softmax(1)
        expected = torch.where(q > 0, q * (q.clamp(min=1e-30).log() - log_p), 0.0).sum(1) * (problem.labels >= 0)
        assert relative_error(loss.kd, expected) < 1e-5, say(seed, tail)
    with pytest.raises(ValueError, match=r"was sampled at temperature 2.0, not at 1.0"):
        linear_kd_cross_entropy(hidden, weight, problem.labels, target, alpha=1.0, vocab_size=90)


def test_bad_selections() -> None:
    with pytest.raises(ValueError, match="num_draws must be at least 1, not 0"):
        SampleSelection(0, 1)
    with pytest.raises(ValueError, match="temperature must be > 0, not 0"):
        SampleSelection(4, 1, temperature=0.0)
    with pytest.raises(ValueError, match=r"row_keys must be int64 \(3,\)"):
        select_targets(torch.zeros(3, 8), SampleSelection(4, 1), row_keys=torch.zeros(3))

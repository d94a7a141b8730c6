"""Test that samples of the teacher are unbiased and depend on the seed and the token's key alone.

Other layouts: tests/layouts.
"""

from __future__ import annotations

import pytest
import torch

from megatron_kd.losses import linear_kd_cross_entropy
from megatron_kd.targets import SampleSelection, SparseTarget, linear_targets, select_targets
from megatron_kd.targets.sample import uniform
from megatron_kd.targets.sparse import assign_tail_to_label, check_target
from tests.losses.cases import fresh_seed, hand_target, make_problem, relative_error, say

DRAWS = 4000


def shares(target: SparseTarget, vocab_size: int) -> torch.Tensor:
    """Return what a target says of each id, [N, V]."""
    empty = torch.zeros((target.indices.shape[0], vocab_size + 1), dtype=torch.float64)
    return empty.scatter_add_(
        1, target.indices.long() % (vocab_size + 1), target.logprobs.double().exp()
    )[:, :vocab_size]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shares_converge_to_the_softmax(temperature: float) -> None:
    """Compare with the binomial distribution of each id's count.

    In units of its standard deviation the errors have mean 0 and variance 1.
    """
    seed = fresh_seed()
    problem = make_problem(seed, vocab_size=90, rows=96)
    target = select_targets(
        problem.teacher, SampleSelection(DRAWS, seed, temperature), vocab_size=90
    )
    p = (problem.teacher / temperature).softmax(1)
    sampled_shares = shares(target, 90)
    assert torch.allclose(sampled_shares.sum(1), torch.ones(40, dtype=torch.float64), atol=1e-6), (
        say(seed)
    )
    errors = ((sampled_shares - p) / (p * (1 - p) / DRAWS).sqrt())[p > 5 / DRAWS]
    assert abs(errors.mean()) < 5 / len(errors) ** 0.5, say(seed, errors.mean(), errors.std())
    assert 0.85 < errors.std() < 1.15, say(seed, errors.mean(), errors.std())
    assert not sampled_shares[p * DRAWS < 1e-4].any(), say(seed)


def test_content_of_a_sampled_target() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = select_targets(problem.teacher.float(), SampleSelection(16, seed, temperature=2.0))
    assert target.sampled
    assert target.log_tail is None
    assert target.temperature == 2.0
    assert target.indices.dtype == torch.int32
    assert target.logprobs.dtype == torch.float32
    assert target.indices.shape == (40, 16)
    used = target.indices >= 0
    counts = target.logprobs.exp() * 16
    assert torch.equal(used, target.logprobs > -torch.inf)
    assert torch.allclose(counts.sum(1), torch.full((40,), 16.0))
    assert (counts - counts.round()).abs().max() < 1e-4
    for ids in target.indices:
        assert len(set(ids[ids >= 0].tolist())) == int((ids >= 0).sum())
    log_p = problem.teacher.log_softmax(1)
    assert target.entropy is not None, say(seed)
    assert relative_error(target.entropy, -(log_p.exp() * log_p).sum(1)) < 1e-5, say(seed)


def test_samples_depend_on_seed_and_key_alone() -> None:
    """Check that batch, order and chunk do not change a token's samples.

    Another seed or key does.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    hidden, weight = problem.hidden, problem.weight
    keys = torch.randint(-(2**62), 2**62, (40,))
    selection = SampleSelection(32, seed)
    full = linear_targets(hidden, weight, selection, vocab_size=90, row_keys=keys)
    order = torch.randperm(40)[:23]
    for chunk_tokens in (None, 7):
        part = linear_targets(
            hidden[order],
            weight,
            selection,
            vocab_size=90,
            row_keys=keys[order],
            chunk_tokens=chunk_tokens,
        )
        assert torch.equal(part.indices, full.indices[order]), say(seed)
        assert torch.equal(part.logprobs, full.logprobs[order]), say(seed)
    for changed_selection, changed_keys in (
        (SampleSelection(32, seed + 1), keys),
        (selection, keys + 1),
    ):
        changed = linear_targets(
            hidden, weight, changed_selection, vocab_size=90, row_keys=changed_keys
        )
        assert not torch.equal(changed.indices, full.indices), say(seed)


def test_uniform_numbers() -> None:
    """Check mean, variance and no correlation of neighbours, over keys and over samples.

    The numbers are never 0 or 1.
    """
    seed = fresh_seed()
    numbers = uniform(seed, torch.arange(1000), 200)
    assert numbers.dtype == torch.float64
    assert 0 < numbers.min()
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5, say(seed)
    assert abs(numbers.var() - 1 / 12) < 0.001, say(seed)
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 / a.numel() ** 0.5, say(seed)
    assert len(numbers.flatten().unique()) == 200_000


def test_a_certain_teacher_and_huge_logits() -> None:
    logits = torch.full((4, 300), -1e4)
    logits[torch.arange(4), torch.tensor([0, 31, 32, 299])] = 1e4
    target = select_targets(logits, SampleSelection(8, 3))
    assert target.indices[:, 0].tolist() == [0, 31, 32, 299]
    assert not target.logprobs[:, 0].any()
    assert (target.indices[:, 1:] == -1).all()


def test_the_loss_takes_samples_at_their_temperature_only() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = select_targets(problem.teacher.float(), SampleSelection(24, seed, temperature=2.0))
    hidden, weight = problem.hidden.float(), problem.weight.float()
    for tail in ("drop", "renormalize", "bucket"):
        loss = linear_kd_cross_entropy(
            hidden,
            weight,
            problem.labels,
            target,
            alpha=1.0,
            temperature=2.0,
            tail=tail,
            vocab_size=90,
        )
        q = shares(target, 90)
        log_p = (problem.logits() / 2.0).log_softmax(1)
        expected = torch.where(q > 0, q * (q.clamp(min=1e-30).log() - log_p), 0.0).sum(1) * (
            problem.labels >= 0
        )
        assert relative_error(loss.kd, expected) < 1e-5, say(seed, tail)
    with pytest.raises(ValueError, match=r"was sampled at temperature 2.0, not at 1.0"):
        linear_kd_cross_entropy(hidden, weight, problem.labels, target, alpha=1.0, vocab_size=90)


def test_sampling_from_a_power_with_weights() -> None:
    """Check that with many samples the weighted counts tend to the softmax too.

    Without weights they would tend to its power.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    p = (problem.teacher / 1.5).softmax(1)
    likely = p > 30 / DRAWS
    target = select_targets(problem.teacher, SampleSelection(DRAWS, seed, 1.5, power=0.7))
    sampled_shares = shares(target, 90)
    assert torch.allclose(sampled_shares.sum(1), torch.ones(40, dtype=torch.float64), atol=1e-6), (
        say(seed)
    )
    assert ((sampled_shares - p) / p)[likely].abs().mean() < 0.12, say(seed)
    flat = (p**0.7) / (p**0.7).sum(1, keepdim=True)
    assert ((sampled_shares - p) / p)[likely].square().mean() < 0.5 * ((flat - p) / p)[
        likely
    ].square().mean(), say(seed)


def test_the_teacher_probabilities_of_sampled_ids() -> None:
    """Check that the ids are those of the counts.

    Their values are the teacher's at the temperature, rescaled to 1.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    logits = problem.teacher.float()
    counts, probabilities = (
        select_targets(logits, SampleSelection(12, seed, 2.0, values))
        for values in ("counts", "probabilities")
    )
    assert torch.equal(counts.indices, probabilities.indices)
    assert probabilities.sampled
    assert probabilities.temperature == 2.0
    used = probabilities.indices >= 0
    p = (problem.teacher / 2.0).softmax(1).gather(
        1, probabilities.indices.clamp(min=0).long()
    ) * used
    expected = p / p.sum(1, keepdim=True)
    assert relative_error(probabilities.logprobs.exp() * used, expected) < 1e-5, say(seed)
    assert (~torch.isfinite(probabilities.logprobs[~used])).all()


def test_selections_by_their_text() -> None:
    """Check that the text, which names a cache, lacks later parameters at their defaults."""
    assert repr(SampleSelection(4, 1)) == "SampleSelection(num_draws=4, seed=1, temperature=1.0)"
    assert repr(SampleSelection(4, 1, 2.0, "probabilities", 0.8)).endswith(
        "temperature=2.0, values='probabilities', power=0.8)"
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_tail_assigned_to_the_label(temperature: float) -> None:
    """Check that the label, kept or not, gets the mass outside the kept ids at temperature 1.

    The temperature at which the tail was measured does not matter.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=6, temperature=temperature)
    assigned = assign_tail_to_label(target, problem.labels)
    p = problem.teacher.softmax(1)
    used = target.indices >= 0
    kept = torch.zeros_like(p).scatter_add_(
        1,
        target.indices.clamp(min=0).long(),
        p.gather(1, target.indices.clamp(min=0).long()) * used,
    )
    tail = 1 - kept.sum(1)
    counted = problem.labels >= 0
    expected = kept[counted]
    expected[torch.arange(int(counted.sum())), problem.labels[counted]] += tail[counted]
    assert relative_error(shares(assigned, 90)[counted], expected) < 1e-6, say(seed)
    assert relative_error(shares(assigned, 90)[~counted], kept[~counted]) < 1e-6, say(seed)
    check_target(assigned, problem.labels.shape, vocab_size=90)
    with pytest.raises(ValueError, match="draws do not say"):
        assign_tail_to_label(select_targets(problem.teacher, SampleSelection(4, 1)), problem.labels)


def test_bad_selections() -> None:
    with pytest.raises(ValueError, match="values must be counts or probabilities"):
        SampleSelection(4, 1, values="ranks")
    with pytest.raises(ValueError, match="power must be > 0"):
        SampleSelection(4, 1, power=0.0)
    with pytest.raises(ValueError, match="num_draws must be at least 1, not 0"):
        SampleSelection(0, 1)
    with pytest.raises(ValueError, match="temperature must be > 0, not 0"):
        SampleSelection(4, 1, temperature=0.0)
    with pytest.raises(ValueError, match=r"row_keys must be int64 \(3,\)"):
        select_targets(torch.zeros(3, 8), SampleSelection(4, 1), row_keys=torch.zeros(3))

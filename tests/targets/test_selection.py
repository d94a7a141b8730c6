"""Test select_targets and linear_targets against whole rows in fp64.

Other layouts: tests/layouts/test_head_ranks.py.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_kd.targets import SparseTarget, TopSelection, linear_targets, select_targets
from tests.losses.cases import fresh_seed, make_problem, relative_error, say


def dense_target(
    logits: Tensor, top_k: int, *, top_p: float = 1.0, min_k: int = 1, temperature: float = 1.0
) -> SparseTarget:
    """Return the target by sorting the whole row in fp64.

    The prefix is found by adding one id after the other.
    """
    logits = logits.double()
    ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k].clone()
    log_p, p_t = logits.log_softmax(1), (logits / temperature).softmax(1)
    for row in range(ids.shape[0]):
        mass, count = 0.0, 0
        while count < (top_k if top_p == 1.0 else min_k) or (mass < top_p and count < top_k):
            mass += p_t[row, ids[row, count]].item()
            count += 1
        ids[row, count:] = -1
    used = ids >= 0
    kept = torch.zeros((ids.shape[0], logits.shape[1] + 1), dtype=torch.bool).scatter_(
        1, ids.where(used, logits.shape[1]), True
    )
    log_tail = (
        (logits / temperature).log_softmax(1).masked_fill(kept[:, :-1], -torch.inf).logsumexp(1)
    )
    logprobs = log_p.gather(1, ids.clamp(min=0)).masked_fill(~used, -torch.inf)
    return SparseTarget(ids.int(), logprobs, log_tail, -(log_p.exp() * log_p).sum(1), temperature)


def clear_rows(logits: Tensor, *, top_p: float, temperature: float, gap: float) -> Tensor:
    """Return bool [N], true for rows in which a rounding error of `gap` cannot change the choice.

    No prefix is that close to top_p, and no two logits are that close.
    """
    ordered = logits.double().sort(dim=1, descending=True).values
    mass = (ordered / temperature).softmax(1).cumsum(1)
    return ((mass - top_p).abs() > gap)[:, :-1].all(1) & (
        (ordered[:, :-1] - ordered[:, 1:]).amin(1) > gap
    )


def difference(target: SparseTarget, expected: SparseTarget) -> float:
    """Return the largest absolute difference; inf where ids, slots or empty tails differ."""
    target, worst = target.flatten(), 0.0
    if (
        not torch.equal(target.indices, expected.indices)
        or target.temperature != expected.temperature
        or target.sampled
    ):
        return float("inf")
    for name in ("logprobs", "log_tail", "entropy"):
        values, expected_values = getattr(target, name), getattr(expected, name)
        finite = expected_values > -torch.inf
        if not torch.equal(values > -torch.inf, finite):
            return float("inf")
        worst = max(
            worst,
            (values[finite].double() - expected_values[finite]).abs().amax().item()
            if finite.any()
            else 0.0,
        )
    return worst


def test_equal_to_sorting_the_whole_row() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    padded = torch.full((40, 96), 99.0, dtype=torch.float64)
    padded[:, :90] = problem.teacher
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        exact = padded.to(dtype)
        original = exact.clone()
        for top_k, top_p, temperature in product((1, 8, 90), (1.0, 0.9, 0.3), (1.0, 2.0, 0.7)):
            for min_k in {1, min(4, top_k)}:
                selection = TopSelection(top_k, top_p=top_p, min_k=min_k, temperature=temperature)
                is_clear = clear_rows(
                    exact[:, :90],
                    top_p=top_p if top_p < 1.0 else 2.0,
                    temperature=temperature,
                    gap=1e-6,
                )
                target = select_targets(exact[is_clear], selection, vocab_size=90)
                expected = dense_target(
                    exact[is_clear, :90], top_k, top_p=top_p, min_k=min_k, temperature=temperature
                )
                error = difference(target, expected)
                assert error < limit, say(seed, dtype, selection, error)
                assert target.indices.dtype == torch.int32
                assert target.logprobs.dtype == dtype
        assert torch.equal(exact, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_hidden_states_chunk_by_chunk(dtype: torch.dtype) -> None:
    seed = fresh_seed()
    problem = make_problem(seed, tokens=60)
    weight = problem.weight.to(dtype)
    logits = problem.hidden.to(dtype).double() @ weight[:90].double().T
    is_clear = clear_rows(logits, top_p=0.8, temperature=2.0, gap=1e-5)
    hidden, logits = problem.hidden[is_clear][:40].to(dtype), logits[is_clear][:40]
    originals = hidden.clone(), weight.clone()
    expected = dense_target(logits, 12, top_p=0.8, temperature=2.0)
    selection = TopSelection(12, top_p=0.8, temperature=2.0)
    for chunk_tokens in (None, 1, 7, 40, 1000):
        target = linear_targets(
            hidden.view(20, 2, -1), weight, selection, vocab_size=90, chunk_tokens=chunk_tokens
        )
        assert target.indices.shape == (20, 2, 12)
        assert target.log_tail is not None
        assert target.log_tail.shape == (20, 2)
        assert difference(target, expected) < (1e-12 if dtype == torch.float64 else 1e-5), say(
            seed, chunk_tokens
        )
    assert torch.equal(hidden, originals[0])
    assert torch.equal(weight, originals[1])
    assert not linear_targets(
        hidden.requires_grad_(), weight, selection, vocab_size=90
    ).logprobs.requires_grad


def test_bfloat16_logits_are_not_rounded() -> None:
    seed = fresh_seed()
    logits = make_problem(seed).teacher.bfloat16()
    target = select_targets(logits, TopSelection(30))
    assert target.logprobs.dtype == torch.float32
    error = difference(target, dense_target(logits.double(), 30))
    assert error < 5e-6, say(seed, error)


def test_equal_logits_go_to_the_smaller_id() -> None:
    """Check ties inside the kept ids and at their edge, where most candidates are tied."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (64, 300), generator=generator).float()
    logits[0] = 1.0
    for dtype, top_k, top_p in product(
        (torch.float32, torch.bfloat16, torch.float64), (1, 5, 40, 299, 300), (1.0, 0.5)
    ):
        expected = dense_target(logits, top_k, top_p=top_p)
        target = select_targets(logits.to(dtype), TopSelection(top_k, top_p=top_p))
        # Equal masses that sum to top_p exactly may be kept or not; without top_p there is no
        # choice.
        if top_p == 1.0:
            assert torch.equal(target.indices, expected.indices), say(seed, dtype, top_k)
        else:
            in_both = (target.indices >= 0) & (expected.indices >= 0)
            assert torch.equal(target.indices[in_both], expected.indices[in_both]), say(
                seed, dtype, top_k
            )
            assert ((target.indices >= 0).sum(1) - (expected.indices >= 0).sum(1)).abs().amax() <= 1


def test_a_wide_vocabulary_is_searched_by_tiles() -> None:
    """Check widths around multiples of a tile.

    Ties are within a tile, between tiles and at the edge of the kept ids; there are masked-out ids,
    and one peak.
    """
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    for width, top_k in product((2047, 2048, 4000), (1, 7, 30)):
        logits = torch.randint(0, 1200, (24, width), generator=generator).float()
        logits[:8] = torch.randint(0, 3, (8, width), generator=generator).float()
        logits[8:12] = torch.randn(4, width, generator=generator)
        logits[12] = 1.0
        logits[13:16, : width - top_k - 3] = -torch.inf  # Only the last tiles have mass.
        logits[16, top_k:] = -torch.inf
        expected = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        target = select_targets(logits, TopSelection(top_k))
        assert torch.equal(target.indices.long(), expected), say(seed, width, top_k)
        log_p = logits.double().log_softmax(1).gather(1, expected)
        assert relative_error(target.logprobs.exp(), log_p.exp()) < 1e-5, say(seed, width, top_k)


def test_nan_logits_give_nan_targets() -> None:
    """Check that NaN reaches the trainer, which stops on it."""
    logits = torch.randn(3, 3000)
    logits[1, 77] = torch.nan
    target = select_targets(logits, TopSelection(8))
    assert target.logprobs[1].isnan().any()
    assert target.logprobs[[0, 2]].isfinite().all()


def test_top_p_by_hand() -> None:
    """Check p = (1/2, 1/4, 1/8, 1/16, 1/16).

    The smallest prefix whose mass is at least top_p is kept, never fewer than min_k.
    """
    logits = torch.tensor([[0.0625, 0.5, 0.0625, 0.25, 0.125]], dtype=torch.float64).log()
    order = [1, 3, 4, 0, 2]
    for top_p, min_k, count in (
        (0.4, 1, 1),
        (0.51, 1, 2),
        (0.74, 1, 2),
        (0.76, 1, 3),
        (0.999, 1, 5),
        (0.1, 3, 3),
        (1.0, 1, 5),
    ):
        target = select_targets(logits, TopSelection(5, top_p=top_p, min_k=min_k))
        assert target.indices[0].tolist() == order[:count] + [-1] * (5 - count), (top_p, min_k)
        assert target.log_tail is not None
        kept = float(target.logprobs[0, :count].exp().sum())
        assert target.log_tail.exp().item() == pytest.approx(1 - kept, abs=1e-12)
    # At temperature 2 masses are proportional to sqrt(p): 0.36, 0.26, 0.18, 0.13 and 0.13 here.
    roots = logits.exp().sqrt()[0, order] / logits.exp().sqrt().sum()
    for top_p in (0.3, 0.5, 0.7, 0.9):
        count = int((roots.cumsum(0) < top_p).sum()) + 1
        target = select_targets(logits, TopSelection(5, top_p=top_p, temperature=2.0))
        assert target.indices[0].tolist() == order[:count] + [-1] * (5 - count), top_p
    narrow = select_targets(logits, TopSelection(2, top_p=0.99))
    assert narrow.indices[0].tolist() == [1, 3], (
        "top_p is a share of the whole vocabulary's mass, cut off at top_k"
    )


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    for temperature in (1.0, 2.0):
        target = select_targets(problem.teacher.float(), TopSelection(90, temperature=temperature))
        assert target.log_tail is not None, say(seed)
        assert bool((target.log_tail == -torch.inf).all()), say(seed)
        assert torch.equal(
            target.indices.sort(1).values, torch.arange(90, dtype=torch.int32).expand(40, -1)
        ), say(seed)


def test_extreme_logits() -> None:
    """Check logits of +-1e4: everything is relative to the row's largest.

    A tail far below underflows to its log, not to NaN.
    """
    logits = torch.full((2, 20), -1e4)
    logits[:, 3:6] = torch.tensor([1e4, 1e4 - 1, 1e4 - 2])
    target = select_targets(logits, TopSelection(3))
    # The tail's log is near -2e4, where one ulp of fp32 is 2e-3.
    assert difference(target, dense_target(logits, 3)) < 2e-3
    assert target.logprobs.isfinite().all()
    assert target.entropy is not None
    assert target.entropy.isfinite().all()

"""select_targets and linear_targets against whole rows in fp64. Other layouts: tests/layouts/test_head_ranks.py."""

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
    """By sorting the whole row in fp64; the prefix is found by adding up, one id after the other."""
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
    rest = (logits / temperature).log_softmax(1).masked_fill(kept[:, :-1], -torch.inf).logsumexp(1)
    logprobs = log_p.gather(1, ids.clamp(min=0)).masked_fill(~used, -torch.inf)
    return SparseTarget(ids.int(), logprobs, rest, -(log_p.exp() * log_p).sum(1), temperature)


def clear_rows(logits: Tensor, *, top_p: float, temperature: float, gap: float) -> Tensor:
    """bool [N]: rows that rounding by `gap` cannot decide otherwise: no prefix so close to top_p, no two logits so close."""
    ordered = logits.double().sort(dim=1, descending=True).values
    mass = (ordered / temperature).softmax(1).cumsum(1)
    return ((mass - top_p).abs() > gap)[:, :-1].all(1) & (
        (ordered[:, :-1] - ordered[:, 1:]).amin(1) > gap
    )


def difference(found: SparseTarget, expected: SparseTarget) -> float:
    """Largest absolute difference of any number; inf where ids, slots or empty tails differ."""
    found, worst = found.flatten(), 0.0
    if (
        not torch.equal(found.indices, expected.indices)
        or found.temperature != expected.temperature
        or found.sampled
    ):
        return float("inf")
    for name in ("logprobs", "log_tail", "entropy"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        finite = theirs > -torch.inf
        if not torch.equal(ours > -torch.inf, finite):
            return float("inf")
        worst = max(
            worst,
            (ours[finite].double() - theirs[finite]).abs().amax().item() if finite.any() else 0.0,
        )
    return worst


def test_the_whole_row_says_the_same() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    padded = torch.full((40, 96), 99.0, dtype=torch.float64)
    padded[:, :90] = problem.teacher
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        exact = padded.to(dtype)
        before = exact.clone()
        for top_k, top_p, temperature in product((1, 8, 90), (1.0, 0.9, 0.3), (1.0, 2.0, 0.7)):
            for min_k in {1, min(4, top_k)}:
                selection = TopSelection(top_k, top_p=top_p, min_k=min_k, temperature=temperature)
                clear = clear_rows(
                    exact[:, :90],
                    top_p=top_p if top_p < 1.0 else 2.0,
                    temperature=temperature,
                    gap=1e-6,
                )
                found = select_targets(exact[clear], selection, vocab_size=90)
                expected = dense_target(
                    exact[clear, :90], top_k, top_p=top_p, min_k=min_k, temperature=temperature
                )
                error = difference(found, expected)
                assert error < limit, say(seed, dtype, selection, error)
                assert found.indices.dtype == torch.int32
                assert found.logprobs.dtype == dtype
        assert torch.equal(exact, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_hidden_states_chunk_by_chunk(dtype: torch.dtype) -> None:
    seed = fresh_seed()
    problem = make_problem(seed, tokens=60)
    weight = problem.weight.to(dtype)
    logits = problem.hidden.to(dtype).double() @ weight[:90].double().T
    clear = clear_rows(logits, top_p=0.8, temperature=2.0, gap=1e-5)
    hidden, logits = problem.hidden[clear][:40].to(dtype), logits[clear][:40]
    kept = hidden.clone(), weight.clone()
    expected = dense_target(logits, 12, top_p=0.8, temperature=2.0)
    selection = TopSelection(12, top_p=0.8, temperature=2.0)
    for chunk_tokens in (None, 1, 7, 40, 1000):
        found = linear_targets(
            hidden.view(20, 2, -1), weight, selection, vocab_size=90, chunk_tokens=chunk_tokens
        )
        assert found.indices.shape == (20, 2, 12)
        assert found.log_tail is not None
        assert found.log_tail.shape == (20, 2)
        assert difference(found, expected) < (1e-12 if dtype == torch.float64 else 1e-5), say(
            seed, chunk_tokens
        )
    assert torch.equal(hidden, kept[0])
    assert torch.equal(weight, kept[1])
    assert not linear_targets(
        hidden.requires_grad_(), weight, selection, vocab_size=90
    ).logprobs.requires_grad


def test_bfloat16_logits_are_read_as_they_are() -> None:
    seed = fresh_seed()
    logits = make_problem(seed).teacher.bfloat16()
    found = select_targets(logits, TopSelection(30))
    assert found.logprobs.dtype == torch.float32
    error = difference(found, dense_target(logits.double(), 30))
    assert error < 5e-6, say(seed, error)


def test_equal_logits_go_to_the_smaller_id() -> None:
    """Inside the kept ids and at their edge, where most of the candidates are tied."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(0, 4, (64, 300), generator=generator).float()
    few[0] = 1.0
    for dtype, top_k, top_p in product(
        (torch.float32, torch.bfloat16, torch.float64), (1, 5, 40, 299, 300), (1.0, 0.5)
    ):
        expected = dense_target(few, top_k, top_p=top_p)
        found = select_targets(few.to(dtype), TopSelection(top_k, top_p=top_p))
        # Equal masses that add up to top_p exactly may fall either way; without top_p nothing may.
        if top_p == 1.0:
            assert torch.equal(found.indices, expected.indices), say(seed, dtype, top_k)
        else:
            both = (found.indices >= 0) & (expected.indices >= 0)
            assert torch.equal(found.indices[both], expected.indices[both]), say(seed, dtype, top_k)
            assert ((found.indices >= 0).sum(1) - (expected.indices >= 0).sum(1)).abs().amax() <= 1


def test_a_wide_vocabulary_is_searched_by_tiles() -> None:
    """Widths around whole tiles; ties within a tile, between tiles and at the edge of what is kept; masked-out ids; one peak."""
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    for width, top_k in product((2047, 2048, 4000), (1, 7, 30)):
        few = torch.randint(0, 1200, (24, width), generator=generator).float()
        few[:8] = torch.randint(0, 3, (8, width), generator=generator).float()
        few[8:12] = torch.randn(4, width, generator=generator)
        few[12] = 1.0
        few[13:16, : width - top_k - 3] = -torch.inf  # all that counts is in the last tiles
        few[16, top_k:] = -torch.inf
        expected = few.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        found = select_targets(few, TopSelection(top_k))
        assert torch.equal(found.indices.long(), expected), say(seed, width, top_k)
        kept = few.double().log_softmax(1).gather(1, expected)
        assert relative_error(found.logprobs.exp(), kept.exp()) < 1e-5, say(seed, width, top_k)


def test_nan_logits_give_nan_targets() -> None:
    """The trainer stops on what is not finite: it must arrive there."""
    logits = torch.randn(3, 3000)
    logits[1, 77] = torch.nan
    found = select_targets(logits, TopSelection(8))
    assert found.logprobs[1].isnan().any()
    assert found.logprobs[[0, 2]].isfinite().all()


def test_top_p_by_hand() -> None:
    """p = (1/2, 1/4, 1/8, 1/16, 1/16): the smallest prefix whose mass is at least top_p, never below min_k."""
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
        found = select_targets(logits, TopSelection(5, top_p=top_p, min_k=min_k))
        assert found.indices[0].tolist() == order[:count] + [-1] * (5 - count), (top_p, min_k)
        assert found.log_tail is not None
        kept = float(found.logprobs[0, :count].exp().sum())
        assert found.log_tail.exp().item() == pytest.approx(1 - kept, abs=1e-12)
    # At temperature 2 masses go with sqrt(p), here 0.36, 0.26, 0.18, 0.13 and 0.13 of the total 2 / sqrt(2) + 1/2 + ...
    roots = logits.exp().sqrt()[0, order] / logits.exp().sqrt().sum()
    for top_p in (0.3, 0.5, 0.7, 0.9):
        count = int((roots.cumsum(0) < top_p).sum()) + 1
        found = select_targets(logits, TopSelection(5, top_p=top_p, temperature=2.0))
        assert found.indices[0].tolist() == order[:count] + [-1] * (5 - count), top_p
    narrow = select_targets(logits, TopSelection(2, top_p=0.99))
    assert narrow.indices[0].tolist() == [1, 3], (
        "top_p is a share of the whole vocabulary's mass, cut off at top_k"
    )


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    for temperature in (1.0, 2.0):
        found = select_targets(problem.teacher.float(), TopSelection(90, temperature=temperature))
        assert found.log_tail is not None, say(seed)
        assert bool((found.log_tail == -torch.inf).all()), say(seed)
        assert torch.equal(
            found.indices.sort(1).values, torch.arange(90, dtype=torch.int32).expand(40, -1)
        ), say(seed)


def test_extreme_logits() -> None:
    """+-1e4: everything is relative to the row's largest, and a tail far below underflows to its log, not to NaN."""
    logits = torch.full((2, 20), -1e4)
    logits[:, 3:6] = torch.tensor([1e4, 1e4 - 1, 1e4 - 2])
    found = select_targets(logits, TopSelection(3))
    assert (
        difference(found, dense_target(logits, 3)) < 2e-3
    )  # the tail's log is near -2e4: one ulp of fp32 is 2e-3
    assert found.logprobs.isfinite().all()
    assert found.entropy is not None
    assert found.entropy.isfinite().all()

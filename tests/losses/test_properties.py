"""Test what must hold of the losses, whatever the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from megatron_kd.losses import (
    kd_cross_entropy,
    linear_kd_cross_entropy,
    reference_kd_cross_entropy,
)
from megatron_kd.targets import TopSelection, linear_targets, select_targets
from tests.losses.cases import (
    TAILS,
    errors,
    fresh_seed,
    hand_target,
    head_outcome,
    logits_outcome,
    make_problem,
    relative_error,
    say,
    worst,
)

SCHEDULES = ("save", "chunk", "recompute", "auto")


def test_identical_models_have_a_divergence_of_exactly_zero() -> None:
    """Check it also if the models pad their vocabularies differently, for any kept mass."""
    seed = fresh_seed()
    problem = make_problem(seed)
    hidden = problem.hidden.float()
    weights = [
        problem.weight.float(),
        torch.cat([problem.weight[:90].float(), torch.full((38, 16), -3.0)]),
    ]
    for (teacher, student), top_k, chunk_tokens in product(
        ((0, 0), (0, 1), (1, 0)), (1, 8, 89, 90), (None, 7)
    ):
        target = linear_targets(
            hidden, weights[teacher], TopSelection(top_k), vocab_size=90, chunk_tokens=chunk_tokens
        )
        actual = linear_kd_cross_entropy(
            hidden,
            weights[student],
            problem.labels,
            target,
            alpha=1.0,
            tail="bucket",
            vocab_size=90,
            chunk_tokens=chunk_tokens,
        )
        assert not actual.kd.any(), say(seed, teacher, student, top_k, actual.kd.abs().amax())
        assert not actual.total.any(), say(seed, teacher, student, top_k, actual.kd.abs().amax())
    logits = (hidden @ weights[0][:90].T) * 3
    for twin in (logits, torch.nn.functional.pad(logits, (0, 6), value=1e3)):
        target = select_targets(twin, TopSelection(8, top_p=0.9), vocab_size=90)
        actual = kd_cross_entropy(logits, problem.labels, target, alpha=1.0, tail="bucket")
        assert not actual.kd.any(), say(seed, actual.kd.abs().amax())


def test_the_whole_vocabulary_gives_the_dense_divergence() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    counted = (problem.labels >= 0).double()
    for temperature, tail in product((1.0, 2.0), TAILS):
        target = select_targets(problem.teacher, TopSelection(90, temperature=temperature))
        log_p, log_q = (
            (problem.logits() / temperature).log_softmax(1),
            (problem.teacher / temperature).log_softmax(1),
        )
        expected = (
            torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1)
            * counted
        )
        actual = head_outcome(
            problem,
            target,
            problem.upstream,
            None,
            torch.float64,
            alpha=1.0,
            temperature=temperature,
            tail=tail,
        )
        assert relative_error(actual.kd, expected) < 1e-12, say(seed, tail, temperature)
        from_logits = logits_outcome(
            problem,
            target,
            problem.upstream,
            None,
            torch.float64,
            alpha=1.0,
            temperature=temperature,
            tail=tail,
        )
        assert worst(from_logits, actual) < 1e-12, say(seed, tail, temperature)


def test_one_kept_entry_renormalised_is_cross_entropy_to_it() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = select_targets(problem.teacher, TopSelection(1))
    label = torch.where(problem.labels >= 0, problem.teacher.argmax(1), -100)
    hard = replace(problem, labels=label)
    actual = head_outcome(problem, target, problem.upstream, None, torch.float64, alpha=1.0)
    expected = head_outcome(hard, None, problem.upstream, None, torch.float64, alpha=0.0)
    for name in ("total", "hidden", "weight"):
        assert relative_error(getattr(actual, name), getattr(expected, name)) < 1e-13, say(
            seed, name
        )
    assert relative_error(actual.kd, expected.ce) < 1e-13, say(seed)


def test_alpha_zero_is_cross_entropy() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        hidden, weight = (
            t.detach().to(dtype, copy=True).requires_grad_()
            for t in (problem.hidden, problem.weight[:90])
        )
        expected = torch.nn.functional.cross_entropy(
            hidden @ weight.T, problem.labels, reduction="none"
        )
        (expected * problem.upstream.to(dtype)).sum().backward()
        for from_logits in (None, target):
            actual = head_outcome(problem, from_logits, problem.upstream, None, dtype, alpha=0.0)
            assert torch.equal(actual.total, actual.ce), say(seed)
            assert relative_error(actual.total, expected.detach()) < limit, say(seed, dtype)
            assert hidden.grad is not None, say(seed, dtype)
            assert relative_error(actual.hidden, hidden.grad) < limit, say(seed, dtype)
            assert weight.grad is not None, say(seed, dtype)
            assert relative_error(actual.weight[:90], weight.grad) < limit, say(seed, dtype)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    """Shift the student's row, and the teacher's when targets are selected; z-loss excepted."""
    seed = fresh_seed()
    problem = make_problem(seed)
    shift = 100.0 * torch.randn(40, 1, dtype=torch.float64)
    selection = TopSelection(8, top_p=0.9, temperature=2.0)
    target = select_targets(problem.teacher, selection)
    moved = select_targets(problem.teacher + shift, selection)
    assert torch.equal(target.indices, moved.indices), say(seed)
    used = target.indices >= 0
    assert (target.logprobs[used] - moved.logprobs[used]).abs().amax() < 1e-12, say(seed)
    for tail in TAILS:
        results = []
        for logits in (problem.logits(), problem.logits() + shift):
            leaf = logits.requires_grad_()
            loss = kd_cross_entropy(
                leaf, problem.labels, target, alpha=0.5, temperature=2.0, tail=tail
            )
            loss.total.sum().backward()
            assert leaf.grad is not None
            assert leaf.grad.sum(1).abs().amax() < 1e-12 or tail == "drop", say(seed, tail)
            results.append((loss.total.detach(), leaf.grad))
        assert all(relative_error(a, b) < 1e-11 for a, b in zip(*results, strict=True)), say(
            seed, tail
        )


def test_the_order_of_slots_changes_nothing() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0)
    order = torch.rand(40, 8).argsort(1)
    shuffled = replace(
        target, indices=target.indices.gather(1, order), logprobs=target.logprobs.gather(1, order)
    )
    wider = replace(
        target,
        indices=torch.nn.functional.pad(target.indices, (3, 2), value=-1),
        logprobs=torch.nn.functional.pad(target.logprobs, (3, 2), value=-torch.inf),
    )
    for tail, variant in product(TAILS, (shuffled, wider)):
        scalars = dict(alpha=0.5, temperature=2.0, tail=tail)
        actual = [
            head_outcome(problem, t, problem.upstream, None, torch.float64, **scalars)
            for t in (target, variant)
        ]
        assert worst(actual[1], actual[0]) < 1e-13, say(seed, tail, errors(actual[1], actual[0]))


def test_masked_rows_are_exactly_zero() -> None:
    """Check labels of -100 and a mask of zeros: zero loss and zero gradient.

    That includes z-loss, and garbage in those rows.
    """
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0, dtype=torch.float32)
    unlabelled = replace(problem, labels=torch.full_like(problem.labels, -100))
    zeros = torch.zeros(40)
    scalars = dict(alpha=0.5, temperature=2.0, z_loss=0.1)
    for tail, schedule in product(TAILS, SCHEDULES):
        upstream = torch.ones(40) if schedule == "chunk" else problem.upstream
        options = dict(schedule=schedule, chunk_tokens=7, tail=tail, **scalars)
        actual = head_outcome(unlabelled, target, upstream, None, **options)
        assert not any(t.any() for t in actual), say(seed, tail, schedule)
        masked = head_outcome(problem, target, upstream, zeros, **options)
        assert not any(t.any() for t in (masked.total, masked.hidden, masked.weight)), say(
            seed, tail, schedule
        )
        assert masked.ce.any(), say(seed, tail, schedule)
        partly_masked = head_outcome(problem, target, upstream, problem.mask.float(), **options)
        masked_out = (problem.mask == 0) | (problem.labels < 0)
        assert masked_out.any(), say(seed, tail, schedule)
        assert not partly_masked.hidden[masked_out].any(), say(seed, tail, schedule)
        assert not partly_masked.total[masked_out].any(), say(seed, tail, schedule)
        assert partly_masked.hidden[~masked_out].abs().sum(1).all(), say(seed, tail, schedule)
    for tail in TAILS:
        from_logits = logits_outcome(
            unlabelled, target, problem.upstream, None, tail=tail, **scalars
        )
        assert not any(t.any() for t in from_logits), say(seed, tail)


def test_padding_rows_get_exactly_zero_gradient() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for tail, schedule in product(TAILS, SCHEDULES):
        actual = head_outcome(
            problem,
            target,
            torch.ones(40),
            None,
            alpha=0.5,
            tail=tail,
            z_loss=0.1,
            schedule=schedule,
        )
        assert actual.weight[:90].abs().sum(1).all(), say(seed, tail, schedule)
        assert not actual.weight[90:].any(), say(seed, tail, schedule)
    logits = torch.randn(40, 96, requires_grad=True)
    kd_cross_entropy(
        logits, problem.labels, target, alpha=0.5, tail="bucket", vocab_size=90
    ).total.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[:, 90:].any()


def test_a_student_tail_of_1e_7_keeps_its_digits() -> None:
    """Check the gradient of the other ids to 1e-4 if 1 - sum(support) has no digits in fp32."""
    seed = fresh_seed()
    problem = make_problem(seed)
    for tail_mass, temperature in product((1e-7, 1e-12), (1.0, 2.0)):
        target = hand_target(
            problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32, ragged=False
        )
        logits = torch.randn(40, 90, dtype=torch.float64)
        ids = target.indices.long()
        is_kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        log_p = (logits / temperature).log_softmax(1)
        inside, outside = (
            log_p.masked_fill(mask, -torch.inf).logsumexp(1, keepdim=True)
            for mask in (~is_kept, is_kept)
        )
        log_probs = torch.where(
            is_kept,
            log_p - inside,
            log_p - outside + torch.tensor(tail_mass, dtype=torch.float64).log(),
        )
        narrow = (log_probs * temperature).float().requires_grad_()
        wide = narrow.detach().double().requires_grad_()
        mass = (wide.detach() / temperature).softmax(1).masked_fill(is_kept, 0.0).sum(1)
        assert (mass / tail_mass - 1).abs().amax() < 1e-4
        scalars = dict(alpha=1.0, temperature=temperature, tail="bucket")
        actual = kd_cross_entropy(narrow, problem.labels, target, **scalars)
        expected = reference_kd_cross_entropy(wide, problem.labels, target, **scalars)
        actual.total.sum().backward()
        expected.total.sum().backward()
        assert narrow.grad is not None
        assert wide.grad is not None
        # The other ids are the hard part, row by row: the kept ids must not hide them.
        for row in range(40):
            error = relative_error(narrow.grad[row][~is_kept[row]], wide.grad[row][~is_kept[row]])
            assert error < 1e-4, say(seed, tail_mass, temperature, row, error)
        assert relative_error(actual.kd, expected.kd) < 1e-5, say(seed, tail_mass)


def test_the_chunk_size_changes_nothing() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0)
    for tail, schedule in product(TAILS, ("recompute", "auto")):
        options = dict(alpha=0.5, temperature=2.0, tail=tail, schedule=schedule, z_loss=0.01)
        unchunked = head_outcome(problem, target, problem.upstream, None, torch.float64, **options)
        for chunk_tokens in (1, 7, 39, 40, 4096):
            actual = head_outcome(
                problem,
                target,
                problem.upstream,
                None,
                torch.float64,
                chunk_tokens=chunk_tokens,
                **options,
            )
            assert worst(actual, unchunked) < 1e-13, say(seed, tail, schedule, chunk_tokens)

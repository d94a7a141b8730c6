"""What must hold of the losses whatever the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import (
    KDLoss,
    kd_cross_entropy,
    linear_kd_cross_entropy,
    reference_kd_cross_entropy,
)
from megatron_kd.losses.linear_loss import linear_loss
from megatron_kd.losses.sparse_loss import SparseLoss
from megatron_kd.losses.spec import LossInputs, LossSpec
from megatron_kd.targets import SparseTarget, TopSelection, linear_targets, select_targets
from tests.losses.cases import (
    TAILS,
    errors,
    fresh_seed,
    hand_target,
    head_outcome,
    logits_outcome,
    make_problem,
    reference_outcome,
    relative_error,
    say,
    worst,
)

SCHEDULES = ("save", "chunk", "recompute", "auto")


def test_identical_models_have_a_divergence_of_exactly_zero() -> None:
    """Also when teacher and student pad their vocabularies differently, and whatever the kept mass."""
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
        found = linear_kd_cross_entropy(
            hidden,
            weights[student],
            problem.labels,
            target,
            alpha=1.0,
            tail="bucket",
            vocab_size=90,
            chunk_tokens=chunk_tokens,
        )
        assert not found.kd.any(), say(seed, teacher, student, top_k, found.kd.abs().amax())
        assert not found.total.any(), say(seed, teacher, student, top_k, found.kd.abs().amax())
    logits = (hidden @ weights[0][:90].T) * 3
    for twin in (logits, torch.nn.functional.pad(logits, (0, 6), value=1e3)):
        target = select_targets(twin, TopSelection(8, top_p=0.9), vocab_size=90)
        found = kd_cross_entropy(logits, problem.labels, target, alpha=1.0, tail="bucket")
        assert not found.kd.any(), say(seed, found.kd.abs().amax())


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
        found = head_outcome(
            problem,
            target,
            problem.upstream,
            None,
            torch.float64,
            alpha=1.0,
            temperature=temperature,
            tail=tail,
        )
        assert relative_error(found.kd, expected) < 1e-12, say(seed, tail, temperature)
        given = logits_outcome(
            problem,
            target,
            problem.upstream,
            None,
            torch.float64,
            alpha=1.0,
            temperature=temperature,
            tail=tail,
        )
        assert worst(given, found) < 1e-12, say(seed, tail, temperature)


def test_one_kept_entry_renormalised_is_cross_entropy_to_it() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = select_targets(problem.teacher, TopSelection(1))
    label = torch.where(problem.labels >= 0, problem.teacher.argmax(1), -100)
    hard = replace(problem, labels=label)
    found = head_outcome(problem, target, problem.upstream, None, torch.float64, alpha=1.0)
    expected = head_outcome(hard, None, problem.upstream, None, torch.float64, alpha=0.0)
    for name in ("total", "hidden", "weight"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-13, say(
            seed, name
        )
    assert relative_error(found.kd, expected.ce) < 1e-13, say(seed)


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
        for given in (None, target):
            found = head_outcome(problem, given, problem.upstream, None, dtype, alpha=0.0)
            assert torch.equal(found.total, found.ce), say(seed)
            assert relative_error(found.total, expected.detach()) < limit, say(seed, dtype)
            assert hidden.grad is not None, say(seed, dtype)
            assert relative_error(found.hidden, hidden.grad) < limit, say(seed, dtype)
            assert weight.grad is not None, say(seed, dtype)
            assert relative_error(found.weight[:90], weight.grad) < limit, say(seed, dtype)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    """Except the z-loss: of the student's row, and of the teacher's in choosing targets."""
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
    for tail, other in product(TAILS, (shuffled, wider)):
        scalars = dict(alpha=0.5, temperature=2.0, tail=tail)
        found = [
            head_outcome(problem, t, problem.upstream, None, torch.float64, **scalars)
            for t in (target, other)
        ]
        assert worst(found[1], found[0]) < 1e-13, say(seed, tail, errors(found[1], found[0]))


def test_masked_rows_are_exactly_zero() -> None:
    """All labels -100, or a mask of zeros: zero loss and zero gradient, z-loss and garbage in those rows included."""
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0, dtype=torch.float32)
    nothing = replace(problem, labels=torch.full_like(problem.labels, -100))
    zeros = torch.zeros(40)
    scalars = dict(alpha=0.5, temperature=2.0, z_loss=0.1)
    for tail, schedule in product(TAILS, SCHEDULES):
        upstream = torch.ones(40) if schedule == "chunk" else problem.upstream
        options = dict(schedule=schedule, chunk_tokens=7, tail=tail, **scalars)
        found = head_outcome(nothing, target, upstream, None, **options)
        assert not any(t.any() for t in found), say(seed, tail, schedule)
        masked = head_outcome(problem, target, upstream, zeros, **options)
        assert not any(t.any() for t in (masked.total, masked.hidden, masked.weight)), say(
            seed, tail, schedule
        )
        assert masked.ce.any(), say(seed, tail, schedule)
        some = head_outcome(problem, target, upstream, problem.mask.float(), **options)
        gone = (problem.mask == 0) | (problem.labels < 0)
        assert gone.any(), say(seed, tail, schedule)
        assert not some.hidden[gone].any(), say(seed, tail, schedule)
        assert not some.total[gone].any(), say(seed, tail, schedule)
        assert some.hidden[~gone].abs().sum(1).all(), say(seed, tail, schedule)
    for tail in TAILS:
        given = logits_outcome(nothing, target, problem.upstream, None, tail=tail, **scalars)
        assert not any(t.any() for t in given), say(seed, tail)


def test_padding_rows_get_exactly_zero_gradient() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for tail, schedule in product(TAILS, SCHEDULES):
        found = head_outcome(
            problem,
            target,
            torch.ones(40),
            None,
            alpha=0.5,
            tail=tail,
            z_loss=0.1,
            schedule=schedule,
        )
        assert found.weight[:90].abs().sum(1).all(), say(seed, tail, schedule)
        assert not found.weight[90:].any(), say(seed, tail, schedule)
    logits = torch.randn(40, 96, requires_grad=True)
    kd_cross_entropy(
        logits, problem.labels, target, alpha=0.5, tail="bucket", vocab_size=90
    ).total.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[:, 90:].any()


def test_a_student_tail_of_1e_7_keeps_its_digits() -> None:
    """Where 1 - sum(support) in fp32 is one ulp or zero, the gradient of the other ids is still right to 1e-4."""
    seed = fresh_seed()
    problem = make_problem(seed)
    for tail_mass, temperature in product((1e-7, 1e-12), (1.0, 2.0)):
        target = hand_target(
            problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32, ragged=False
        )
        logits = torch.randn(40, 90, dtype=torch.float64)
        ids = target.indices.long()
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        log_p = (logits / temperature).log_softmax(1)
        inside, outside = (
            log_p.masked_fill(where, -torch.inf).logsumexp(1, keepdim=True)
            for where in (~kept, kept)
        )
        wanted = torch.where(
            kept,
            log_p - inside,
            log_p - outside + torch.tensor(tail_mass, dtype=torch.float64).log(),
        )
        narrow = (wanted * temperature).float().requires_grad_()
        wide = narrow.detach().double().requires_grad_()
        mass = (wide.detach() / temperature).softmax(1).masked_fill(kept, 0.0).sum(1)
        assert (mass / tail_mass - 1).abs().amax() < 1e-4
        scalars = dict(alpha=1.0, temperature=temperature, tail="bucket")
        found = kd_cross_entropy(narrow, problem.labels, target, **scalars)
        expected = reference_kd_cross_entropy(wide, problem.labels, target, **scalars)
        found.total.sum().backward()
        expected.total.sum().backward()
        assert narrow.grad is not None
        assert wide.grad is not None
        # The other ids are the hard part, each row of them by itself; the kept ids must not hide it.
        for row in range(40):
            error = relative_error(narrow.grad[row][~kept[row]], wide.grad[row][~kept[row]])
            assert error < 1e-4, say(seed, tail_mass, temperature, row, error)
        assert relative_error(found.kd, expected.kd) < 1e-5, say(seed, tail_mass)


def test_the_chunk_size_changes_nothing() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0)
    for tail, schedule in product(TAILS, ("recompute", "auto")):
        options = dict(alpha=0.5, temperature=2.0, tail=tail, schedule=schedule, z_loss=0.01)
        whole = head_outcome(problem, target, problem.upstream, None, torch.float64, **options)
        for chunk_tokens in (1, 7, 39, 40, 4096):
            found = head_outcome(
                problem,
                target,
                problem.upstream,
                None,
                torch.float64,
                chunk_tokens=chunk_tokens,
                **options,
            )
            assert worst(found, whole) < 1e-13, say(seed, tail, schedule, chunk_tokens)


def test_token_metrics_change_no_bit_of_the_loss() -> None:
    """The extra pass must not touch losses or gradients; the metrics against whole rows."""
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8)
    results = []
    for token_metrics in (False, True):
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
            token_metrics=token_metrics,
        )
        loss.total.sum().backward()
        results.append((*(t.detach() for t in loss), hidden.grad, weight.grad))
        assert bool(metrics) == token_metrics, say(seed)
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


Losses = list[tuple[str, Callable[[Tensor, Tensor, SparseTarget], KDLoss]]]


def entry_points(labels: Tensor, **options: object) -> Losses:
    """Every way to the loss, as a function of hidden, weight and target."""
    heads: Losses = [
        (
            name,
            lambda h, w, t, name=name: linear_kd_cross_entropy(
                h, w, labels, t, schedule=name, chunk_tokens=7, **options
            ),
        )  # type: ignore[misc]
        for name in SCHEDULES
    ]
    return [
        *heads,
        ("given logits", lambda h, w, t: kd_cross_entropy(h @ w.T, labels, t, **options)),
    ]  # type: ignore[arg-type]


def test_arguments_are_never_written_to() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, temperature=2.0, dtype=torch.float32)
    logits = problem.logits().float()
    tensors = [
        problem.hidden.float(),
        problem.weight.float(),
        problem.labels,
        problem.mask.float(),
        logits,
    ]
    tensors += [target.indices, target.logprobs, target.log_tail, target.entropy]
    before = [t.clone() for t in tensors]
    hidden, weight, labels, mask = tensors[:4]
    for tail in TAILS:
        options = dict(alpha=0.5, temperature=2.0, tail=tail, z_loss=0.1)
        for schedule in SCHEDULES:
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            found = linear_kd_cross_entropy(
                *leaves,
                labels,
                target,
                loss_mask=mask,
                vocab_size=90,
                schedule=schedule,
                chunk_tokens=7,
                **options,
            )
            upstream = torch.ones(40) if schedule == "chunk" else problem.upstream.float()
            kept = upstream.clone()
            found.total.backward(upstream)
            assert torch.equal(upstream, kept)
        upstream = problem.upstream.float()
        kd_cross_entropy(
            logits.detach().requires_grad_(), labels, target, **options
        ).total.backward(upstream)
        assert torch.equal(upstream, problem.upstream.float())
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), say(seed)


def test_twice_the_same_bits() -> None:
    seed = fresh_seed()
    problem = make_problem(seed)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for schedule in SCHEDULES:
        first, second = (
            head_outcome(
                problem,
                target,
                torch.ones(40),
                None,
                alpha=0.5,
                tail="bucket",
                schedule=schedule,
                chunk_tokens=7,
            )
            for _ in "12"
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), say(
            seed, schedule
        )
        expected = reference_outcome(
            problem.rounded_to(torch.float32),
            target,
            torch.ones(40),
            None,
            alpha=0.5,
            tail="bucket",
        )
        assert worst(first, expected) < 1e-5, say(seed, schedule)


def test_a_second_backward_raises() -> None:
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for name, loss in entry_points(problem.labels, alpha=0.5, vocab_size=90):
        if name == "recompute":
            continue  # which can: see below
        total = loss(
            problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_(), target
        ).total.sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            total.backward()


def test_recompute_can_go_back_again() -> None:
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    hidden, weight = (
        problem.hidden.float().requires_grad_(),
        problem.weight.float().requires_grad_(),
    )
    total = linear_kd_cross_entropy(
        hidden, weight, problem.labels, target, alpha=0.5, vocab_size=90, schedule="recompute"
    ).total.sum()
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_schedule_chunk_refuses_an_upstream_that_differs_between_tokens() -> None:
    """Auto computes again instead; a constant that is not written as one is still one."""
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)

    def total(schedule: str) -> Tensor:
        leaves = problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_()
        return linear_kd_cross_entropy(
            *leaves, problem.labels, target, alpha=0.5, vocab_size=90, schedule=schedule
        ).total

    uneven = torch.ones(40)
    uneven[17] = 1.0 + 1e-6
    with pytest.raises(RuntimeError, match="give per-token weights as loss_mask"):
        total("chunk").backward(uneven)
    with pytest.raises(RuntimeError, match="give per-token weights as loss_mask"):
        (total("chunk") * problem.mask.float()).sum().backward()
    total("auto").backward(uneven)
    total("chunk").backward(torch.full((40,), 0.25))
    total("chunk").mean().backward()


def test_ce_and_kd_have_no_gradient() -> None:
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    for name, loss in entry_points(problem.labels, alpha=0.5, vocab_size=90):
        found = loss(
            problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_(), target
        )
        assert found.total.requires_grad, name
        assert not found.ce.requires_grad, name
        assert not found.kd.requires_grad, name


def test_without_autograd_no_gradient_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter asks for its gradient even in evaluation: three products where one is needed."""

    def refuse(self: SparseLoss, *arguments: object, **options: object) -> Tensor:
        raise AssertionError("formed a gradient")

    monkeypatch.setattr(SparseLoss, "logit_gradient", refuse)
    problem = make_problem(fresh_seed())
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    leaves = problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_()
    for _, loss in entry_points(problem.labels, alpha=0.5, vocab_size=90):
        with torch.no_grad():
            assert not loss(*leaves, target).total.requires_grad
    with torch.no_grad():
        kd_cross_entropy(
            problem.logits().float().requires_grad_(), problem.labels, target, alpha=0.5
        )
    with pytest.raises(AssertionError, match="formed a gradient"):
        linear_kd_cross_entropy(
            *leaves, problem.labels, target, alpha=0.5, vocab_size=90, schedule="chunk"
        )

"""Every divergence against fp64 autograd on whole rows, and what must hold of them whatever the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import DenseTeacher, Divergence, linear_divergence
from megatron_kd.losses.linear_loss import linear_loss
from megatron_kd.losses.spec import LossInputs, LossSpec
from megatron_kd.targets import TopSelection, linear_targets, select_targets
from tests.losses.cases import (
    Outcome,
    Problem,
    errors,
    fresh_seed,
    hand_target,
    head_outcome,
    make_problem,
    relative_error,
    say,
)
from tests.losses.divergence_cases import (
    BOUNDED,
    DENSE_ONLY,
    DIVERGENCES,
    RENORMALIZABLE,
    REVERSE,
    VANISHING,
    check_beside_terms,
    dense_problem,
    distributions,
    divergence_mistakes,
    divergence_outcome,
    kept_ids,
    plain_divergence,
    plain_outcome,
    thousands_problem,
)
from tests.losses.mistakes import problem_with

CHUNK = 17  # does not divide the 40 tokens
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
# What a schedule can serve: upstream gradients that differ between tokens, the same for all, or ones.
UPSTREAM = {"chunk": 0.37, "direct": 1.0}


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small for "auto" to keep the logits, and blocks of a few rows."""
    monkeypatch.setattr("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 0)
    monkeypatch.setattr("megatron_kd.losses.dense_loss.BLOCK_CPU", 3 * 96)


def upstream_for(schedule: str, upstream: Tensor) -> Tensor:
    return torch.full_like(upstream, UPSTREAM[schedule]) if schedule in UPSTREAM else upstream


def check(found: Outcome, expected: Outcome, limit: float, seed: int, *what: object) -> None:
    by_name = errors(found, expected)
    assert max(by_name.values()) < limit, say(seed, *what, by_name)


def check_at_a_thousand(
    found: Outcome,
    exact: Outcome,
    problem: Problem,
    temperature: float,
    kept: Tensor | None,
    name: str,
    *what: object,
) -> None:
    """At logits of +-1000: the reverse kind beside its terms, every other as it is."""
    if name in REVERSE:
        check_beside_terms(found, exact, problem, temperature, kept, 5e-6, name, *what)
    else:
        check(found, exact, 1e-5, problem.seed, name, *what)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_dense_teacher(dtype: torch.dtype, name: str) -> None:
    """Padding rows of both models are garbage, and the teacher has more of them."""
    seed = fresh_seed()
    case, divergence = dense_problem(seed, dtype, teacher_rows=100), DIVERGENCES[name]
    schedules = cycle(("save", "chunk", "direct"))
    for temperature, (alpha, squared, z_loss) in product(
        (1.0, 2.0), ((0.5, True, 1e-2), (0.5, False, 0.0), (1.0, True, 0.0))
    ):
        scalars = dict(
            alpha=alpha, temperature=temperature, temperature_squared=squared, z_loss=z_loss
        )
        for mask, schedule in ((None, next(schedules)), (case.problem.mask, next(schedules))):
            upstream = upstream_for(schedule, case.problem.upstream)
            options = dict(schedule=schedule, chunk_tokens=CHUNK, **scalars)
            found = divergence_outcome(
                case.problem, case.teacher(dtype), divergence, upstream, mask, dtype, **options
            )
            expected = plain_outcome(case.problem, divergence, upstream, mask, **scalars)
            check(found, expected, LIMITS[dtype], seed, name, dtype, options)
            assert not found.weight[case.problem.vocab_size :].any(), say(seed, name)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in DENSE_ONLY])
@pytest.mark.parametrize("dtype", LIMITS)
def test_sparse_target(dtype: torch.dtype, name: str) -> None:
    """Rows of the target use fewer slots than there are; every schedule, recompute included."""
    seed = fresh_seed()
    problem, divergence = make_problem(seed).rounded_to(dtype), DIVERGENCES[name]
    schedules = cycle(("save", "recompute", "chunk", "direct", "auto"))
    tails = ("bucket", "renormalize") if name in RENORMALIZABLE else ("bucket",)
    for temperature, tail, (alpha, z_loss) in product((1.0, 2.0), tails, ((0.5, 1e-2), (1.0, 0.0))):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=dtype)
        scalars = dict(
            alpha=alpha, temperature=temperature, temperature_squared=True, z_loss=z_loss, tail=tail
        )
        for mask, schedule in ((None, next(schedules)), (problem.mask, next(schedules))):
            upstream = upstream_for(schedule, problem.upstream)
            options = dict(schedule=schedule, chunk_tokens=CHUNK, **scalars)
            found = divergence_outcome(
                problem, target, divergence, upstream, mask, dtype, **options
            )
            expected = plain_outcome(
                problem, divergence, upstream, mask, kept=kept_ids(target, 90), **scalars
            )
            check(found, expected, LIMITS[dtype], seed, name, dtype, options)


def test_forward_kl_is_that_of_linear_kd_cross_entropy() -> None:
    """From a sparse target, and as alpha_beta(1, 0) through the general way."""
    seed = fresh_seed()
    problem = make_problem(seed)
    general = DIVERGENCES["alpha_beta 1 0"]
    for temperature, tail in product((1.0, 2.0), ("bucket", "renormalize", "uniform", "drop")):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature)
        scalars = dict(
            alpha=0.5, temperature=temperature, tail=tail, z_loss=1e-2, chunk_tokens=CHUNK
        )
        expected = head_outcome(
            problem, target, problem.upstream, problem.mask, torch.float64, **scalars
        )
        for divergence in (
            (Divergence("forward_kl"), general)
            if tail in ("bucket", "renormalize")
            else (Divergence("forward_kl"),)
        ):
            found = divergence_outcome(
                problem,
                target,
                divergence,
                problem.upstream,
                problem.mask,
                torch.float64,
                **scalars,
            )
            check(found, expected, 1e-12, seed, divergence.name, scalars)


def test_the_whole_vocabulary_as_a_sparse_target_is_the_dense_teacher() -> None:
    seed = fresh_seed()
    case = dense_problem(seed)
    for name, temperature in product((n for n in DIVERGENCES if n not in DENSE_ONLY), (1.0, 2.0)):
        scalars = dict(alpha=1.0, temperature=temperature, chunk_tokens=CHUNK, schedule="save")
        target = select_targets(case.problem.teacher, TopSelection(90, temperature=temperature))
        teachers = (
            case.teacher(torch.float64),
            target.map(lambda t: t.double() if t.is_floating_point() else t),
        )
        ours, theirs = (
            divergence_outcome(
                case.problem,
                t,
                DIVERGENCES[name],
                case.problem.upstream,
                None,
                torch.float64,
                tail=tail,
                **scalars,
            )
            for t, tail in zip(teachers, ("renormalize", "bucket"), strict=True)
        )
        # A target's numbers are fp32.
        check(theirs, ours, 1e-5, seed, name, temperature)


def test_known_relations() -> None:
    """Limits of the parameters, and what one divergence says of another; on values and on gradients."""
    seed = fresh_seed()
    case = dense_problem(seed)
    problem = replace(case.problem, labels=case.problem.labels.clamp(min=0))

    def of(divergence: Divergence, temperature: float = 1.0) -> Outcome:
        options = dict(alpha=1.0, temperature=temperature, schedule="save")
        return divergence_outcome(
            problem,
            case.teacher(torch.float64),
            divergence,
            problem.upstream,
            None,
            torch.float64,
            **options,
        )

    def same(one: Outcome, other: Outcome, limit: float, *, factor: float = 1.0) -> None:
        found = {
            n: relative_error(getattr(one, n) * factor, getattr(other, n))
            for n in ("total", "kd", "hidden", "weight")
        }
        assert max(found.values()) < limit, say(seed, found)

    forward, reverse = of(Divergence("forward_kl")), of(Divergence("reverse_kl"))
    same(of(Divergence("alpha_beta", ab_alpha=1.0, ab_beta=0.0)), forward, 1e-12)
    same(of(Divergence("alpha_beta", ab_alpha=0.0, ab_beta=1.0)), reverse, 1e-12)
    # A parameter's distance from its limit counts times the largest ratio of two probabilities: 1e7 at times, a hundred at temperature 4.
    warm_forward, warm_reverse = (
        of(Divergence("forward_kl"), 4.0),
        of(Divergence("reverse_kl"), 4.0),
    )
    same(of(Divergence("alpha_beta", ab_alpha=1.0, ab_beta=1e-9), 4.0), warm_forward, 1e-7)
    same(of(Divergence("alpha_beta", ab_alpha=1e-9, ab_beta=1.0), 4.0), warm_reverse, 1e-7)
    same(of(Divergence("skew_kl", skew=1e-12), 4.0), warm_forward, 1e-9)
    same(of(Divergence("skew_reverse_kl", skew=1e-12), 4.0), warm_reverse, 1e-9)
    same(of(Divergence("jensen_shannon", js_beta=1e-11), 4.0), warm_forward, 1e-4, factor=1e11)
    logits, q = problem.logits(), problem.teacher.softmax(1)
    soft = of(Divergence("soft_cross_entropy"))
    assert relative_error(soft.kd - forward.kd, -(q * q.log()).sum(1)) < 1e-12, say(seed)
    assert relative_error(soft.hidden, forward.hidden) < 1e-12, say(seed)
    hellinger = 4 * (1 - (q * logits.softmax(1)).sqrt().sum(1))
    assert (
        relative_error(of(Divergence("alpha_beta", ab_alpha=0.5, ab_beta=0.5)).kd, hellinger)
        < 1e-12
    ), say(seed)
    hot, flat = of(Divergence("forward_kl"), 1e4), of(Divergence("mse_logits"), 1e4)
    same(flat, hot, 1e-3, factor=0.5)
    raw = logits - problem.teacher
    assert relative_error(of(Divergence("mse_logits")).kd, raw.var(1, unbiased=False)) < 1e-12, say(
        seed
    )
    shannon = of(Divergence("jensen_shannon")).kd
    assert bool((shannon > 0).all() and (shannon < torch.tensor(2.0).log()).all()), say(seed)


def test_identical_models_have_a_divergence_of_exactly_zero() -> None:
    """In fp32, to the bit, whatever the chunks; and a gradient of nothing but rounding."""
    seed = fresh_seed()
    problem = make_problem(seed)
    teacher = DenseTeacher(problem.hidden.float(), problem.weight.float())
    for name, temperature, chunk_tokens in product(VANISHING, (1.0, 2.0), (None, CHUNK)):
        options = dict(alpha=1.0, temperature=temperature, chunk_tokens=chunk_tokens)
        upstream = torch.ones(40)
        found = divergence_outcome(problem, teacher, DIVERGENCES[name], upstream, None, **options)
        assert not found.kd.any(), say(seed, name, options, found.kd.abs().amax())
        assert not found.total.any(), say(seed, name, options, found.kd.abs().amax())
        assert found.hidden.abs().amax() < 1e-5, say(seed, name, options, found.hidden.abs().amax())


def test_hard_label() -> None:
    """Cross-entropy to the teacher's argmax: of equal logits the smaller id, which a sparse target in any order repeats."""
    seed = fresh_seed()
    case = dense_problem(seed)
    tied = case._replace(weight=case.weight.sign(), hidden=case.hidden.sign())
    logits = tied.hidden @ tied.weight[:90].T
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any(), "the test must see ties"
    expected = torch.nn.functional.cross_entropy(
        case.problem.logits(), logits.argmax(1), reduction="none"
    ) * (case.problem.labels >= 0)
    target = select_targets(logits, TopSelection(30))
    order = torch.rand(40, 30).argsort(1)
    shuffled = replace(
        target, indices=target.indices.gather(1, order), logprobs=target.logprobs.gather(1, order)
    )
    for teacher in (tied.teacher(torch.float64), target, shuffled):
        for tail in ("bucket", "renormalize"):
            options = dict(alpha=1.0, chunk_tokens=CHUNK, schedule="save", tail=tail)
            hard = DIVERGENCES["hard_label"]
            found = divergence_outcome(
                case.problem, teacher, hard, case.problem.upstream, None, torch.float64, **options
            )
            assert relative_error(found.kd, expected) < 1e-12, say(seed, type(teacher), tail)
    one = select_targets(logits, TopSelection(1))
    top = head_outcome(
        case.problem, one, case.problem.upstream, None, torch.float64, alpha=1.0, temperature=2.0
    )
    options = dict(alpha=1.0, temperature=2.0, schedule="save")
    teacher = tied.teacher(torch.float64)
    found = divergence_outcome(
        case.problem,
        teacher,
        DIVERGENCES["hard_label"],
        case.problem.upstream,
        None,
        torch.float64,
        **options,
    )
    check(found, top, 1e-12, seed, "top 1")


def test_logits_of_a_thousand() -> None:
    """Probabilities of exactly 0 on either side or on both: no NaN, and values and gradients are those of fp64."""
    seed = fresh_seed()
    case = thousands_problem(seed)
    problem = case.problem
    for name, temperature in product(DIVERGENCES, (1.0, 2.0)):
        options = dict(alpha=1.0, temperature=temperature, schedule="save")
        given = (DIVERGENCES[name], problem.upstream, problem.mask)
        exact = divergence_outcome(
            problem, case.teacher(torch.float64), *given, torch.float64, **options
        )
        found = divergence_outcome(problem, case.teacher(torch.float32), *given, **options)
        check_at_a_thousand(found, exact, problem, temperature, None, name, options)
        log_p, log_q = (
            (x / temperature).log_softmax(1) for x in (problem.logits(), problem.teacher)
        )
        if name in BOUNDED:
            expected = plain_divergence(DIVERGENCES[name], log_q.exp(), log_p.exp())
        elif name == "mse_logits":
            expected = (log_p - log_q).var(1, unbiased=False)
        elif name in ("forward_kl", "reverse_kl"):
            one, other = (log_p, log_q) if name == "reverse_kl" else (log_q, log_p)
            expected = (one.exp() * (one - other)).sum(1)
        else:
            continue
        assert relative_error(exact.kd, expected * (problem.labels >= 0)) < 1e-12, say(
            seed, name, options
        )


def test_sparse_targets_of_logits_of_a_thousand() -> None:
    seed = fresh_seed()
    problem = thousands_problem(seed).problem
    for name, temperature in product((n for n in DIVERGENCES if n not in DENSE_ONLY), (1.0, 2.0)):
        options = dict(alpha=1.0, temperature=temperature, tail="bucket", schedule="save")
        given = (DIVERGENCES[name], problem.upstream, problem.mask)
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
        exact = divergence_outcome(problem, target, *given, torch.float64, **options)
        found, kept = divergence_outcome(problem, target, *given, **options), kept_ids(target, 90)
        check_at_a_thousand(found, exact, problem, temperature, kept, name, options)
        if name in BOUNDED:
            expected = plain_outcome(
                problem, *given, kept=kept, alpha=1.0, temperature=temperature, tail="bucket"
            )
            assert relative_error(exact.kd, expected.kd) < 1e-5, say(
                seed, name, options
            )  # the target's numbers are fp32


def test_masked_rows_are_exactly_zero() -> None:
    """All labels -100, or a mask of zeros: no loss and no gradient, whatever stands in those rows."""
    seed = fresh_seed()
    case = dense_problem(seed, torch.float32)
    nothing = replace(case.problem, labels=torch.full_like(case.problem.labels, -100))
    target = hand_target(case.problem.teacher, top_k=8, dtype=torch.float32)
    for teacher, name in product(
        (case.teacher(torch.float32), target), ("reverse_kl", "alpha_beta 0.2 0.7", "hard_label")
    ):
        options = dict(alpha=0.5, tail="bucket", z_loss=0.1, chunk_tokens=7, schedule="save")
        found = divergence_outcome(
            nothing, teacher, DIVERGENCES[name], case.problem.upstream, None, **options
        )
        assert not any(t.any() for t in found), say(seed, name)
        masked = divergence_outcome(
            case.problem,
            teacher,
            DIVERGENCES[name],
            case.problem.upstream,
            torch.zeros(40),
            **options,
        )
        assert not masked.total.any(), say(seed, name)
        assert not masked.hidden.any(), say(seed, name)
        assert not masked.weight.any(), say(seed, name)
        some = divergence_outcome(
            case.problem,
            teacher,
            DIVERGENCES[name],
            case.problem.upstream,
            case.problem.mask.float(),
            **options,
        )
        off = (case.problem.labels < 0) | (case.problem.mask == 0)
        if isinstance(
            teacher, DenseTeacher
        ):  # what the teacher says of an ignored token is not even looked at
            broken = DenseTeacher(
                torch.where((case.problem.labels < 0).unsqueeze(1), torch.nan, teacher.hidden),
                teacher.weight,
            )
            mask = case.problem.mask.float()
            again = divergence_outcome(
                case.problem, broken, DIVERGENCES[name], case.problem.upstream, mask, **options
            )
            assert all(torch.equal(a, b) for a, b in zip(some, again, strict=True)), say(seed, name)
        assert not some.hidden[off].any(), say(seed, name)
        assert some.hidden[~off].any(1).all(), say(seed, name)


def test_chunk_sizes_and_shapes_change_nothing() -> None:
    seed = fresh_seed()
    case = dense_problem(seed)
    teacher = case.teacher(torch.float64)
    for name in ("jensen_shannon 0.2", "mse_logits", "hard_label"):
        expected = plain_outcome(
            case.problem,
            DIVERGENCES[name],
            torch.ones(40),
            case.problem.mask,
            alpha=0.5,
            temperature=2.0,
        )
        for chunk_tokens, schedule in product((None, 1, 7, 40, 1000), ("auto", "save")):
            options = dict(alpha=0.5, temperature=2.0, chunk_tokens=chunk_tokens, schedule=schedule)
            found = divergence_outcome(
                case.problem,
                teacher,
                DIVERGENCES[name],
                torch.ones(40),
                case.problem.mask,
                torch.float64,
                **options,
            )
            check(found, expected, 1e-12, seed, name, options)
    lines = replace(
        case.problem,
        hidden=case.problem.hidden.view(20, 2, -1),
        labels=case.problem.labels.view(20, 2),
    )
    shaped = DenseTeacher(teacher.hidden.view(20, 2, -1), teacher.weight)
    found = divergence_outcome(
        lines,
        shaped,
        DIVERGENCES["hard_label"],
        torch.ones(40),
        case.problem.mask.view(20, 2),
        torch.float64,
        alpha=0.5,
    )
    expected = plain_outcome(
        case.problem, DIVERGENCES["hard_label"], torch.ones(40), case.problem.mask, alpha=0.5
    )
    check(found._replace(hidden=found.hidden.flatten(0, 1)), expected, 1e-12, seed, "[S, B]")


def test_bfloat16() -> None:
    """Losses as exact as in fp32 on the same bf16 values; a gradient is off by its own rounding."""
    seed = fresh_seed()
    case = dense_problem(seed, torch.bfloat16)
    for name in DIVERGENCES:
        scalars = dict(alpha=0.5, temperature=2.0)
        options = dict(schedule="save", chunk_tokens=CHUNK, **scalars)
        teacher = case.teacher(torch.bfloat16)
        found = divergence_outcome(
            case.problem,
            teacher,
            DIVERGENCES[name],
            case.problem.upstream,
            None,
            torch.bfloat16,
            **options,
        )
        by_name = errors(
            found,
            plain_outcome(case.problem, DIVERGENCES[name], case.problem.upstream, None, **scalars),
        )
        assert max(by_name[n] for n in ("total", "ce", "kd")) < 1e-5, say(seed, name, by_name)
        assert max(by_name[n] for n in ("hidden", "weight")) < 2**-8, say(seed, name, by_name)


def test_nothing_is_written_to_and_the_teacher_takes_no_gradient() -> None:
    seed = fresh_seed()
    case = dense_problem(seed, torch.float32)
    teacher = case.teacher(torch.float32)
    for tensor in (teacher.hidden, teacher.weight):
        tensor.requires_grad_()
    before = [t.detach().clone() for t in (teacher.hidden, teacher.weight)]
    found = divergence_outcome(
        case.problem, teacher, DIVERGENCES["skew_kl 0.1"], torch.ones(40), None, alpha=1.0
    )
    assert found.hidden.any()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None
    assert all(
        torch.equal(a, b) for a, b in zip(before, (teacher.hidden, teacher.weight), strict=True)
    )
    with torch.no_grad():
        loss = linear_divergence(
            case.problem.hidden.float(),
            case.problem.weight.float(),
            case.problem.labels,
            teacher,
            divergence="reverse_kl",
            alpha=0.5,
            vocab_size=90,
        )
    assert not loss.total.requires_grad
    assert bool(loss.kd[case.problem.labels >= 0].all())


def test_what_a_schedule_cannot_serve_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    case = dense_problem(seed, torch.float32)
    teacher, upstream = case.teacher(torch.float32), case.problem.upstream
    for schedule in ("chunk", "auto"):
        with pytest.raises(RuntimeError, match="give per-token weights as loss_mask"):
            divergence_outcome(
                case.problem,
                teacher,
                DIVERGENCES["reverse_kl"],
                upstream,
                None,
                alpha=1.0,
                schedule=schedule,
            )
    monkeypatch.setattr("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 96 * 40)
    found = divergence_outcome(
        case.problem, teacher, DIVERGENCES["reverse_kl"], upstream, None, alpha=1.0
    )
    check(
        found,
        plain_outcome(case.problem, DIVERGENCES["reverse_kl"], upstream, None, alpha=1.0),
        1e-5,
        seed,
    )
    hidden, weight = case.problem.hidden.float().requires_grad_(), case.problem.weight.float()
    for schedule in ("save", "chunk"):
        options = dict(divergence="reverse_kl", alpha=1.0, vocab_size=90, schedule=schedule)
        loss = linear_divergence(hidden, weight, case.problem.labels, teacher, **options)  # type: ignore[arg-type]
        loss.total.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            loss.total.sum().backward()


def test_token_metrics_of_whole_distributions() -> None:
    """They are at temperature 1 whatever the loss uses."""
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


def test_what_makes_no_sense_is_refused_with_a_reason() -> None:
    """On several ranks, before any collective: tests/layouts/test_head_ranks.py."""
    mistakes = divergence_mistakes(None, sequence_parallel=False)
    problems = [problem for mistake in mistakes if (problem := problem_with(mistake)) is not None]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"js_beta": 0.0},
        {"js_beta": 1.0},
        {"skew": 1.0},
        {"ab_alpha": -0.1},
        {"ab_beta": float("inf")},
    ],
)
def test_parameters_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Divergence("alpha_beta", **changes)


def test_targets_from_the_teacher_itself() -> None:
    """The head's own targets in place of hand-made ones: identical models are at 0 in the bucket too."""
    seed = fresh_seed()
    problem = make_problem(seed)
    hidden, weight = problem.hidden.float(), problem.weight.float()
    for name, temperature in product((n for n in VANISHING if n not in DENSE_ONLY), (1.0, 2.0)):
        target = linear_targets(
            hidden, weight, TopSelection(8, temperature=temperature), vocab_size=90
        )
        options = dict(alpha=1.0, tail="bucket", temperature=temperature)
        found = divergence_outcome(
            problem, target, DIVERGENCES[name], torch.ones(40), None, **options
        )
        # At another temperature the target's numbers are rescaled, which rounds.
        limit = 0.0 if temperature == 1.0 else 1e-6
        assert found.kd.abs().amax() <= limit, say(seed, name, temperature, found.kd.abs().amax())

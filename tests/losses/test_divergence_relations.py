"""Test relations between divergences, and special targets."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_kd.losses import DenseTeacher, Divergence
from megatron_kd.targets import TopSelection, linear_targets, select_targets
from tests.losses.cases import (
    Outcome,
    check,
    fresh_seed,
    hand_target,
    head_outcome,
    make_problem,
    relative_error,
    say,
)
from tests.losses.divergence_cases import (
    DENSE_ONLY,
    DIVERGENCES,
    VANISHING,
    dense_problem,
    divergence_outcome,
)

pytestmark = pytest.mark.usefixtures("small_sizes")

CHUNK = 17  # does not divide the 40 tokens


class RelationCase:
    """Hold a problem with a dense teacher, and compare the outcomes of its divergences."""

    def __init__(self) -> None:
        self.seed = fresh_seed()
        self.case = dense_problem(self.seed)
        problem = self.case.problem
        self.problem = replace(problem, labels=problem.labels.clamp(min=0))

    def run(self, divergence: Divergence, temperature: float = 1.0) -> Outcome:
        options = dict(alpha=1.0, temperature=temperature, schedule="save")
        return divergence_outcome(
            self.problem,
            self.case.teacher(torch.float64),
            divergence,
            self.problem.upstream,
            None,
            torch.float64,
            **options,
        )

    def check_equal(
        self,
        actual_outcome: Outcome,
        expected_outcome: Outcome,
        limit: float,
        *,
        factor: float = 1.0,
    ) -> None:
        actual = {
            n: relative_error(getattr(actual_outcome, n) * factor, getattr(expected_outcome, n))
            for n in ("total", "kd", "hidden", "weight")
        }
        assert max(actual.values()) < limit, say(self.seed, actual)


def test_limits_of_parameters() -> None:
    """Compare limits of the parameters with other divergences, in values and gradients."""
    case = RelationCase()
    forward, reverse = case.run(Divergence("forward_kl")), case.run(Divergence("reverse_kl"))
    case.check_equal(case.run(Divergence("alpha_beta", ab_alpha=1.0, ab_beta=0.0)), forward, 1e-12)
    case.check_equal(case.run(Divergence("alpha_beta", ab_alpha=0.0, ab_beta=1.0)), reverse, 1e-12)
    # A parameter's distance from its limit counts times the largest ratio of two probabilities:
    # 1e7 at times, a hundred at temperature 4.
    warm_forward, warm_reverse = (
        case.run(Divergence("forward_kl"), 4.0),
        case.run(Divergence("reverse_kl"), 4.0),
    )
    case.check_equal(
        case.run(Divergence("alpha_beta", ab_alpha=1.0, ab_beta=1e-9), 4.0), warm_forward, 1e-7
    )
    case.check_equal(
        case.run(Divergence("alpha_beta", ab_alpha=1e-9, ab_beta=1.0), 4.0), warm_reverse, 1e-7
    )
    case.check_equal(case.run(Divergence("skew_kl", skew=1e-12), 4.0), warm_forward, 1e-9)
    case.check_equal(case.run(Divergence("skew_reverse_kl", skew=1e-12), 4.0), warm_reverse, 1e-9)
    case.check_equal(
        case.run(Divergence("jensen_shannon", js_beta=1e-11), 4.0), warm_forward, 1e-4, factor=1e11
    )
    hot, flat = case.run(Divergence("forward_kl"), 1e4), case.run(Divergence("mse_logits"), 1e4)
    case.check_equal(flat, hot, 1e-3, factor=0.5)


def test_known_relations() -> None:
    """Compare divergences with their closed forms and with each other."""
    case = RelationCase()
    seed, problem = case.seed, case.problem
    forward = case.run(Divergence("forward_kl"))
    logits, q = problem.logits(), problem.teacher.softmax(1)
    soft = case.run(Divergence("soft_cross_entropy"))
    assert relative_error(soft.kd - forward.kd, -(q * q.log()).sum(1)) < 1e-12, say(seed)
    assert relative_error(soft.hidden, forward.hidden) < 1e-12, say(seed)
    hellinger = 4 * (1 - (q * logits.softmax(1)).sqrt().sum(1))
    assert (
        relative_error(case.run(Divergence("alpha_beta", ab_alpha=0.5, ab_beta=0.5)).kd, hellinger)
        < 1e-12
    ), say(seed)
    raw = logits - problem.teacher
    assert (
        relative_error(case.run(Divergence("mse_logits")).kd, raw.var(1, unbiased=False)) < 1e-12
    ), say(seed)
    shannon = case.run(Divergence("jensen_shannon")).kd
    assert bool((shannon > 0).all() and (shannon < torch.tensor(2.0).log()).all()), say(seed)


def test_identical_models_have_a_divergence_of_exactly_zero() -> None:
    """Check fp32 to the bit, whatever the chunks; the gradient is only rounding."""
    seed = fresh_seed()
    problem = make_problem(seed)
    teacher = DenseTeacher(problem.hidden.float(), problem.weight.float())
    for name, temperature, chunk_tokens in product(VANISHING, (1.0, 2.0), (None, CHUNK)):
        options = dict(alpha=1.0, temperature=temperature, chunk_tokens=chunk_tokens)
        upstream = torch.ones(40)
        actual = divergence_outcome(problem, teacher, DIVERGENCES[name], upstream, None, **options)
        assert not actual.kd.any(), say(seed, name, options, actual.kd.abs().amax())
        assert not actual.total.any(), say(seed, name, options, actual.kd.abs().amax())
        assert actual.hidden.abs().amax() < 1e-5, say(
            seed, name, options, actual.hidden.abs().amax()
        )


def test_hard_label() -> None:
    """Compare with cross-entropy to the teacher's argmax.

    Of equal logits it is the smaller id, and a sparse target in any order gives the same.
    """
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
            actual = divergence_outcome(
                case.problem, teacher, hard, case.problem.upstream, None, torch.float64, **options
            )
            assert relative_error(actual.kd, expected) < 1e-12, say(seed, type(teacher), tail)
    top_target = select_targets(logits, TopSelection(1))
    top = head_outcome(
        case.problem,
        top_target,
        case.problem.upstream,
        None,
        torch.float64,
        alpha=1.0,
        temperature=2.0,
    )
    options = dict(alpha=1.0, temperature=2.0, schedule="save")
    teacher = tied.teacher(torch.float64)
    actual = divergence_outcome(
        case.problem,
        teacher,
        DIVERGENCES["hard_label"],
        case.problem.upstream,
        None,
        torch.float64,
        **options,
    )
    check(actual, top, 1e-12, seed, "top 1")


def test_targets_from_the_teacher_itself() -> None:
    """Use the head's own targets: identical models are at 0 in the bucket too."""
    seed = fresh_seed()
    problem = make_problem(seed)
    hidden, weight = problem.hidden.float(), problem.weight.float()
    for name, temperature in product((n for n in VANISHING if n not in DENSE_ONLY), (1.0, 2.0)):
        target = linear_targets(
            hidden, weight, TopSelection(8, temperature=temperature), vocab_size=90
        )
        options = dict(alpha=1.0, tail="bucket", temperature=temperature)
        actual = divergence_outcome(
            problem, target, DIVERGENCES[name], torch.ones(40), None, **options
        )
        # At another temperature the target's numbers are rescaled, which rounds.
        limit = 0.0 if temperature == 1.0 else 1e-6
        assert actual.kd.abs().amax() <= limit, say(seed, name, temperature, actual.kd.abs().amax())


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
        dense, sparse = (
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
        check(sparse, dense, 1e-5, seed, name, temperature)


def test_forward_kl_is_that_of_linear_kd_cross_entropy() -> None:
    """Compare on a sparse target, also as alpha_beta(1, 0) by its terms."""
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
            actual = divergence_outcome(
                problem,
                target,
                divergence,
                problem.upstream,
                problem.mask,
                torch.float64,
                **scalars,
            )
            check(actual, expected, 1e-12, seed, divergence.name, scalars)

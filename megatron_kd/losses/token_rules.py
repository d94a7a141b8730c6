"""Decide token by token which are distilled, with what weight, and at which temperature.

Each rule takes the terms left by the rules before it and returns new ones. H is the teacher's
entropy over the whole vocabulary at temperature 1 and t the run's temperature; kept entries are
those of the sparse target, z their logits, m their number, k the weight of the distillation loss.

    EntropyRouting          k = 0 if H <= threshold: tokens of the lowest       arXiv 2509.01649
                            entropy keep their label alone
    EntropyWeight           k H / log V, or k (1 - H / log V)                   the idea: EA-KD
    NormalizedTemperature   std(z) t for each model, over the kept ids, with    NormKD; arXiv
                            its own logits                                      2410.16215 table 3
    WeightedTargets         t on the teacher alone, k times the sum of          WTTM; arXiv
                            p^(1/t) over the kept ids                           2410.16215 table 3
    EntropyTemperature      low + (high - low) (1 - h / log m), h the entropy   AdaKD_H of arXiv
                            of the kept entries rescaled                        2410.16215
    DeviationTemperature    low + (high - low) / (1 + std(z))                   AdaKD_SD of arXiv
                                                                                2410.16215
    DifficultyTemperature   t exp(-c tanh(log r)), r = d / median of d over     arXiv 2510.11615
                            the sequence, d the Hellinger distance of both
                            models; k = 0 on all but the share of tokens with
                            the largest d

The sums of NormKD and WTTM go over all ids in the papers; a target knows those that it keeps, and
with all of them kept the formulas are the same. The formulas of AdaKD_H and AdaKD_SD are not
published: the two here, and those with low and high exchanged, are this project's. arXiv 2510.11615
takes the median over a batch and adapts the share to the loss; here it is each sequence's own, so
that no layout and no restart changes it.

A new method of `distill.adaptive` is an entry of TEMPERATURE_RULES here and its declaration in
config/declarations/adaptive_methods.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_kd.losses.spec import TokenTerms
from megatron_kd.losses.student_statistics import StudentStatistics, standard_deviation
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True)
class TokenContext:
    """Hold the inputs of a token rule.

    Attributes:
        target: [S, B, K].
        mask: fp32 [S, B], 0 if a token does not count.
        entropy_threshold: fp32 scalar, the entropy at and below which tokens are routed in this
            step; None: each sequence has its own.
        student: present if any rule has `needs_student`.
    """

    target: SparseTarget
    mask: Tensor
    entropy_threshold: Tensor | None = None
    student: StudentStatistics | None = None

    @property
    def teacher_entropy(self) -> Tensor:
        """Return the teacher's entropy [S, B]; ValueError if the target does not hold it."""
        return teacher_entropy(self.target)

    @property
    def student_statistics(self) -> StudentStatistics:
        """Return the statistics that a rule with `needs_student` relies on."""
        assert self.student is not None
        return self.student


class TokenRule(ABC):
    """Change the weights or temperatures of tokens.

    Attributes:
        needs_student: True if the rule reads `TokenContext.student`, which costs one more product
            with the output weight.
    """

    needs_student: ClassVar[bool] = False

    @abstractmethod
    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return new terms; without collectives."""


@dataclass(frozen=True)
class EntropyRouting(TokenRule):
    """Leave tokens out of the distillation where the teacher's entropy is lowest.

    Attributes:
        fraction: share of each sequence's tokens, unless the step has a threshold.
        full_ce: True if the cross-entropy of those tokens has weight 1, else it is unchanged.
    """

    fraction: float
    full_ce: bool

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return the terms with kd_weight 0 on routed tokens."""
        entropy, threshold = context.teacher_entropy, context.entropy_threshold
        if threshold is None:
            threshold = lowest_fraction(entropy, context.mask, self.fraction)
        routed = entropy <= threshold
        ce = torch.where(routed, 1.0, terms.ce_weight) if self.full_ce else terms.ce_weight
        return replace(terms, ce_weight=ce, kd_weight=torch.where(routed, 0.0, terms.kd_weight))


@dataclass(frozen=True)
class EntropyWeight(TokenRule):
    """Weigh tokens by the teacher's entropy; inverse: by its confidence."""

    vocab_size: int
    inverse: bool

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return the terms with kd_weight scaled to [0, 1]."""
        share = context.teacher_entropy / math.log(self.vocab_size)
        return replace(terms, kd_weight=terms.kd_weight * (1.0 - share if self.inverse else share))


@dataclass(frozen=True)
class NormalizedTemperature(TokenRule):
    """Divide each model's logits by their own standard deviation times a factor.

    Attributes:
        factor: the run's temperature.
        squared: True to multiply the loss by the square of the teacher's temperature.
    """

    needs_student: ClassVar[bool] = True

    factor: float
    squared: bool

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return the terms with a temperature for each model."""
        target = context.target
        deviation = standard_deviation(target.logprobs, target.indices >= 0)
        teacher = _replace_zero(deviation) * self.factor
        student = _replace_zero(context.student_statistics.deviation) * self.factor
        scale = teacher**2 if self.squared else 1.0
        return replace(terms, temperature=student, teacher_temperature=teacher, kd_scale=scale)


@dataclass(frozen=True)
class WeightedTargets(TokenRule):
    """Apply the temperature to the teacher alone and weigh tokens by the sum of p^(1/t)."""

    temperature: float

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return the terms with scaled kd_weight and the teacher's temperature."""
        target = context.target
        log_q = torch.where(target.indices >= 0, target.logprobs, -torch.inf)
        weight = (log_q / self.temperature).logsumexp(-1).exp()
        return replace(
            terms,
            kd_weight=terms.kd_weight * weight,
            temperature=1.0,
            teacher_temperature=self.temperature,
        )


@dataclass(frozen=True)
class InterpolatedTemperature(TokenRule):
    """Interpolate temperatures by a measure of the teacher's distribution.

    Attributes:
        measure: map a target to [S, B] in [0, 1].
        at_one: temperature where the measure is 1.
        at_zero: temperature where the measure is 0.
        teacher_only: True if the student stays at temperature 1.
        squared: True to multiply the loss by the square of the temperature.
    """

    measure: Callable[[SparseTarget], Tensor]
    at_one: float
    at_zero: float
    teacher_only: bool
    squared: bool

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return the terms with a temperature for each token."""
        span = self.at_one - self.at_zero
        temperature = self.at_zero + span * self.measure(context.target)
        scale = temperature**2 if self.squared else 1.0
        return replace(
            terms,
            temperature=1.0 if self.teacher_only else temperature,
            teacher_temperature=temperature,
            kd_scale=scale,
        )


@dataclass(frozen=True)
class DifficultyTemperature(TokenRule):
    """Lower the temperature of tokens on which the models differ most.

    Attributes:
        temperature: of a sequence's median token.
        strength: temperatures lie within a factor of exp(strength).
        keep: share of a sequence's tokens, the hardest, that is distilled.
        squared: True to multiply the loss by the square of the temperature.
    """

    needs_student: ClassVar[bool] = True

    temperature: float
    strength: float
    keep: float
    squared: bool

    def apply(self, terms: TokenTerms, context: TokenContext) -> TokenTerms:
        """Return the terms with a temperature for each token, and kd_weight 0 on easy ones."""
        distance, mask = context.student_statistics.distance, context.mask
        # At a distance of 0 nothing is left to learn: such a token is as easy as possible, and the
        # ratio is not NaN if all tokens are at 0.
        median = lowest_fraction(distance, mask, 0.5)
        ratio = (distance / median.clamp(min=1e-12)).clamp(min=1e-12)
        temperature = self.temperature * (-self.strength * ratio.log().tanh()).exp()
        kd_weight = terms.kd_weight
        if self.keep < 1.0:
            easy = distance <= lowest_fraction(distance, mask, 1.0 - self.keep)
            kd_weight = torch.where(easy, 0.0, kd_weight)
        scale = temperature**2 if self.squared else 1.0
        return replace(
            terms,
            kd_weight=kd_weight,
            temperature=temperature,
            teacher_temperature=temperature,
            kd_scale=scale,
        )


@dataclass(frozen=True)
class TemperatureSettings:
    """Hold the settings from which a temperature rule is built.

    Attributes:
        temperature: the run's temperature.
        squared: True to multiply the loss by the square of the temperature.
        teacher_only: True if the temperature divides the teacher's logits alone.
        adaptive: the keys of `distill.adaptive` and their values.
    """

    temperature: float
    squared: bool
    teacher_only: bool
    adaptive: Mapping[str, Any]


def relative_entropy(target: SparseTarget) -> Tensor:
    """Return the entropy [S, B] of the rescaled kept entries over the log of their number.

    It is in [0, 1], and 0 for a single entry.
    """
    used = target.indices >= 0
    log_q = torch.where(used, target.logprobs, -torch.inf).log_softmax(-1)
    entropy = -(log_q.exp() * torch.where(used, log_q, 0.0)).sum(-1)
    return (entropy / used.sum(-1).clamp(min=2).to(entropy.dtype).log()).clamp(0.0, 1.0)


def bounded_deviation(target: SparseTarget) -> Tensor:
    """Return s / (1 + s) [S, B] in [0, 1), s the standard deviation of the kept logits."""
    deviation = standard_deviation(target.logprobs, target.indices >= 0)
    return deviation / (1.0 + deviation)


def _interpolated(
    settings: TemperatureSettings, measure: Callable[[SparseTarget], Tensor], *, inverse: bool
) -> TokenRule:
    low, high = settings.adaptive["minimum"], settings.adaptive["maximum"]
    at_one, at_zero = (high, low) if inverse else (low, high)
    return InterpolatedTemperature(
        measure, at_one, at_zero, settings.teacher_only, settings.squared
    )


# Method of `distill.adaptive` -> its rule.
TEMPERATURE_RULES: dict[str, Callable[[TemperatureSettings], TokenRule]] = {
    "normkd": lambda settings: NormalizedTemperature(settings.temperature, settings.squared),
    "wttm": lambda settings: WeightedTargets(settings.temperature),
    "entropy": lambda settings: _interpolated(settings, relative_entropy, inverse=False),
    "entropy_inverse": lambda settings: _interpolated(settings, relative_entropy, inverse=True),
    "deviation": lambda settings: _interpolated(settings, bounded_deviation, inverse=False),
    "deviation_inverse": lambda settings: _interpolated(settings, bounded_deviation, inverse=True),
    "adakd": lambda settings: DifficultyTemperature(
        settings.temperature,
        settings.adaptive["strength"],
        settings.adaptive["keep"],
        settings.squared,
    ),
}


def teacher_entropy(target: SparseTarget) -> Tensor:
    """Return the teacher's entropy [S, B]; ValueError if the target does not hold it."""
    if target.entropy is None:
        raise ValueError(
            "these targets do not hold the teacher's entropy, which routing and entropy weights "
            "need: extract them again with tools/cache_teacher.py"
        )
    return target.entropy


def lowest_fraction(values: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return the threshold below which lies a fraction of the counted values of each column.

    Args:
        values: [S, B].
        mask: [S, B], 0 if a value does not count.
        fraction: in [0, 1].

    Returns:
        fp32 [1, B]: the ceil(fraction * n)-th smallest of n counted values, -inf if that is none.
    """
    ordered = torch.where(mask > 0, values, torch.inf).sort(0).values
    # In fp64 and slightly less, because 0.15 * 20 is more than 3 in any binary format.
    rank = torch.ceil((mask > 0).sum(0, keepdim=True).double() * fraction - 1e-9).long()
    threshold = ordered.gather(0, (rank - 1).clamp(min=0))
    return torch.where(rank > 0, threshold, -torch.inf)


def _replace_zero(deviation: Tensor) -> Tensor:
    """Return the deviation, or 1 where all logits are equal and for a single id.

    No temperature changes such a distribution.
    """
    return torch.where(deviation > 1e-6, deviation, 1.0)

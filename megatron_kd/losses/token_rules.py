"""What differs from token to token: which are distilled, how much each counts, and at which temperature.

Each rule takes the terms that the rules before it left and returns others. H is the teacher's entropy over the whole vocabulary at
temperature 1 and t the run's temperature; kept entries are those of the sparse target, z their logits, m how many there are.

    Routing             k = 0 where H <= cut: tokens of the lowest entropy keep their label alone        arXiv 2509.01649
    EntropyWeight       k H / log V, or k (1 - H / log V)                                                the idea: EA-KD
    NormTemperature     std(z) t for each model, over the kept ids, with its own logits                  NormKD; 2410.16215 table 3
    ScaledTargets       t on the teacher alone, k times the sum of p^(1/t) over the kept ids             WTTM; 2410.16215 table 3
    ByEntropy           low + (high - low) (1 - h / log m), h the entropy of the kept entries rescaled   AdaKD_H of 2410.16215
    ByDeviation         low + (high - low) / (1 + std(z))                                                AdaKD_SD of 2410.16215
    ByDifficulty        t exp(-c tanh(log r)), r = d / median of d over the sequence, d the Hellinger    arXiv 2510.11615
                        distance of both models; k = 0 on all but the share of tokens with the largest d

NormKD's and WTTM's sums go over all ids; a target knows those that it keeps, and with all of them kept the formulas are the same. The
formulas of AdaKD_H and AdaKD_SD are not published: the two here, and those with low and high exchanged, are ours. arXiv 2510.11615 takes
the median over a batch and adapts the share to the loss; here it is each sequence's own, so that no layout and no restart changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.losses.spec import TokenTerms
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True)
class Look:
    """The student before its loss: `deviation` [S, B] of its logits at the kept ids; `distance` [S, B] from the teacher, in [0, 1]."""

    deviation: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Seen:
    """What rules decide by. target: [S, B, K]. mask: fp32 [S, B], 0 where a token does not count. cut: fp32 scalar, the entropy at and
    below which tokens are routed in this step, None where each sequence has its own. look: one more product with the output weight."""

    target: SparseTarget
    mask: Tensor
    cut: Tensor | None
    look: Callable[[], Look]


class TokenRule(Protocol):
    """One line of the module's table."""

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """Other terms; no collective but those of `seen.look`, on every rank of the tensor-parallel group alike."""


@dataclass(frozen=True)
class Routing:
    """No distillation where the teacher is surest. full_ce: the cross-entropy of those tokens counts 1, else what it did.

    fraction: of each sequence's tokens, where the step has no cut of its own.
    """

    fraction: float
    full_ce: bool

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """See TokenRule."""
        entropy = known_entropy(seen.target)
        cut = seen.cut if seen.cut is not None else lowest(entropy, seen.mask, self.fraction)
        routed = entropy <= cut
        ce = torch.where(routed, 1.0, terms.ce_weight) if self.full_ce else terms.ce_weight
        return replace(terms, ce_weight=ce, kd_weight=torch.where(routed, 0.0, terms.kd_weight))


@dataclass(frozen=True)
class EntropyWeight:
    """More weight where the teacher is unsure; inverse: where it is sure."""

    vocab_size: int
    inverse: bool

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """See TokenRule."""
        share = known_entropy(seen.target) / math.log(self.vocab_size)
        return replace(terms, kd_weight=terms.kd_weight * (1.0 - share if self.inverse else share))


@dataclass(frozen=True)
class NormTemperature:
    """Each model's logits are divided by their own standard deviation, times `factor`; `squared`: the loss times the teacher's squared."""

    factor: float
    squared: bool

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """See TokenRule."""
        # One id alone has no deviation; its distribution is the same at any temperature.
        theirs = (
            at_least_some(deviation(seen.target.logprobs, seen.target.indices >= 0)) * self.factor
        )
        ours = at_least_some(seen.look().deviation) * self.factor
        scale = theirs**2 if self.squared else 1.0
        return replace(terms, temperature=ours, teacher_temperature=theirs, kd_scale=scale)


@dataclass(frozen=True)
class ScaledTargets:
    """The teacher alone at `temperature`, and tokens weighed by what its probabilities to the power 1 / temperature add up to."""

    temperature: float

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """See TokenRule."""
        kept = torch.where(seen.target.indices >= 0, seen.target.logprobs, -torch.inf)
        weight = (kept / self.temperature).logsumexp(-1).exp()
        return replace(
            terms,
            kd_weight=terms.kd_weight * weight,
            temperature=1.0,
            teacher_temperature=self.temperature,
        )


@dataclass(frozen=True)
class Between:
    """Temperatures between `first`, where the teacher's `measure` is 1, and `last`, where it is 0. teacher_only: the student stays at 1."""

    measure: Callable[[SparseTarget], Tensor]
    first: float
    last: float
    teacher_only: bool
    squared: bool

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """See TokenRule."""
        temperature = self.last + (self.first - self.last) * self.measure(seen.target)
        scale = temperature**2 if self.squared else 1.0
        return replace(
            terms,
            temperature=1.0 if self.teacher_only else temperature,
            teacher_temperature=temperature,
            kd_scale=scale,
        )


def relative_entropy(target: SparseTarget) -> Tensor:
    """[S, B] in [0, 1]: entropy of the kept entries rescaled to 1, over the log of how many there are; 0 where there is one."""
    used = target.indices >= 0
    log_q = torch.where(used, target.logprobs, -torch.inf).log_softmax(-1)
    entropy = -(log_q.exp() * torch.where(used, log_q, 0.0)).sum(-1)
    return (entropy / used.sum(-1).clamp(min=2).to(entropy.dtype).log()).clamp(0.0, 1.0)


def bounded_deviation(target: SparseTarget) -> Tensor:
    """[S, B] in [0, 1): s / (1 + s), s the standard deviation of the kept entries' logits."""
    found = deviation(target.logprobs, target.indices >= 0)
    return found / (1.0 + found)


@dataclass(frozen=True)
class ByDifficulty:
    """Lower temperatures for tokens on which the models differ most; `keep`: the share of a sequence's tokens that is distilled."""

    temperature: float
    strength: float
    keep: float
    squared: bool

    def __call__(self, terms: TokenTerms, seen: Seen) -> TokenTerms:
        """See TokenRule."""
        distance = seen.look().distance
        # A distance of 0 is a token that nothing is left to learn from: as easy as can be, and not NaN where all are.
        ratio = (distance / lowest(distance, seen.mask, 0.5).clamp(min=1e-12)).clamp(min=1e-12)
        temperature = self.temperature * (-self.strength * ratio.log().tanh()).exp()
        kd_weight = terms.kd_weight
        if self.keep < 1.0:
            kd_weight = torch.where(
                distance <= lowest(distance, seen.mask, 1.0 - self.keep), 0.0, kd_weight
            )
        scale = temperature**2 if self.squared else 1.0
        return replace(
            terms,
            kd_weight=kd_weight,
            temperature=temperature,
            teacher_temperature=temperature,
            kd_scale=scale,
        )


def known_entropy(target: SparseTarget) -> Tensor:
    """[S, B]; ValueError where the target does not say."""
    if target.entropy is None:
        raise ValueError(
            "these targets do not hold the teacher's entropy, by which tokens are to be told apart: make them anew"
        )
    return target.entropy


def lowest(values: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The ceil(fraction * n)-th smallest of each column's n values that count, fp32 [1, B]; -inf for none of them. values, mask: [S, B]."""
    ordered = torch.where(mask > 0, values, torch.inf).sort(0).values
    # In fp64 and less a hair: 0.15 * 20 is more than 3 in any binary format.
    rank = torch.ceil((mask > 0).sum(0, keepdim=True).double() * fraction - 1e-9).long()
    found = ordered.gather(0, (rank - 1).clamp(min=0))
    return torch.where(rank > 0, found, -torch.inf)


def deviation(logits: Tensor, used: Tensor) -> Tensor:
    """Standard deviation over the last dimension of the entries `used`, divided by their number: [..., K] -> [...]."""
    count = used.sum(-1, keepdim=True).clamp(min=1)
    known = torch.where(used, logits, 0.0)
    mean = known.sum(-1, keepdim=True) / count
    return (torch.where(used, known - mean, 0.0) ** 2).sum(-1).div(count.squeeze(-1)).sqrt()


def at_least_some(deviations: Tensor) -> Tensor:
    """Where all logits are equal, and for one id alone, 1: no temperature can change such a distribution."""
    return torch.where(deviations > 1e-6, deviations, 1.0)

"""Declare the divergences between teacher and student: parameters, formula, what can serve them.

A new divergence is an entry of DIVERGENCES here and a file `losses/divergences/<name>.py` with its
function `term`. The run-file keys with their ranges and `--help`, the checks of both the run file
and the library, and the dispatch of the loss follow from the entry.

In the formulas q is the teacher's probability of an id and p the student's, both at the loss
temperature t, and d = log p - log q. Each is a sum over the ids of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

# The term of an id to which the teacher gives probability 0. "proportional": a multiple of p, so
# that such terms add up to one for all ids together; "separate": any other function of p.
MissingIdTerm = Literal["proportional", "separate", "infinite"]


@dataclass(frozen=True)
class Parameter:
    """Declare a number that a divergence depends on; its name is the key of the run file.

    Attributes:
        name: key in `[distill]`, keyword of `losses.Divergence` and of the divergence's `term`.
        default: value where the run file does not set it.
        description: help text.
        gt: exclusive lower bound, or None.
        ge: inclusive lower bound, or None.
        lt: exclusive upper bound, or None.
    """

    name: str
    default: float
    description: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None

    def check(self, value: float) -> None:
        """Raise ValueError unless `value` is finite and within the bounds."""
        above = (self.gt is None or value > self.gt) and (self.ge is None or value >= self.ge)
        below = self.lt is None or value < self.lt
        if not (above and below and math.isfinite(value)):
            raise ValueError(f"{self.name} must be {self._bounds()}, not {value}")

    def _bounds(self) -> str:
        low = f"({self.gt:g}" if self.gt is not None else f"[{self.ge or 0:g}"
        return f"in {low}, {math.inf if self.lt is None else self.lt:g})"


def _proportional(parameters: Mapping[str, float]) -> MissingIdTerm:
    return "proportional"


def _separate(parameters: Mapping[str, float]) -> MissingIdTerm:
    return "separate"


def _infinite(parameters: Mapping[str, float]) -> MissingIdTerm:
    return "infinite"


def _alpha_beta_missing(parameters: Mapping[str, float]) -> MissingIdTerm:
    if parameters["ab_alpha"] == 0.0:
        return "infinite"
    total = parameters["ab_alpha"] + parameters["ab_beta"]
    return "proportional" if abs(total - 1.0) <= 1e-9 else "separate"


@dataclass(frozen=True)
class DivergenceDeclaration:
    """Declare a divergence without its code.

    Attributes:
        formula: what is summed over the ids.
        direction: the divergence in the notation of the field.
        source: paper, and relations to other divergences.
        parameters: the numbers that `term` takes as keywords.
        sparse_tails: values of `tail` with which a sparse target can serve it; none: it needs the
            teacher's whole distribution.
        missing_id_term: kind of the term of an id with teacher probability 0, by the parameters.
        needs_top_id: True if the teacher's distribution is replaced by its most probable id.
        centred: True if log q is shifted first, so that d has mean 0 over the vocabulary.
        averaged: True if the sum is divided by the size of the vocabulary.
    """

    formula: str
    direction: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    sparse_tails: tuple[str, ...] = ("bucket", "renormalize")
    missing_id_term: Callable[[Mapping[str, float]], MissingIdTerm] = _proportional
    needs_top_id: bool = False
    centred: bool = False
    averaged: bool = False


_SKEW = Parameter(
    "skew",
    0.1,
    "skew_kl: share of the teacher in the mixture; skew_reverse_kl: of the student; in (0, 1).",
    gt=0,
    lt=1,
)

DIVERGENCES: dict[str, DivergenceDeclaration] = {
    "forward_kl": DivergenceDeclaration(
        "q (log q - log p)",
        "KL(teacher || student)",
        "Hinton et al. 2015, arXiv 1503.02531",
        sparse_tails=("drop", "renormalize", "bucket", "uniform"),
    ),
    "soft_cross_entropy": DivergenceDeclaration(
        "-q log p",
        "cross-entropy of the student under the teacher",
        'the "NLL" of arXiv 2410.16215; forward_kl plus the entropy of the teacher',
    ),
    "reverse_kl": DivergenceDeclaration(
        "p (log p - log q)",
        "KL(student || teacher)",
        "arXiv 2306.08543",
        missing_id_term=_infinite,
    ),
    "jensen_shannon": DivergenceDeclaration(
        "b q (log q - log m) + (1 - b) p (log p - log m) with m = b q + (1 - b) p, b = js_beta",
        "b KL(teacher || m) + (1 - b) KL(student || m)",
        "arXiv 2306.13649; b = 0.5 is symmetric, b -> 0 tends to b * forward_kl",
        (
            Parameter(
                "js_beta",
                0.5,
                "jensen_shannon: weight of the teacher in the mixture, in (0, 1).",
                gt=0,
                lt=1,
            ),
        ),
    ),
    "skew_kl": DivergenceDeclaration(
        "q (log q - log m) with m = s q + (1 - s) p, s = skew",
        "KL(teacher || m)",
        "arXiv 2402.03898; s -> 0 is forward_kl",
        (_SKEW,),
    ),
    "skew_reverse_kl": DivergenceDeclaration(
        "p (log p - log m) with m = s p + (1 - s) q, s = skew",
        "KL(student || m)",
        "arXiv 2402.03898; s -> 0 is reverse_kl",
        (_SKEW,),
    ),
    "alpha_beta": DivergenceDeclaration(
        "-1/(a b) [q^a p^b - a/(a+b) q^(a+b) - b/(a+b) p^(a+b)] with a = ab_alpha, b = ab_beta; "
        "b = 0: 1/a^2 [q^a log(q^a / p^a) - q^a + p^a]; a = 0: the same with q and p exchanged "
        "and b for a; a = b = 0: d^2 / 2",
        "alpha-beta divergence of teacher and student",
        "arXiv 2505.04560, after Cichocki et al. 2011 (Entropy 13); (1, 0) is forward_kl, (0, 1) "
        "reverse_kl, (0.5, 0.5) is 4 (1 - sum sqrt(p q)), Hellinger",
        (
            Parameter(
                "ab_alpha",
                0.2,
                "alpha_beta: exponent of the teacher's probabilities, >= 0.",
                ge=0,
            ),
            Parameter(
                "ab_beta",
                0.7,
                "alpha_beta: exponent of the student's probabilities, >= 0.",
                ge=0,
            ),
        ),
        missing_id_term=_alpha_beta_missing,
    ),
    "mse_logits": DivergenceDeclaration(
        "(d - mean of d)^2 / V over the V ids",
        "mean squared difference of the logits / t, both centred",
        "arXiv 1503.02531 section 2.1; mse_logits * t^2 is the limit of 2 t^2 forward_kl for a "
        "high temperature, and centred because no probability depends on the mean of the logits",
        sparse_tails=(),
        centred=True,
        averaged=True,
    ),
    "mse_probabilities": DivergenceDeclaration(
        "(q - p)^2, not divided by V: in [0, 2]",
        "squared difference of the probabilities",
        "the squared Euclidean distance of the distributions",
        missing_id_term=_separate,
    ),
    "hard_label": DivergenceDeclaration(
        "-log p of the teacher's most probable id, of equal ones the smallest",
        "forward_kl from the teacher's most probable id",
        "cross-entropy on the labels of the teacher",
        needs_top_id=True,
    ),
}

# All parameters by name; divergences may share one.
PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter
    for declaration in DIVERGENCES.values()
    for parameter in declaration.parameters
}

# Pydantic and --help read the allowed values from a Literal, which a type checker cannot compute.
if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]


def describe_divergences() -> str:
    """Return the help text of all divergences: "name: direction" of each."""
    return "; ".join(f"{name}: {one.direction}" for name, one in DIVERGENCES.items())


def sparse_problem(
    name: str, parameters: Mapping[str, float], *, tail: str, sampled: bool
) -> str | None:
    """Return the reason why a sparse target cannot serve a divergence, or None if it can.

    Under tail "renormalize", and with random samples, every id outside the kept ones has teacher
    probability 0. The terms of those ids can be summed only if they are proportional to the
    student's probability.

    Args:
        name: key of DIVERGENCES.
        parameters: the value of each parameter of that divergence.
        tail: treatment of the teacher's mass outside the kept ids.
        sampled: True if the target holds random samples of the teacher's distribution.

    Returns:
        One sentence, or None.
    """
    declaration, setting = DIVERGENCES[name], f'divergence = "{name}"'
    if not declaration.sparse_tails:
        return (
            f"{setting} compares the logits of all ids: it needs the dense teacher, not a sparse "
            "target"
        )
    if tail not in declaration.sparse_tails:
        tails = " or ".join(f'"{value}"' for value in declaration.sparse_tails)
        return f'{setting} with a sparse target takes tail = {tails}, not "{tail}"'
    if sampled and declaration.needs_top_id:
        return (
            f"{setting} needs the teacher's most probable id, which random samples do not tell: "
            "keep the top ids, or use the dense teacher"
        )
    missing = declaration.missing_id_term(parameters)
    if (tail == "bucket" and not sampled) or missing == "proportional":
        return None
    remedy = "keep the top ids" if sampled else 'use tail = "bucket"'
    cause = "with random samples" if sampled else 'with tail = "renormalize"'
    if missing == "infinite":
        return (
            f"{setting} {cause} is infinite, because the teacher's probability outside the kept "
            f"ids is 0: {remedy}, or the dense teacher"
        )
    return (
        f"{setting} {cause} has a term of its own for every id outside the kept ones: {remedy}, "
        "or the dense teacher"
    )

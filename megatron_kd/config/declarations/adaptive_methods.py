"""Declare the methods that give each token its own temperature.

A new method is an entry here and a rule of the same name in `losses/token_rules.py`
(TEMPERATURE_RULES). The values and `--help` of `distill.adaptive.method` and its checks follow
from the entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class AdaptiveMethod:
    """Declare a method of `distill.adaptive`.

    Attributes:
        description: help text that follows the name.
        sets_both_temperatures: True if the method decides itself whose logits a temperature
            divides, so that distill.temperature_on must be unset.
    """

    description: str
    sets_both_temperatures: bool = False


ADAPTIVE_METHODS: dict[str, AdaptiveMethod] = {
    "none": AdaptiveMethod("distill.temperature"),
    "normkd": AdaptiveMethod(
        "distill.temperature x standard deviation of each model's logits",
        sets_both_temperatures=True,
    ),
    "wttm": AdaptiveMethod(
        "distill.temperature on the teacher alone, and the token's loss times the sum of the "
        "teacher's probabilities to the power 1 / temperature",
        sets_both_temperatures=True,
    ),
    "entropy": AdaptiveMethod(
        "between minimum and maximum, lower for a higher entropy of the teacher"
    ),
    "entropy_inverse": AdaptiveMethod("the reverse of entropy"),
    "deviation": AdaptiveMethod(
        "between minimum and maximum, lower for a higher standard deviation of the teacher's logits"
    ),
    "deviation_inverse": AdaptiveMethod("the reverse of deviation"),
    "adakd": AdaptiveMethod(
        "distill.temperature, reduced on tokens that are hard for the student",
        sets_both_temperatures=True,
    ),
}

# Pydantic and --help read the allowed values from a Literal, which a type checker cannot compute.
if TYPE_CHECKING:
    AdaptiveMethodName = str
else:
    AdaptiveMethodName = Literal[tuple(ADAPTIVE_METHODS)]


def describe_adaptive_methods() -> str:
    """Return the help text of all methods: "name: description" of each."""
    return "; ".join(f"{name}: {method.description}" for name, method in ADAPTIVE_METHODS.items())

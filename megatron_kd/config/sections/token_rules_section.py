"""Declare the sections [distill.routing] and [distill.adaptive] of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.declarations.adaptive_methods import (
    AdaptiveMethodName,
    describe_adaptive_methods,
)
from megatron_kd.config.sections.section import Section


class RoutingSection(Section):
    """Train tokens of the lowest teacher entropy on their label alone (arXiv 2509.01649)."""

    fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of tokens that are not distilled, in [0, 1): those with the lowest teacher entropy,
    ties included.
    """
    scope: Literal["batch", "sequence"] = "batch"
    """Tokens that `fraction` refers to. batch: all tokens of the step, over all ranks. sequence:
    those of each sequence.
    """
    threshold: float | None = Field(default=None, ge=0)
    """Instead of fraction: do not distil tokens whose teacher entropy is at most this, nats."""
    ce_weight: Literal["one", "share"] = "one"
    """Weight of the cross-entropy on tokens that are not distilled. one: 1. share: the same as on
    other tokens.
    """

    @model_validator(mode="after")
    def _check(self) -> RoutingSection:
        if self.fraction and self.threshold is not None:
            raise ValueError("fraction and threshold exclude each other: unset one of them")
        return self

    @property
    def enabled(self) -> bool:
        """Return True if some tokens may not be distilled."""
        return self.fraction > 0 or self.threshold is not None


class AdaptiveSection(Section):
    """Choose a temperature for each token (formulas: losses/token_rules.py)."""

    method: AdaptiveMethodName = Field(
        default="none",
        description=f"Rule for the temperature of a token. {describe_adaptive_methods()}.",
    )
    minimum: float = Field(default=0.5, gt=0)
    """entropy, deviation: lowest temperature, > 0."""
    maximum: float = Field(default=2.0, gt=0)
    """entropy, deviation: highest temperature, at least minimum."""
    strength: float = Field(default=0.5, ge=0)
    """adakd: temperatures lie within a factor of exp(strength) of distill.temperature."""
    keep: float = Field(default=1.0, gt=0, le=1)
    """adakd: fraction of each sequence's tokens that are distilled, the hardest ones, in (0, 1]."""

    @model_validator(mode="after")
    def _check(self) -> AdaptiveSection:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) must be at most maximum ({self.maximum})")
        return self

"""Declare the [distill] section of a run file: the distillation loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.declarations.adaptive_methods import ADAPTIVE_METHODS
from megatron_kd.config.declarations.divergences import sparse_problem
from megatron_kd.config.declarations.schedules import (
    ALPHA_SCHEDULES,
    AlphaScheduleName,
    describe_schedules,
)
from megatron_kd.config.sections.divergence_section import DivergenceSection, divergence_parameters
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair
from megatron_kd.config.sections.section import Section
from megatron_kd.config.sections.token_rules_section import AdaptiveSection, RoutingSection


class AlphaSection(Section):
    """Hold the keys that weight the losses."""

    weights: Literal["mix", "keep_ce", "keep_kd"] = "mix"
    """Weights of the cross-entropy and of the distillation loss. mix: 1 - alpha and alpha. keep_ce:
    1 and alpha. keep_kd: 1 - alpha and 1.
    """

    alpha: float = Field(default=0.9, ge=0, le=1)
    """Largest weight of the distillation loss, in [0, 1]. Unused without a teacher."""
    alpha_schedule: AlphaScheduleName = Field(
        default="constant",
        description=f"Alpha over the run. {describe_schedules(ALPHA_SCHEDULES)}.",
    )
    alpha_period_fraction: float = Field(default=0.2, gt=0, le=1)
    """period: length of one period as a fraction of train.steps, in (0, 1]."""
    alpha_warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """wsd, wsd_ce: length of the warm-up as a fraction of train.steps, in [0, 1]."""
    alpha_decay_fraction: float = Field(default=0.01, ge=0, le=1)
    """wsd, wsd_ce: length of the decay as a fraction of train.steps, in [0, 1]."""


class DistillSection(DivergenceSection, AlphaSection):
    """Set the distillation loss.

    total = (1 - alpha) * ce + alpha * kd + z_loss * logsumexp^2 + hidden_states, nats per token.
    """

    dense: bool = False
    """Compare whole distributions instead of sparse targets. The teacher's final hidden states are
    kept for the step: [tokens per step on this rank] x [teacher's hidden_size] values of
    train.precision, divided by parallel.tensor with sequence_parallel. Online teacher only.
    """
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distillation loss, > 0: it divides the logits of the models that
    temperature_on names.
    """
    temperature_on: Literal["both", "teacher"] = "both"
    """Models whose logits the temperature divides. both: teacher and student. teacher: the teacher
    only.
    """
    temperature_squared: bool = False
    """Multiply the distillation loss by the square of the teacher's temperature."""
    top_k: int = Field(default=64, gt=0)
    """Number of most probable teacher ids to keep per token, at most vocab_size."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of these, keep the fewest entries whose teacher probabilities add up to top_p, in (0, 1]."""
    truncate: Literal["tempered", "untempered"] = "tempered"
    """Temperature at which top_p measures probability. tempered: distill.temperature (arXiv
    2605.23857). untempered: 1 (arXiv 2410.16215).
    """
    min_k: int = Field(default=1, gt=0)
    """Smallest number of entries to keep per token, at most top_k."""
    num_draws: int | None = Field(default=None, gt=0)
    """Sample this many ids per token from the teacher's distribution, at distill.temperature,
    instead of keeping the most probable ids. The samples are unbiased and depend only on
    train.seed, the sequence and the position. Unset: top_k and top_p select the ids.
    """
    draws: Literal["counts", "probabilities"] = "counts"
    """num_draws: target probability of a sampled id. counts: the share of samples that hit it
    (unbiased, arXiv 2503.16870). probabilities: the teacher's probability, rescaled to a sum of 1
    (the wording of arXiv 2503.19786).
    """
    draw_power: float = Field(default=1.0, gt=0)
    """num_draws: sample in proportion to the teacher's probabilities to this power; counts are
    reweighted accordingly.
    """
    tail: Literal["drop", "renormalize", "bucket", "uniform", "label"] = "renormalize"
    """Treatment of the teacher's probability outside the kept entries. drop: ignore it.
    renormalize: rescale the kept probabilities to a sum of 1. bucket: one further entry for teacher
    and student. uniform: spread it evenly over the other ids. label: add it to the label.
    """
    routing: RoutingSection = Field(default_factory=RoutingSection)
    """Tokens that are not distilled."""
    adaptive: AdaptiveSection = Field(default_factory=AdaptiveSection)
    """A temperature for each token."""
    token_weight: Literal["uniform", "entropy", "confidence"] = "uniform"
    """Weight of a token's distillation loss. uniform: 1. entropy: the teacher's entropy /
    log(vocab_size). confidence: 1 - that ratio.
    """
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the squared logsumexp of the student's logits, >= 0."""
    hidden_states: tuple[HiddenStatesPair, ...] = ()
    """Pairs of layers whose outputs (the residual stream, before the final norm) are compared as
    well, independently of alpha. Each entry has student_layer, teacher_layer, loss ("mse" or
    "cosine") and weight. A learned projection maps the student to the teacher where their widths
    differ. Needs an online teacher in the student's layout. Memory: [tokens per step on this rank]
    x [teacher's hidden_size] values of train.precision for each teacher layer, twice that while
    they move to another pipeline stage.
    """
    head_schedule: Literal["auto", "save", "chunk", "direct", "recompute"] = "auto"
    """Memory strategy of the output head (package megatron_kd.head). save: keep all logits. chunk:
    form gradients chunk by chunk in the forward pass. direct: least memory at full speed.
    recompute: least memory, at the cost of one more matrix product. auto: save if all logits are
    few, else chunk.
    """
    chunk_tokens: int | None = Field(default=None, gt=0)
    """Tokens whose logits exist at one time in the output head. Unset: chosen from the size of the
    vocabulary shard, never from free memory.
    """

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        self._check_selection()
        if self.dense:
            self._check_dense()
        else:
            self._check_divergence()
        self._check_truncation()
        self._check_adaptive()
        warmup, decay = self.alpha_warmup_fraction, self.alpha_decay_fraction
        if warmup + decay > 1:
            raise ValueError(
                f"alpha_warmup_fraction ({warmup}) + alpha_decay_fraction ({decay}) must be at "
                "most 1"
            )
        return self

    def _check_selection(self) -> None:
        """Refuse keys that the selection of target ids does not use."""
        sampled = self.num_draws is not None
        if self.min_k > self.top_k:
            raise ValueError(f"min_k ({self.min_k}) must be at most top_k ({self.top_k})")
        if sampled and self._changed("top_k", "top_p", "min_k"):
            raise ValueError(
                "num_draws draws at random: leave top_k, top_p and min_k unset, or unset num_draws"
            )
        if not sampled and self._changed("draws", "draw_power"):
            raise ValueError(
                "draws and draw_power apply to samples: set num_draws, or unset both of them"
            )
        if sampled and self.tail in ("bucket", "uniform", "label"):
            raise ValueError(
                f'tail = "{self.tail}" needs the probability outside the kept ids, which samples '
                'do not measure: use "renormalize"'
            )

    def _check_dense(self) -> None:
        if self._changed("top_k", "top_p", "min_k", "truncate", "num_draws", "tail"):
            raise ValueError(
                "dense compares whole distributions: leave top_k, top_p, min_k, truncate, "
                "num_draws and tail unset"
            )
        if self.by_token:
            raise ValueError(
                "dense compares all tokens alike: leave routing, adaptive and token_weight unset, "
                "or unset dense"
            )
        if self.head_schedule == "recompute":
            raise ValueError(
                'dense cannot be served by head_schedule = "recompute": the teacher\'s logits '
                "exist once"
            )

    def _check_divergence(self) -> None:
        """Refuse a divergence that sparse targets of this selection cannot serve."""
        problem = sparse_problem(
            self.divergence,
            divergence_parameters(self),
            tail=self.loss_tail,
            sampled=self.num_draws is not None,
        )
        if problem is not None:
            raise ValueError(f"{problem} (dense = true)" if "dense teacher" in problem else problem)

    def _check_truncation(self) -> None:
        """Refuse a temperature at which the tail's probability is not known."""
        if self.temperature == 1.0:
            return
        if self.truncate == "untempered" and self.loss_tail != "renormalize":
            raise ValueError(
                'truncate = "untempered" measures the kept probability at temperature 1, but '
                f'tail = "{self.tail}" needs it at distill.temperature'
            )
        if self.tail == "label":
            raise ValueError(
                'tail = "label" gives the label the probability of the other ids at temperature 1: '
                "set temperature = 1"
            )

    def _check_adaptive(self) -> None:
        method = self.adaptive.method
        if method != "none" and (self.tail != "renormalize" or self.num_draws is not None):
            raise ValueError(
                f'adaptive.method = "{method}" needs the most probable ids and '
                'tail = "renormalize": unset num_draws and tail'
            )
        if ADAPTIVE_METHODS[method].sets_both_temperatures and self.temperature_on != "both":
            raise ValueError(
                f'adaptive.method = "{method}" itself chooses the models whose temperature it '
                "sets: leave temperature_on unset"
            )

    @property
    def loss_tail(self) -> str:
        """Return `tail` as the loss sees it: "label" is already part of the target."""
        return "renormalize" if self.tail == "label" else self.tail

    @property
    def by_token(self) -> bool:
        """Return True if weights or temperatures differ from token to token."""
        adaptive = self.adaptive.method != "none"
        return self.routing.enabled or adaptive or self.token_weight != "uniform"

    def _changed(self, *names: str) -> bool:
        """Return True if a key differs from its default; a dumped run file sets every key."""
        fields = type(self).model_fields
        return any(getattr(self, name) != fields[name].default for name in names)

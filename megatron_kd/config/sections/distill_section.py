"""The `[distill]` table of a run file: the distillation loss, token by token and over the run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.divergences import sparse_problem
from megatron_kd.config.schedules import ALPHA_SCHEDULES, AlphaScheduleName, describe_schedules
from megatron_kd.config.sections.divergence_section import DivergenceSection, divergence_parameters
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair
from megatron_kd.config.sections.section import Section

AdaptiveMethod = Literal[
    "none",
    "normkd",
    "wttm",
    "entropy",
    "entropy_inverse",
    "deviation",
    "deviation_inverse",
    "adakd",
]


class RoutingSection(Section):
    """Tokens that are not distilled: those of the lowest teacher entropy (arXiv 2509.01649)."""

    fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the tokens with the lowest teacher entropy, in [0, 1); ties too.",
    )
    scope: Literal["batch", "sequence"] = Field(
        default="batch",
        description="Of which tokens `fraction` is a share: all of a step, over all ranks; or each sequence's own.",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        description="In place of fraction: route every token whose teacher entropy is at most this, nats.",
    )
    ce_weight: Literal["one", "share"] = Field(
        default="one",
        description="Weight of the cross-entropy on routed tokens: 1; or what it is on the others.",
    )

    @model_validator(mode="after")
    def _check(self) -> RoutingSection:
        if self.fraction and self.threshold is not None:
            raise ValueError(
                "fraction and threshold both say which tokens are routed: unset one of them"
            )
        return self

    @property
    def routes(self) -> bool:
        """Whether any token may be."""
        return self.fraction > 0 or self.threshold is not None


class AdaptiveSection(Section):
    """A temperature for each token (formulas: losses/token_rules.py)."""

    method: AdaptiveMethod = Field(
        default="none",
        description="none: distill.temperature for all. normkd: it times the standard deviation of each model's logits. wttm: on the "
        "teacher alone, and the token's loss times the sum of p^(1/temperature). entropy, deviation: between maximum and minimum, the "
        "lower the more of it the teacher has; _inverse: the other way round. adakd: distill.temperature, lower for tokens that are hard "
        "for the student.",
    )
    minimum: float = Field(
        default=0.5, gt=0, description="entropy, deviation: lowest temperature, > 0."
    )
    maximum: float = Field(
        default=2.0, gt=0, description="entropy, deviation: highest temperature, at least minimum."
    )
    strength: float = Field(
        default=0.5, ge=0, description="adakd: temperatures lie within a factor of exp(strength)."
    )
    keep: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="adakd: share of each sequence's tokens, the hardest, that are distilled.",
    )

    @model_validator(mode="after")
    def _check(self) -> AdaptiveSection:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) must be at most maximum ({self.maximum})")
        return self


class AlphaSection(Section):
    """The keys that weigh the losses."""

    weights: Literal["mix", "keep_ce", "keep_kd"] = Field(
        default="mix",
        description="What the losses count. mix: 1 - alpha and alpha; keep_ce: 1 and alpha; keep_kd: 1 - alpha and 1.",
    )

    alpha: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Largest weight of the distillation loss, in [0, 1]. Unused without a teacher.",
    )
    alpha_schedule: AlphaScheduleName = Field(
        default="constant",
        description=f"Alpha over the run. {describe_schedules(ALPHA_SCHEDULES)}.",
    )
    alpha_period_fraction: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="period: share of the steps of one turn, alpha in its first half, in (0, 1].",
    )
    alpha_warmup_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="wsd, wsd_ce: share of the steps of the warm-up, in [0, 1].",
    )
    alpha_decay_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="wsd, wsd_ce: share of the steps of the decay, in [0, 1].",
    )


class DistillSection(DivergenceSection, AlphaSection):
    """The distillation loss: total = (1 - alpha) * ce + alpha * kd + z_loss * logsumexp^2 + hidden_states, nats per token."""

    dense: bool = Field(
        default=False,
        description="Compare the whole distributions: the teacher's final hidden states are kept for the step in place of sparse targets, "
        "[tokens per step on this rank] x [teacher's hidden_size] values of train.precision, of which sequence_parallel holds its "
        "slice. Online teacher only.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Divides the logits of temperature_on in the distillation loss, > 0.",
    )
    temperature_on: Literal["both", "teacher"] = Field(
        default="both", description="Whose logits temperature divides: both models'; the teacher's."
    )
    temperature_squared: bool = Field(
        default=False, description="Multiply the distillation loss by the teacher's temperature^2."
    )
    top_k: int = Field(
        default=64,
        gt=0,
        description="Teacher entries kept per token over the whole vocabulary, at most vocab_size.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Then keep the smallest prefix whose teacher mass reaches top_p, in (0, 1].",
    )
    truncate: Literal["tempered", "untempered"] = Field(
        default="tempered",
        description="Where top_p's mass is measured: tempered: at temperature (arXiv 2605.23857); untempered: at 1 (arXiv 2410.16215).",
    )
    min_k: int = Field(
        default=1, gt=0, description="Never keep fewer entries than this, at most top_k."
    )
    num_draws: int | None = Field(
        default=None,
        gt=0,
        description="Draw this many ids per token at random from the teacher (at temperature) in place of taking the likeliest: unbiased. "
        "Unset: top_k, top_p. The draws depend on train.seed, the sample and the position alone.",
    )
    draws: Literal["counts", "probabilities"] = Field(
        default="counts",
        description="What drawn ids get: how often they were drawn (unbiased, arXiv 2503.16870); or the teacher's own probabilities, "
        "rescaled to 1 (as arXiv 2503.19786 words it).",
    )
    draw_power: float = Field(
        default=1.0,
        gt=0,
        description="Draw in proportion to the teacher's probabilities to this power; counts are weighed back.",
    )
    tail: Literal["drop", "renormalize", "bucket", "uniform", "label"] = Field(
        default="renormalize",
        description="Teacher mass outside the kept entries: drop it; rescale the kept mass to 1; one bucket on both sides; spread evenly "
        "over the other ids; give it to the label.",
    )
    routing: RoutingSection = Field(
        default_factory=RoutingSection, description="Tokens that are not distilled."
    )
    adaptive: AdaptiveSection = Field(
        default_factory=AdaptiveSection, description="A temperature for each token."
    )
    token_weight: Literal["uniform", "entropy", "confidence"] = Field(
        default="uniform",
        description="What a token's distillation loss counts: 1; the teacher's entropy / log(vocab_size); or 1 less that.",
    )
    z_loss: float = Field(
        default=0.0, ge=0, description="Coefficient of the squared logsumexp of the student, >= 0."
    )
    hidden_states: tuple[HiddenStatesPair, ...] = Field(
        default=(),
        description="Layers whose outputs (the residual stream, before the final norm) are compared too, whatever alpha is: "
        'student_layer, teacher_layer, loss "mse" or "cosine", weight; through a learned projection where the widths differ. Online '
        "teacher in the student's layout only. Kept for the step: [tokens per step on this rank] x [teacher's hidden_size] values of "
        "train.precision for each teacher layer, and twice that while they go to another pipeline stage.",
    )
    head_schedule: Literal["auto", "save", "chunk", "direct", "recompute"] = Field(
        default="auto",
        description="When the output head forms its gradients (losses/head.py). auto: save where all logits are few, else chunk. direct: "
        "least memory at full speed. recompute: least memory of all, one product more.",
    )
    chunk_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens whose logits exist at one time in the output head. Unset: chosen from the vocabulary shard, never from free "
        "memory.",
    )

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        if self.min_k > self.top_k:
            raise ValueError(f"min_k ({self.min_k}) must be at most top_k ({self.top_k})")
        if self.num_draws is not None and self._changed("top_k", "top_p", "min_k"):
            raise ValueError(
                "num_draws draws at random: leave top_k, top_p and min_k unset, or unset num_draws"
            )
        if self.num_draws is None and self._changed("draws", "draw_power"):
            raise ValueError(
                "draws and draw_power say how ids are drawn: set num_draws, or unset them"
            )
        if self.num_draws is not None and self.tail in ("bucket", "uniform", "label"):
            raise ValueError(
                f'tail = "{self.tail}" needs the mass outside the kept ids, which draws do not know: use "renormalize"'
            )
        self._check_divergence()
        self._check_tokens()
        warmup, decay = self.alpha_warmup_fraction, self.alpha_decay_fraction
        if warmup + decay > 1:
            raise ValueError(
                f"alpha_warmup_fraction ({warmup}) + alpha_decay_fraction ({decay}) must be at most 1"
            )
        return self

    def _check_divergence(self) -> None:
        if self.dense:
            if self._changed("top_k", "top_p", "min_k", "truncate", "num_draws", "tail"):
                raise ValueError(
                    "dense compares whole distributions: leave top_k, top_p, min_k, truncate, num_draws and tail unset"
                )
            if self.by_token:
                raise ValueError(
                    "dense compares all tokens alike: leave routing, adaptive and token_weight unset, or unset dense"
                )
            if self.head_schedule == "recompute":
                raise ValueError(
                    'dense cannot be served by head_schedule = "recompute": the teacher\'s logits exist once'
                )
            return
        sampled = self.num_draws is not None
        problem = sparse_problem(
            self.divergence,
            divergence_parameters(self),
            tail=self.loss_tail,
            sampled=sampled,
        )
        if problem is not None:
            raise ValueError(f"{problem} (dense = true)" if "dense teacher" in problem else problem)

    def _check_tokens(self) -> None:
        """What a target must hold for temperatures and tails."""
        if (
            self.truncate == "untempered"
            and self.temperature != 1.0
            and self.loss_tail != "renormalize"
        ):
            raise ValueError(
                f'truncate = "untempered" measures the kept mass at temperature 1: tail = "{self.tail}" needs it at temperature'
            )
        if self.tail == "label" and self.temperature != 1.0:
            raise ValueError(
                'tail = "label" gives the label what the teacher gave others, at temperature 1: set temperature = 1'
            )
        method = self.adaptive.method
        if method != "none" and (self.tail != "renormalize" or self.num_draws is not None):
            raise ValueError(
                f'adaptive.method = "{method}" needs the likeliest ids and tail = "renormalize": unset num_draws and tail'
            )
        if method in ("normkd", "wttm", "adakd") and self.temperature_on != "both":
            raise ValueError(
                f'adaptive.method = "{method}" says itself whose temperature it sets: leave temperature_on unset'
            )

    @property
    def loss_tail(self) -> str:
        """`tail` for the loss; what "label" gives away is in the target by then."""
        return "renormalize" if self.tail == "label" else self.tail

    @property
    def by_token(self) -> bool:
        """Whether weights or temperatures differ from token to token."""
        return (
            self.routing.routes or self.adaptive.method != "none" or self.token_weight != "uniform"
        )

    def _changed(self, *names: str) -> bool:
        """Whether any of these differs from its default: a dumped run file writes all of them."""
        fields = type(self).model_fields
        return any(getattr(self, name) != fields[name].default for name in names)

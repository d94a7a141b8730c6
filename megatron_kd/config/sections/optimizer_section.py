"""Declare the [optimizer] section of a run file."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_kd.config.declarations.schedules import (
    LEARNING_RATE_SCHEDULES,
    LearningRateScheduleName,
    describe_schedules,
)
from megatron_kd.config.sections.section import Section


class OptimizerSection(Section):
    """Set Adam with decoupled weight decay and its learning-rate schedule."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the learning-rate schedule, at most learning_rate."""
    schedule: LearningRateScheduleName = Field(
        default="cosine",
        description=f"Learning rate after warm-up. {describe_schedules(LEARNING_RATE_SCHEDULES)}.",
    )
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up of the learning rate from 0."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd: steps of cosine decay at the end of the run."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay rate of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Adam's decay rate of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Coefficient of decoupled weight decay. Norms and biases do not decay."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradient; a larger gradient is scaled down to it. 0: no clipping.
    """
    distributed: bool = False
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must be at most learning_rate "
                f"({self.learning_rate})"
            )
        if LEARNING_RATE_SCHEDULES[self.schedule].uses_decay_steps and self.decay_steps == 0:
            raise ValueError(f'schedule = "{self.schedule}" needs optimizer.decay_steps > 0')
        return self

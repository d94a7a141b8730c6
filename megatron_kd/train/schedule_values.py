"""Evaluate the learning-rate and alpha schedules that config/declarations/schedules.py declares."""

from __future__ import annotations

from megatron_kd.config import DistillSection, OptimizerSection
from megatron_kd.config.declarations.schedules import ALPHA_SCHEDULES, LEARNING_RATE_SCHEDULES


def learning_rate_at(step: int, steps: int, section: OptimizerSection) -> float:
    """Return the learning rate of an update.

    Args:
        step: Finished updates: 0 for the first update of a run.
        steps: Updates of the whole run.
        section: The `[optimizer]` table of the run file.
    """
    if step < section.warmup_steps:
        # step + 1, so that the first update has an effect.
        return section.learning_rate * (step + 1) / section.warmup_steps
    return LEARNING_RATE_SCHEDULES[section.schedule].formula(step, steps, section)


def alpha_at(step: int, steps: int, section: DistillSection) -> float:
    """Return alpha, the weight of the distillation loss, of an update.

    Args:
        step: Finished updates: 0 for the first update of a run.
        steps: Updates of the whole run.
        section: The `[distill]` table of the run file.
    """
    return ALPHA_SCHEDULES[section.alpha_schedule].formula(step, steps, section)

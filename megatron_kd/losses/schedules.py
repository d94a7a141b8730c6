"""Learning rate and alpha as functions of the step alone: resuming needs no saved schedule state.

`step` counts finished updates: the first update of a run uses step 0.
"""

from __future__ import annotations

import math

from megatron_kd.config import DistillSection, OptimizerSection


def learning_rate_at(step: int, steps: int, section: OptimizerSection) -> float:
    """Learning rate of update `step` of `steps`.

    Linear warm-up: (step + 1) / warmup_steps of the peak, so that the first update is not lost. Then cosine or linear from
    the peak to min_learning_rate, reached by the last update; constant; or wsd: constant, and a cosine over decay_steps.
    """
    peak, floor = section.learning_rate, section.min_learning_rate
    if step < section.warmup_steps:
        return peak * (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return peak
    start = steps - section.decay_steps if section.schedule == "wsd" else section.warmup_steps
    if step < start:
        return peak
    progress = min(1.0, (step - start + 1) / max(1, steps - start))
    if section.schedule == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def alpha_at(step: int, steps: int, section: DistillSection) -> float:
    """Weight of the distillation loss in update `step` of `steps`.

    constant: alpha. linear_up / linear_down: 0 to alpha / alpha to 0 over the run. wsd: linear warm-up over
    alpha_warmup_fraction, alpha, cosine decay to 0 over the last alpha_decay_fraction (the shape of arXiv 2410.16215).
    """
    alpha, last = section.alpha, max(1, steps - 1)
    if section.alpha_schedule == "linear_up":
        return alpha * step / last
    if section.alpha_schedule == "linear_down":
        return alpha * (1.0 - step / last)
    if section.alpha_schedule == "wsd":
        warmup, decay = round(section.alpha_warmup_fraction * steps), round(section.alpha_decay_fraction * steps)
        if step < warmup:
            return alpha * (step + 1) / warmup
        if step >= steps - decay:
            return alpha * 0.5 * (1.0 + math.cos(math.pi * (step - (steps - decay) + 1) / decay))
    return alpha

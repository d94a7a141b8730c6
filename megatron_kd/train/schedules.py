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
    """Alpha of update `step` of `steps`; arXiv 2410.16215 names the schedules, and gives the shape of wsd alone.

    constant: alpha. linear_up / linear_down: 0 to alpha / alpha to 0 over the run. period: alpha in the first half of every
    alpha_period_fraction of the steps, 0 in the second. wsd: linear warm-up over alpha_warmup_fraction, alpha, cosine decay to 0 over
    the last alpha_decay_fraction. wsd_ce: 1 less that, so that the cross-entropy has the shape.
    """
    alpha, last = section.alpha, max(1, steps - 1)
    if section.alpha_schedule == "linear_up":
        return alpha * step / last
    if section.alpha_schedule == "linear_down":
        return alpha * (1.0 - step / last)
    if section.alpha_schedule == "period":
        # Whole steps, so that no rounding moves a turn: the half of a period that this step is in.
        half = max(1, round(section.alpha_period_fraction * steps / 2))
        return alpha if step // half % 2 == 0 else 0.0
    if section.alpha_schedule == "wsd":
        return alpha * _warm_stable_decay(step, steps, section)
    if section.alpha_schedule == "wsd_ce":
        return 1.0 - alpha * _warm_stable_decay(step, steps, section)
    return alpha


def _warm_stable_decay(step: int, steps: int, section: DistillSection) -> float:
    warmup, decay = (
        round(section.alpha_warmup_fraction * steps),
        round(section.alpha_decay_fraction * steps),
    )
    if step < warmup:
        return (step + 1) / warmup
    if step >= steps - decay:
        return 0.5 * (1.0 + math.cos(math.pi * (step - (steps - decay) + 1) / decay))
    return 1.0

"""What [distill] asks for token by token: the rules of the objective, and the one thing about them that a whole step decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_kd.config import DistillSection
from megatron_kd.data.batches import Microbatch
from megatron_kd.losses.token_rules import (
    TEMPERATURE_RULES,
    EntropyRouting,
    EntropyWeight,
    TemperatureSettings,
    TokenRule,
    lowest_fraction,
    teacher_entropy,
)
from megatron_kd.parallel.collectives import all_gather
from megatron_kd.parallel.groups import Groups
from megatron_kd.targets import Target
from megatron_kd.targets.sparse import SparseTarget

# The entropy at and below which tokens of a step are routed, fp32 scalar; None where the step has none.
CutOf = Callable[[Sequence[Microbatch], Sequence[Target | None]], Tensor | None]


def token_rules(distill: DistillSection, vocab_size: int) -> tuple[TokenRule, ...]:
    """Return the rules of a run: temperatures, then weights, then which tokens are distilled."""
    rules: list[TokenRule] = []
    if distill.adaptive.method != "none":
        settings = TemperatureSettings(
            distill.temperature,
            distill.temperature_squared,
            distill.temperature_on == "teacher",
            distill.adaptive.model_dump(),
        )
        rules.append(TEMPERATURE_RULES[distill.adaptive.method](settings))
    if distill.token_weight != "uniform":
        rules.append(EntropyWeight(vocab_size, inverse=distill.token_weight == "confidence"))
    if distill.routing.enabled:
        full_ce = distill.routing.ce_weight == "one"
        rules.append(EntropyRouting(distill.routing.fraction, full_ce=full_ce))
    return tuple(rules)


def cut_of(distill: DistillSection, groups: Groups) -> CutOf:
    """How a step finds its cut; under routing.scope = "batch" with one all-gather of the teacher's entropies over the data-parallel
    group of the last stage: 4 bytes per token of the step."""
    routing = distill.routing
    if routing.threshold is not None:
        threshold = torch.tensor(routing.threshold, device=groups.platform.device)
        return lambda microbatches, targets: threshold
    if not routing.enabled or routing.scope == "sequence":
        return lambda microbatches, targets: None

    def cut(microbatches: Sequence[Microbatch], targets: Sequence[Target | None]) -> Tensor | None:
        if not groups.is_last_stage:
            return None
        sparse = [target for target in targets if isinstance(target, SparseTarget)]
        entropy = torch.cat([teacher_entropy(target).flatten().float() for target in sparse])
        counts = torch.cat([microbatch.loss_mask.t().flatten() for microbatch in microbatches])
        group = groups.collection.dp if groups.data_size > 1 else None
        # Of a token that does not count: infinite, so that one tensor says both.
        everyone = all_gather(torch.where(counts > 0, entropy, torch.inf), group).reshape(-1, 1)
        return lowest_fraction(
            everyone, torch.isfinite(everyone).float(), routing.fraction
        ).squeeze()

    return cut

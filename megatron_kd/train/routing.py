"""Build the token rules of [distill], and find the routing threshold of a whole step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kd.config import DistillSection
from megatron_kd.config.sections.token_rules_section import RoutingSection
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


class RoutingThreshold:
    """Find the teacher entropy at and below which the tokens of a step are routed to their labels.

    Args:
        routing: [distill.routing].
        groups: of the run.
    """

    def __init__(self, routing: RoutingSection, groups: Groups) -> None:
        self._routing, self._groups = routing, groups
        self._fixed = None
        if routing.threshold is not None:
            self._fixed = torch.tensor(routing.threshold, device=groups.platform.device)
        self._of_batch = (
            routing.threshold is None and routing.enabled and routing.scope != "sequence"
        )

    def of_step(
        self, microbatches: Sequence[Microbatch], targets: Sequence[Target | None]
    ) -> Tensor | None:
        """Return the threshold in nats, fp32 scalar; None if the step as a whole has none.

        Args:
            microbatches: of the step.
            targets: of the microbatches.

        Collectives:
            Under routing.scope = "batch" one all-gather of the teacher's entropies over the
            data-parallel group of the last stage, 4 bytes per token of the step.
        """
        if not self._of_batch or not self._groups.is_last_stage:
            return self._fixed
        sparse = [target for target in targets if isinstance(target, SparseTarget)]
        entropy = torch.cat([teacher_entropy(target).flatten().float() for target in sparse])
        counts = torch.cat([microbatch.loss_mask.t().flatten() for microbatch in microbatches])
        group = self._groups.collection.dp if self._groups.data_size > 1 else None
        # Tokens that do not count get infinity, so that one tensor holds both.
        gathered = all_gather(torch.where(counts > 0, entropy, torch.inf), group).reshape(-1, 1)
        valid = torch.isfinite(gathered).float()
        return lowest_fraction(gathered, valid, self._routing.fraction).squeeze()

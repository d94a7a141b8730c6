"""Compare a cache with its teacher, by running random samples through the live teacher again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.cache import CacheReader
from megatron_kd.targets.sample_keys import sample_key
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.extract import ShardPlan, make_microbatches
from megatron_kd.teacher.teacher import Teacher

# Mean total variation of a sample's tokens. Quantised values are within 0.006 (KL 7e-5), bf16
# logits of another machine or layout within about as much again; another teacher, or another
# checkpoint of this one, is tenths away.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Recheck:
    """Hold the result of a comparison.

    Attributes:
        distances: by the sample's number in the data, the mean over its tokens of the total
            variation between the stored and the live target, in [0, 1].
        missing: numbers of chosen samples that are not in the cache.
    """

    distances: dict[int, float]
    missing: list[int]

    @property
    def wrong(self) -> dict[int, float]:
        """Return the distances past TOLERANCE."""
        return {
            sample: distance
            for sample, distance in self.distances.items()
            if not distance <= TOLERANCE
        }


def recheck(
    teacher: Teacher,
    reader: CacheReader,
    plan: ShardPlan,
    *,
    samples: int,
    seed: int,
    device: torch.device,
) -> Recheck | None:
    """Compare random samples of a plan.

    Args:
        teacher: gives the live targets.
        reader: the cache.
        plan: the data of the cache.
        samples: how many to compare.
        seed: of their choice.
        device: where the teacher runs.

    Returns:
        The comparison; None on ranks off the teacher's last stage.

    Collectives:
        Over the teacher's model-parallel ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(plan.num_samples, generator=generator)[:samples].sort().values.tolist()
    tokens = {number: plan.sample(number) for number in chosen}
    missing = [number for number in chosen if reader.missing([sample_key(tokens[number])])]
    stored = [number for number in chosen if number not in missing]
    within = reader.identity.document_attention == "within"
    live_targets = {
        number: teacher.targets([microbatch])[0]
        for number in stored
        for _, microbatch in make_microbatches([tokens[number]], 1, device, within)
    }
    distances = {}
    for number, target in live_targets.items():
        if target is None:
            return None
        assert isinstance(target, SparseTarget)
        live = target.map(lambda tensor: tensor[:, 0].cpu())
        distances[number] = float(total_variation(reader.get(tokens[number]), live).mean())
    return Recheck(distances, missing)


def total_variation(first: SparseTarget, second: SparseTarget) -> Tensor:
    """Return [S], half the sum of absolute differences between kept distributions.

    Args:
        first: [S, K], rescaled to 1.
        second: [S, L], rescaled to 1.
    """
    ids = torch.cat((first.indices, second.indices), 1).long()
    probabilities = torch.cat(
        (first.logprobs.double().softmax(1), -second.logprobs.double().softmax(1)), 1
    )
    order = ids.argsort(dim=1, stable=True)
    ids, probabilities = ids.gather(1, order), probabilities.gather(1, order)
    # An id occurs once or twice per token, side by side: a pair counts by its difference.
    is_second = torch.zeros_like(ids, dtype=torch.bool)
    is_second[:, 1:] = ids[:, 1:] == ids[:, :-1]
    following = torch.where(is_second.roll(-1, 1), probabilities.roll(-1, 1), 0.0)
    differences = (probabilities + following).abs()
    return 0.5 * torch.where(is_second, 0.0, differences).sum(1)

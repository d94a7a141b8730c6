"""Whether a cache says what the teacher says: random samples once more through the live teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.cache import CacheReader
from megatron_kd.targets.keys import sample_key
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.extract import ShardPlan, microbatches
from megatron_kd.teacher.source import TeacherSource

# Mean total variation of a sample's tokens. Quantised values are within 0.006 (KL 7e-5), bf16 logits of another machine or layout
# within about as much again; another teacher, or another checkpoint of this one, is tenths away.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Recheck:
    """distances: of each compared sample, the mean over its tokens of the total variation between what is stored and what the teacher says,
    in [0, 1], by the sample's number in the data. missing: samples that were chosen and are not in the cache.
    """

    distances: dict[int, float]
    missing: list[int]

    @property
    def wrong(self) -> dict[int, float]:
        """Those past TOLERANCE."""
        return {
            sample: distance
            for sample, distance in self.distances.items()
            if not distance <= TOLERANCE
        }


def recheck(
    teacher: TeacherSource,
    reader: CacheReader,
    plan: ShardPlan,
    *,
    samples: int,
    seed: int,
    device: torch.device,
) -> Recheck | None:
    """Compare `samples` random ones of the plan's. Collective over the teacher's model-parallel ranks; None off its last stage."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(plan.num_samples, generator=generator)[:samples].sort().values.tolist()
    rows = {number: plan.sample(number) for number in chosen}
    missing = [number for number, tokens in rows.items() if reader.missing([sample_key(tokens)])]
    within = reader.identity.document_attention == "within"
    held = {number: tokens for number, tokens in rows.items() if number not in missing}
    answers = {
        number: teacher.targets([batch])[0]
        for number, tokens in held.items()
        for _, batch in microbatches([tokens], 1, device, within)
    }
    distances = {}
    for number, answer in answers.items():
        if answer is None:
            return None
        assert isinstance(answer, SparseTarget)
        distances[number] = float(
            total_variation(reader.get(held[number]), answer.map(lambda t: t[:, 0].cpu())).mean()
        )
    return Recheck(distances, missing)


def total_variation(first: SparseTarget, second: SparseTarget) -> Tensor:
    """Between kept distributions [S, K] and [S, L], each rescaled to 1: [S], half the sum of absolute differences."""
    ids = torch.cat((first.indices, second.indices), 1).long()
    shares = torch.cat(
        (first.logprobs.double().softmax(1), -second.logprobs.double().softmax(1)), 1
    )
    order = ids.argsort(dim=1, stable=True)
    ids, shares = ids.gather(1, order), shares.gather(1, order)
    # An id stands once or twice in a row, side by side: two of one id count by their difference.
    twin = torch.zeros_like(ids, dtype=torch.bool)
    twin[:, 1:] = ids[:, 1:] == ids[:, :-1]
    pairs = (shares + torch.where(twin.roll(-1, 1), shares.roll(-1, 1), 0.0)).abs()
    return 0.5 * torch.where(twin, 0.0, pairs).sum(1)

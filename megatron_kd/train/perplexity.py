"""Cross-entropy of a frozen model on token files, in any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_kd.data.batches import BatchSource
from megatron_kd.data.dataset import build_dataset
from megatron_kd.losses import linear_kd_cross_entropy
from megatron_kd.train.frozen import FrozenModel


@dataclass(frozen=True)
class Perplexity:
    """cross_entropy: mean over `tokens` predicted tokens, nats. perplexity: exp of it."""

    cross_entropy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy); infinite where that is past a float."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 700 else math.inf


def measure(
    model: FrozenModel,
    prefix: str,
    name: str,
    *,
    sequence_length: int,
    batch_size: int,
    index_cache: Path,
    max_sequences: int | None = None,
) -> Perplexity:
    """Every whole sequence of the file once (or the first `max_sequences`), each from a start of its own. Collective over the world."""
    groups = model.groups
    source = _batches(model, prefix, name, sequence_length, batch_size * groups.data_size, index_cache, max_sequences or 2**40)
    sums = torch.zeros(2, dtype=torch.float64, device=groups.platform.device)
    for index in range(source.num_batches):
        for microbatch in source.microbatches(index * batch_size * groups.data_size):
            hidden = model.hidden(microbatch.tokens)
            if hidden is None:
                continue
            loss = linear_kd_cross_entropy(
                hidden,
                model.weight(),
                microbatch.labels.T.contiguous(),
                None,
                loss_mask=microbatch.loss_mask.T.contiguous(),
                alpha=0.0,
                vocab_size=model.vocab_size,
                tp_group=groups.tp,
            )
            if groups.reports_loss:
                sums += torch.stack([loss.total.double().sum(), microbatch.loss_mask.double().sum()])
    dist.all_reduce(sums)
    return Perplexity(float(sums[0] / sums[1]), int(sums[1]))


def _batches(
    model: FrozenModel, prefix: str, name: str, sequence_length: int, global_batch: int, index_cache: Path, sequences: int
) -> BatchSource:
    dataset = build_dataset(
        [prefix],
        None,
        num_samples=sequences,
        sequence_length=sequence_length,
        seed=0,
        index_cache=index_cache,
        end_of_document=None,
        vocab_size=model.vocab_size,
        mask_end_of_document=False,
        name=name,
        repeat=False,
    )
    return BatchSource(
        dataset,
        global_batch_size=global_batch,
        micro_batch_size=global_batch // model.groups.data_size,
        data_parallel_rank=model.groups.data_rank,
        data_parallel_size=model.groups.data_size,
        vocab_size=model.vocab_size,
        device=model.groups.platform.device,
        pad_last=True,
    )

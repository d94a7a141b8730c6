"""Losses and calibration of a frozen model on token files, alone or beside a teacher, in any layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.batches import BatchLayout, BatchSource, Microbatch
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.token_files import tokens_per_byte
from megatron_kd.inference.frozen_model import FrozenModel
from megatron_kd.losses import DenseTeacher, linear_divergence, linear_kd_cross_entropy
from megatron_kd.parallel.collectives import all_gather
from megatron_kd.targets import TopSelection, linear_targets
from megatron_kd.telemetry.calibration_error import (
    FINE,
    adaptive_calibration_error,
    calibration_sums,
    expected_calibration_error,
)


@dataclass(frozen=True)
class Perplexity:
    """What a model does on held-out tokens; means over `tokens` predicted tokens.

    Attributes:
        cross_entropy: nats. perplexity: exp of it.
        accuracy: share of tokens whose likeliest id is the label.
        calibration_error, adaptive_calibration_error: in [0, 1], see `telemetry/calibration_error.py`.
        teacher_kl: KL(teacher || model) of whole distributions at temperature 1, nats. teacher_agreement: share of tokens of which both
            find the same id likeliest. teacher_cross_entropy: the teacher's own, nats. None without a teacher.
    """

    cross_entropy: float
    tokens: int
    accuracy: float
    calibration_error: float
    adaptive_calibration_error: float
    teacher_kl: float | None = None
    teacher_agreement: float | None = None
    teacher_cross_entropy: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(cross_entropy); infinite where that is past a float."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 700 else math.inf

    def describe(self, prefix: str) -> dict[str, Any]:
        """Everything by name, for JSON; bits per byte where the file's description says how many bytes its text has."""
        found: dict[str, Any] = {"perplexity": self.perplexity, "cross_entropy": self.cross_entropy}
        per_byte = tokens_per_byte(prefix)
        if per_byte is not None:
            found["bits_per_byte"] = self.cross_entropy / math.log(2) * per_byte
        names = (
            "accuracy",
            "calibration_error",
            "adaptive_calibration_error",
            "teacher_kl",
            "teacher_agreement",
            "teacher_cross_entropy",
        )
        values = {name: getattr(self, name) for name in names}
        return (
            found
            | {name: value for name, value in values.items() if value is not None}
            | {"tokens": self.tokens, "data": prefix}
        )


def measure(
    model: FrozenModel,
    prefix: str,
    name: str,
    *,
    sequence_length: int,
    batch_size: int,
    index_cache: Path,
    max_sequences: int | None = None,
    teacher: FrozenModel | None = None,
) -> Perplexity:
    """Every whole sequence of the file once (or the first `max_sequences`), each from a start of its own. Collective over the world.

    teacher: a model of the same vocabulary, built on the same groups. No logits exist for longer than a chunk; sums and counts are
    reduced once, at the end.
    """
    groups = model.groups
    source = _batches(
        model,
        prefix,
        name,
        sequence_length,
        batch_size * groups.data_size,
        index_cache,
        max_sequences or 2**40,
    )
    sums = torch.zeros(_TOTALS + 3 * FINE, dtype=torch.float64, device=groups.platform.device)
    head = _teacher_head(model, teacher)
    for index in range(source.num_batches):
        for microbatch in source.microbatches(index * batch_size * groups.data_size):
            hidden = model.hidden(microbatch.tokens)
            taught = None if teacher is None else teacher.hidden(microbatch.tokens)
            if hidden is None:
                continue
            beside = None if taught is None or head is None else DenseTeacher(taught, head)
            found = _sums(model, hidden, beside, microbatch)
            if groups.reports_loss:
                sums += found
    dist.all_reduce(sums)
    loss, hits, kl, agreed, teacher_loss, tokens = sums[:_TOTALS].tolist()
    bins = sums[_TOTALS:].view(3, FINE).cpu()
    taught_sums = (
        (None, None, None)
        if teacher is None
        else (kl / tokens, agreed / tokens, teacher_loss / tokens)
    )
    errors = expected_calibration_error(bins), adaptive_calibration_error(bins)
    return Perplexity(loss / tokens, int(tokens), hits / tokens, *errors, *taught_sums)


_TOTALS = 6  # loss, hits, KL, agreement, the teacher's loss, tokens


@torch.no_grad()
def _sums(
    model: FrozenModel, hidden: Tensor, teacher: DenseTeacher | None, microbatch: Microbatch
) -> Tensor:
    """fp64 [_TOTALS + 3 FINE] of one microbatch, the same on every rank of the last stage's tensor group. hidden: [S, B, H]."""
    labels, mask = microbatch.labels.T.contiguous(), microbatch.loss_mask.T.contiguous()
    split: dict[str, Any] = {"vocab_size": model.vocab_size, "tp_group": model.groups.tp}
    ce = linear_kd_cross_entropy(hidden, model.weight(), labels, None, alpha=0.0, **split).ce
    top = linear_targets(hidden, model.weight(), TopSelection(1), **split)
    best = top.indices[..., 0]
    hit = best == labels
    zero = torch.zeros_like(mask)
    beside = [zero, zero, zero]
    if teacher is not None:
        # The head takes both sides in one type: the wider one.
        wide = torch.promote_types(hidden.dtype, teacher.hidden.dtype)
        dense = DenseTeacher(teacher.hidden.to(wide), teacher.weight.to(wide))
        kl = linear_divergence(
            hidden.to(wide),
            model.weight().to(wide),
            labels,
            dense,
            divergence="forward_kl",
            alpha=1.0,
            **split,
        ).kd
        theirs = linear_targets(teacher.hidden, teacher.weight, TopSelection(1), **split).indices[
            ..., 0
        ]
        teacher_ce = linear_kd_cross_entropy(
            teacher.hidden, teacher.weight, labels, None, alpha=0.0, **split
        ).ce
        beside = [kl, (theirs == best).to(mask.dtype), teacher_ce]
    counted = mask.double() * (labels >= 0)
    totals = torch.stack(
        [(each.double() * counted).sum() for each in (ce, hit, *beside, torch.ones_like(mask))]
    )
    confidence = top.logprobs[..., 0].exp()
    return torch.cat(
        [totals, calibration_sums(confidence.flatten(), hit.flatten(), counted.flatten()).flatten()]
    )


def _teacher_head(model: FrozenModel, teacher: FrozenModel | None) -> Tensor | None:
    """The teacher's output weight [V/tp, H_t], each rank with the ids of its part of the model's; None off the last stage.

    Vocabularies that are padded to other sizes are split elsewhere: then the weight is gathered over the tensor group and cut anew.
    """
    if teacher is None or not model.groups.is_last_stage:
        return None
    weight, rows = teacher.weight(), len(model.weight())
    if len(weight) == rows:
        return weight
    whole = all_gather(weight, model.groups.tp).flatten(0, 1)[: model.vocab_size]
    mine = whole[model.groups.tensor_rank * rows :][:rows]
    return torch.nn.functional.pad(mine, (0, 0, 0, rows - len(mine)))


def _batches(
    model: FrozenModel,
    prefix: str,
    name: str,
    sequence_length: int,
    global_batch: int,
    index_cache: Path,
    sequences: int,
) -> BatchSource:
    request = DatasetRequest(
        prefixes=[prefix],
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
        build_dataset(request),
        BatchLayout(
            global_batch_size=global_batch,
            micro_batch_size=global_batch // model.groups.data_size,
            data_parallel_rank=model.groups.data_rank,
            data_parallel_size=model.groups.data_size,
        ),
        vocab_size=model.vocab_size,
        device=model.groups.platform.device,
        pad_last=True,
    )

"""Choosing a SparseTarget from a teacher's logits, whole or sharded over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_kd.parallel.collectives import Group, all_gather, gather_sequence, group_rank, group_size
from megatron_kd.parallel.shards import VocabShard, vocab_shard
from megatron_kd.targets.logits import OutputWeight, chunk_size, compute_dtype
from megatron_kd.targets.rows import row_statistics
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True)
class TopSelection:
    """The teacher's `top_k` likeliest ids, of which the smallest prefix with mass >= `top_p` is kept (at least `min_k`).

    `temperature` is where top_p's mass and the target's log_tail are measured. Ties go to the smaller id.
    """

    top_k: int
    top_p: float = 1.0
    min_k: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_k <= self.top_k:
            raise ValueError(f"need 1 <= min_k <= top_k, not min_k={self.min_k}, top_k={self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be > 0, not {self.temperature}")

    def __call__(self, buffer: Tensor, first_row: int, shard: VocabShard, group: Group) -> SparseTarget:
        """One chunk: `buffer` [C, n + 1] of logits and a sink column, overwritten."""
        indices = _top_indices(buffer, self.top_k, shard, group)
        if self.top_p < 1.0:
            indices = self._keep_prefix(buffer, indices, shard, group)
        return target_of(buffer, indices, shard, group, temperature=self.temperature)

    def _keep_prefix(self, buffer: Tensor, indices: Tensor, shard: VocabShard, group: Group) -> Tensor:
        target = target_of(buffer.clone(), indices, shard, group, temperature=self.temperature)
        kept = target.logprobs / self.temperature
        if target.log_tail is not None and self.temperature != 1.0:
            kept = kept.log_softmax(-1) + torch.log(-torch.expm1(target.log_tail)).unsqueeze(-1)
        mass = kept.exp()
        before = mass.cumsum(-1) - mass
        keep = before < self.top_p
        keep[:, : self.min_k] = True
        return torch.where(keep, indices, -1)


def target_of(buffer: Tensor, indices: Tensor, shard: VocabShard, group: Group, *, temperature: float) -> SparseTarget:
    """The target that keeps `indices` [C, K] of the rows of `buffer` [C, n + 1] (overwritten). One all-gather."""
    nowhere = torch.full_like(indices[:, 0], -1)
    rows = row_statistics(buffer, indices, nowhere, vocab_start=shard.start, temperature=temperature, group=group, entropy=True)
    logprobs = rows.support - rows.logsumexp.unsqueeze(1)
    log_tail = rows.rest_logsumexp_t - rows.logsumexp_t
    return SparseTarget(indices.to(torch.int32), logprobs, log_tail, rows.entropy, temperature)


def _top_indices(buffer: Tensor, top_k: int, shard: VocabShard, group: Group) -> Tensor:
    """Global ids [C, top_k] of each row's largest logits, by (logit descending, id ascending). One all-gather."""
    count = min(top_k, shard.valid)
    values, columns = torch.topk(buffer[:, : shard.valid], count, dim=1)
    if buffer.is_cpu and count:  # a GPU's radix select takes equal values in column order; a CPU's takes any
        columns = _smallest_columns(buffer[:, : shard.valid], values, columns)
        values = buffer.gather(1, columns)
    ids = columns + shard.start
    if group_size(group) > 1:
        # The vocabulary is split: every rank offers top_k candidates (short shards pad with -inf), ids as bits of a value.
        padding = (0, top_k - count)
        values = torch.nn.functional.pad(values, padding, value=-torch.inf)
        ids = torch.nn.functional.pad(ids, padding, value=torch.iinfo(torch.int32).max)
        as_bits = torch.int32 if values.dtype == torch.float32 else torch.int64
        packed = all_gather(torch.cat([values.view(as_bits), ids.to(as_bits)], dim=1), group)
        values = packed[..., :top_k].contiguous().view(values.dtype).transpose(0, 1).flatten(1)
        ids = packed[..., top_k:].transpose(0, 1).flatten(1).long()
    ids, order = ids.sort(dim=1)
    values = values.gather(1, order)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return ids.gather(1, order)


def _smallest_columns(logits: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """`columns` [C, k] of topk, in any order, with entries equal to the k-th value taken from the smallest columns."""
    last = values[:, -1:]
    equal = logits == last
    split = (equal.sum(1) > (values == last).sum(1)).nonzero().squeeze(1)
    if split.numel():
        above = ~(logits[split] <= last[split])  # with NaN, which topk puts first
        room = values.shape[1] - above.sum(1, keepdim=True)
        chosen = above | (equal[split] & (equal[split].cumsum(1) <= room))
        columns[split] = chosen.nonzero()[:, 1].view(-1, values.shape[1])
    return columns


Selection = TopSelection


def select_targets(teacher_logits: Tensor, selection: Selection, *, vocab_size: int | None = None, tp_group: Group = None) -> SparseTarget:
    """A SparseTarget from the teacher's logits.

    Args:
        teacher_logits: [..., V/tp] any float type, this rank's shard before temperature; computed in fp32 (fp64 stays).
            Not modified.
        selection: which entries to keep.
        vocab_size: true vocabulary size; later columns are padding and take no probability. None: all columns are real.
        tp_group: ranks that hold the other shards; None: unsharded.
    Returns:
        SparseTarget with leading shape [...], identical on every rank of the group.
    Raises:
        ValueError: top_k past the vocabulary, shards that cannot hold it; on every rank, before any collective.
    Collectives: two all-gathers of [C, 2K] and [C, K + 6] per chunk of C tokens.
    """
    rows = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    shard = _shard(rows.shape[-1], selection, vocab_size, tp_group)
    dtype = compute_dtype(rows.dtype)

    def fill(buffer: Tensor, start: int, stop: int) -> Tensor:
        buffer[:, :-1] = rows[start:stop, : shard.valid]
        return buffer

    size = chunk_size(None, shard.valid, rows.shape[0], on_cuda=rows.is_cuda)
    buffer = rows.new_empty((size, shard.valid + 1), dtype=dtype)
    return _select(fill, buffer, rows.shape[0], teacher_logits.shape[:-1], selection, shard, tp_group)


def linear_targets(
    hidden: Tensor,
    weight: Tensor,
    selection: Selection,
    *,
    vocab_size: int | None = None,
    tp_group: Group = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> SparseTarget:
    """A SparseTarget from the teacher's final hidden states and output weight; logits exist for one chunk of tokens only.

    Args:
        hidden: [S, B, H] or [N, H], any float type. Replicated over `tp_group`, or this rank's slice of S under
            sequence_parallel.
        weight: [V/tp, H], this rank's rows in id order.
        selection, vocab_size, tp_group: as in `select_targets`.
        sequence_parallel: hidden is a slice; it is gathered once.
        chunk_tokens: tokens per chunk; None: from the shard's width.
    Returns:
        SparseTarget with leading shape [S, B] (or [N]) of the full sequence, identical on every rank.
    Raises:
        ValueError: as `select_targets`; shapes that do not fit.
    Collectives: one all-gather of hidden under sequence_parallel, then two small all-gathers per chunk.
    """
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must end in the same width")
    shard = _shard(weight.shape[0], selection, vocab_size, tp_group)
    tokens = hidden.shape[:-1].numel() * (group_size(tp_group) if sequence_parallel else 1)
    size = chunk_size(chunk_tokens, shard.valid, tokens, on_cuda=hidden.is_cuda)
    head = OutputWeight(weight, shard)
    full = gather_sequence(hidden.detach(), tp_group) if sequence_parallel else hidden.detach()
    rows = full.reshape(-1, full.shape[-1])

    def fill(buffer: Tensor, start: int, stop: int) -> Tensor:
        return head.logits_into(buffer, rows[start:stop])

    return _select(fill, head.new_buffer(size), rows.shape[0], full.shape[:-1], selection, shard, tp_group)


def _shard(rows: int, selection: Selection, vocab_size: int | None, group: Group) -> VocabShard:
    shard = vocab_shard(rows, rank=group_rank(group), size=group_size(group), vocab_size=vocab_size)
    if selection.top_k > shard.vocab_size:
        raise ValueError(f"top_k ({selection.top_k}) is past the vocabulary ({shard.vocab_size} ids)")
    return shard


@torch.no_grad()
def _select(
    fill: Callable[[Tensor, int, int], Tensor],
    buffer: Tensor,
    tokens: int,
    shape: torch.Size,
    selection: Selection,
    shard: VocabShard,
    group: Group,
) -> SparseTarget:
    """Chunk by chunk through one buffer. `fill(buffer, start, stop)` puts the logits of those tokens in."""
    size = buffer.shape[0]
    parts = []
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        parts.append(selection(fill(buffer[: stop - start], start, stop), start, shard, group))
    first = parts[0]

    def join(name: str) -> Tensor:
        joined = torch.cat([getattr(part, name) for part in parts])
        return joined.reshape(*shape, *joined.shape[1:])

    tail = None if first.log_tail is None else join("log_tail")
    entropy = None if first.entropy is None else join("entropy")
    return replace(first, indices=join("indices"), logprobs=join("logprobs"), log_tail=tail, entropy=entropy)

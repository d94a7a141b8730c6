"""Select a SparseTarget from a teacher's logits, also where they are sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.output_weight import LogitChunks, linear_logits, split_logits
from megatron_kd.head.sizes import chunk_size
from megatron_kd.head.statistics import StatisticsQuery, row_logsumexp, row_statistics
from megatron_kd.head.token_chunks import Chunk, TokenChunks
from megatron_kd.parallel.collectives import Group, all_gather, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard
from megatron_kd.targets.sparse import SparseTarget, sort_by_logprob


class Selection(Protocol):
    """Turn a chunk of logits into a SparseTarget; see `TopSelection` and `SampleSelection`."""

    def check(self, vocab_size: int) -> None:
        """Raise ValueError where a vocabulary of this size cannot serve.

        It is called on every rank before any collective.
        """

    def __call__(
        self, rows: ChunkRows, keys: Tensor, shard: VocabShard, group: Group
    ) -> SparseTarget:
        """Return the target of one chunk of C tokens, the same on every rank.

        Args:
            rows: this rank's logits of the chunk [C, n], before temperature.
            keys: int64 [C], what a random choice may depend on.
            shard: this rank's part of the vocabulary.
            group: ranks that hold the other parts.
        """


@dataclass(frozen=True)
class TopSelection:
    """Select the teacher's `top_k` most probable ids and keep a prefix of them.

    Of equal logits the smaller id is kept. Entries are sorted by falling log-probability, equal
    ones by rising id.

    Attributes:
        top_k: most entries per token.
        top_p: the smallest prefix with at least this mass is kept, in (0, 1].
        min_k: entries that are kept in any case.
        temperature: at which top_p's mass and the target's log_tail are measured, > 0.
    """

    top_k: int
    top_p: float = 1.0
    min_k: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_k <= self.top_k:
            raise ValueError(
                f"need 1 <= min_k <= top_k, not min_k={self.min_k}, top_k={self.top_k}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be > 0, not {self.temperature}")

    def check(self, vocab_size: int) -> None:
        """Raise ValueError where top_k exceeds the vocabulary."""
        if self.top_k > vocab_size:
            raise ValueError(f"top_k ({self.top_k}) is past the vocabulary ({vocab_size} ids)")

    def __call__(
        self, rows: ChunkRows, keys: Tensor, shard: VocabShard, group: Group
    ) -> SparseTarget:
        """Return the target of one chunk of C tokens; see `Selection.__call__`.

        Collectives:
            All-gathers of [C, 2K] and [C, K + 6], and one of [2, C] where top_p < 1.
        """
        values, indices = _top(rows, self.top_k, shard, group, self.temperature)
        if self.top_p < 1.0:
            logsumexp = row_logsumexp(rows, temperature=self.temperature, group=group)
            mass = (values / self.temperature - logsumexp.unsqueeze(1)).exp()
            keep = mass.cumsum(-1) - mass < self.top_p
            keep[:, : self.min_k] = True
            indices = torch.where(keep, indices, -1)
        target = target_at(rows, indices, shard, group, temperature=self.temperature)
        # Different logits can have equal log-probabilities, so the order must be made again.
        ids, logprobs = sort_by_logprob(target.indices, target.logprobs)
        return replace(target, indices=ids, logprobs=logprobs)


def target_at(
    rows: ChunkRows, indices: Tensor, shard: VocabShard, group: Group, *, temperature: float
) -> SparseTarget:
    """Return the target that keeps `indices`, which are removed from `rows`.

    Args:
        rows: this rank's logits of C tokens.
        indices: int [C, K] global ids, -1 in unused slots.
        shard: this rank's part of the vocabulary.
        group: ranks that hold the other parts.
        temperature: at which log_tail is measured.

    Collectives:
        One all-gather of [C, K + 6].
    """
    statistics = row_statistics(
        rows,
        indices,
        vocab_start=shard.start,
        group=group,
        query=StatisticsQuery(temperature, entropy=True),
    )
    logprobs = statistics.support - statistics.logsumexp.unsqueeze(1)
    log_tail = statistics.rest_logsumexp_t - statistics.logsumexp_t
    return SparseTarget(
        indices.to(torch.int32), logprobs, log_tail, statistics.entropy, temperature
    )


def _top(
    rows: ChunkRows, top_k: int, shard: VocabShard, group: Group, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return each row's largest logits, by (logit falling, id rising).

    Args:
        rows: this rank's logits of C tokens.
        top_k: number of logits.
        shard: this rank's part of the vocabulary.
        group: ranks that hold the other parts.
        temperature: of the statistics that are computed next.

    Returns:
        Values and global ids, both [C, top_k].

    Collectives:
        One all-gather of [C, 2 top_k].
    """
    count = min(top_k, shard.valid)
    values, columns = rows.top(count, temperature)
    ids = columns + shard.start
    if group_size(group) == 1:
        return values, ids
    # Every rank offers top_k candidates; short shards pad with -inf. Ids travel as bits of a value.
    padding = (0, top_k - count)
    values = torch.nn.functional.pad(values, padding, value=-torch.inf)
    ids = torch.nn.functional.pad(ids, padding, value=torch.iinfo(torch.int32).max)
    bits_dtype = torch.int32 if values.dtype == torch.float32 else torch.int64
    candidates = all_gather(torch.cat([values.view(bits_dtype), ids.to(bits_dtype)], dim=1), group)
    values = candidates[..., :top_k].contiguous().view(values.dtype).transpose(0, 1).flatten(1)
    ids = candidates[..., top_k:].transpose(0, 1).flatten(1).long()
    # Ids rise with the rank, so a stable sort leaves equal values by rising id.
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :top_k], ids.gather(1, order[:, :top_k])


def select_targets(
    teacher_logits: Tensor,
    selection: Selection,
    *,
    vocab_size: int | None = None,
    tp_group: Group = None,
    row_keys: Tensor | None = None,
) -> SparseTarget:
    """Return a SparseTarget from the teacher's logits.

    Args:
        teacher_logits: [..., V/tp], any float type, this rank's shard before temperature; computed
            in fp32 (fp64 stays). Not modified.
        selection: which entries to keep.
        vocab_size: true vocabulary size; later columns are padding and take no probability. None:
            all columns are real.
        tp_group: ranks that hold the other shards; None: unsharded.
        row_keys: int64 [...], what the random samples of a token depend on besides the seed. With
            a key made of its sample and position a token is sampled alike in any batch and layout.
            None: its position in this call.

    Returns:
        SparseTarget with leading shape [...], identical on every rank of the group.

    Raises:
        ValueError: top_k exceeds the vocabulary, or the shards cannot hold it; on every rank,
            before any collective.

    Collectives:
        A few small all-gathers per chunk of C tokens, see the selection.
    """
    logits = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    shard = vocab_shard(
        logits.shape[-1],
        rank=group_rank(tp_group),
        size=group_size(tp_group),
        vocab_size=vocab_size,
    )
    selection.check(shard.vocab_size)
    shape = teacher_logits.shape[:-1]
    _check_keys(row_keys, shape)
    chunks = TokenChunks(
        logits.shape[0], 1, chunk_size(None, shard.share, logits.shape[0], on_cuda=logits.is_cuda)
    )
    rows = split_logits(logits, shard, chunks)
    targets = _chunk_targets(rows, chunks, row_keys, selection, shard, tp_group)
    return _join(targets, chunks, shape)


def linear_targets(  # noqa: PLR0913 (public signature)
    hidden: Tensor,
    weight: Tensor,
    selection: Selection,
    *,
    vocab_size: int | None = None,
    tp_group: Group = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    row_keys: Tensor | None = None,
) -> SparseTarget:
    """Return a SparseTarget from the teacher's final hidden states and output weight.

    Logits exist for one chunk of tokens only.

    Args:
        hidden: [S, B, H] or [N, H], any float type. Replicated over `tp_group`, or this rank's
            slice of S under sequence_parallel.
        weight: [V/tp, H], this rank's rows in id order.
        selection: which entries to keep.
        vocab_size: true vocabulary size, as in `select_targets`.
        tp_group: ranks that hold the other shards; None: unsharded.
        sequence_parallel: hidden is a slice; it is gathered chunk by chunk.
        chunk_tokens: tokens per chunk; None: from the shard's width.
        row_keys: int64 [S, B] (or [N]) of the full sequence, as in `select_targets`.

    Returns:
        SparseTarget with leading shape [S, B] (or [N]) of the full sequence, identical on every
        rank.

    Raises:
        ValueError: as `select_targets`, or the shapes do not fit.

    Collectives:
        Per chunk small all-gathers, see the selection, and one of hidden under sequence_parallel.
    """
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must end in the same "
            "width"
        )
    shard = vocab_shard(
        weight.shape[0], rank=group_rank(tp_group), size=group_size(tp_group), vocab_size=vocab_size
    )
    selection.check(shard.vocab_size)
    slices = group_size(tp_group) if sequence_parallel else 1
    shape = torch.Size((hidden.shape[0] * slices, *hidden.shape[1:-1]))
    chunks = TokenChunks(
        shape.numel(),
        slices,
        chunk_size(chunk_tokens, shard.share, shape.numel(), on_cuda=hidden.is_cuda),
    )
    _check_keys(row_keys, shape)
    rows = linear_logits(hidden.reshape(-1, hidden.shape[-1]), weight, shard, chunks, tp_group)
    targets = _chunk_targets(rows, chunks, row_keys, selection, shard, tp_group)
    return _join(targets, chunks, shape)


def _check_keys(row_keys: Tensor | None, shape: torch.Size) -> None:
    if row_keys is not None and (row_keys.shape != shape or row_keys.dtype != torch.int64):
        raise ValueError(
            f"row_keys must be int64 {tuple(shape)}, one for each token, not "
            f"{row_keys.dtype} {tuple(row_keys.shape)}"
        )


def _chunk_targets(
    rows: LogitChunks,
    chunks: TokenChunks,
    row_keys: Tensor | None,
    selection: Selection,
    shard: VocabShard,
    group: Group,
) -> Iterator[tuple[Chunk, SparseTarget]]:
    """Yield each chunk and its target."""
    keys = None if row_keys is None else row_keys.flatten()
    for chunk, logits in rows:
        if keys is None:
            keys = torch.arange(chunks.tokens, device=logits.buffer.device)
        yield chunk, selection(logits, chunk.take(keys), shard, group)


@torch.no_grad()
def _join(
    targets: Iterator[tuple[Chunk, SparseTarget]], chunks: TokenChunks, shape: torch.Size
) -> SparseTarget:
    """Return the targets of all chunks in the order of the sequence; computes them without grad."""
    joined: SparseTarget | None = None
    for chunk, target in targets:
        if joined is None:
            joined = target.map(lambda tensor: tensor.new_empty((chunks.tokens, *tensor.shape[1:])))
        for full, values in zip(joined.tensors(), target.tensors(), strict=True):
            chunk.put(full, values)
    assert joined is not None
    return joined.map(lambda tensor: tensor.view(*shape, *tensor.shape[1:]))

"""Microbatches as a function of the number of samples consumed, so that stopping, resuming and another layout change nothing.

Step n of a run covers the samples consumed .. consumed + global_batch_size - 1 of the order made in `dataset.py`. Shapes:
B micro_batch_size, S sequence_length.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from megatron_kd.config import ConfigError
from megatron_kd.data.dataset import TokenDataset
from megatron_kd.targets.keys import mark_starts, sample_keys, unmark_starts
from megatron_kd.targets.sparse import SparseTarget

Attach = Callable[[torch.Tensor, torch.Tensor], SparseTarget | None]


@dataclass(frozen=True)
class Microbatch:
    """The data of one forward pass; the same on every tensor- and pipeline-parallel rank of a data-parallel rank.

    Attributes:
        tokens: int64 [B, S].
        labels: int64 [B, S], the next token of each (already shifted); -100 where the loss does not count.
        loss_mask: fp32 [B, S], 1 where the loss counts, else 0.
        position_ids: int64 [B, S], 0 .. S-1, or counted from the start of the token's document.
        sample_ids: int64 [B], place of each sequence in the run's sample order; -1 for one that only fills up the last batch.
        sample_keys: int64 [B, 2], name of each sequence by its tokens, and its documents where they matter (`targets.keys`).
        documents: int64 [B, S], which document of its sequence each token belongs to, where tokens see their own only; else None.
        target: SparseTarget [S, B, K] where something attached one on this rank, else None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: torch.Tensor
    sample_keys: torch.Tensor
    documents: torch.Tensor | None = None
    target: SparseTarget | None = None

    @staticmethod
    def of(
        named: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        sample_ids: torch.Tensor,
        *,
        within_documents: bool,
        attach: Attach | None = None,
        keys: torch.Tensor | None = None,
    ) -> Microbatch:
        """named: int64 [B, S], see `TokenDataset`; the other tensors as above; attach: see `BatchSource`; keys: where they are known."""
        tokens, starts = unmark_starts(named)
        positions = (
            torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        )
        documents = None
        if within_documents:
            documents = starts.long().cumsum(1)
            positions = positions - (positions * starts).cummax(1).values
        keys = sample_keys(named) if keys is None else keys
        target = None if attach is None else attach(tokens, keys)
        return Microbatch(tokens, labels, loss_mask, positions, sample_ids, keys, documents, target)

    @property
    def named(self) -> torch.Tensor:
        """int64 [B, S], what `of` was given: the tokens, their documents' starts marked where they matter."""
        if self.documents is None:
            return self.tokens
        starts = self.documents.diff(
            dim=1, prepend=self.documents.new_zeros(len(self.documents), 1)
        )
        return mark_starts(self.tokens, starts > 0)

    def attention_mask(self) -> torch.Tensor | None:
        """bool [B, 1, S, S], true where a query (rows) sees a key (columns); None where attention is causal and nothing else."""
        if self.documents is None:
            return None
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return same.tril().unsqueeze(1)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Microbatch:
        """The same microbatch with `function` applied to every tensor."""
        target = None if self.target is None else self.target.map(function)
        tensors = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "target"
        }
        mapped: dict[str, Any] = {
            name: None if tensor is None else function(tensor) for name, tensor in tensors.items()
        }
        return replace(self, **mapped, target=target)

    def to(self, device: torch.device) -> Microbatch:
        """This microbatch on `device`; copies from pinned memory do not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class BatchSource:
    """Cuts global batches out of a dataset for one data-parallel rank. Its answers depend on its arguments alone.

    While a step runs, a thread reads the samples of the step after it; asking for another position drops that work.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        vocab_size: int,
        device: torch.device | str,
        pad_last: bool = False,
        attach: Attach | None = None,
    ) -> None:
        """Args:
            dataset: samples 0 .. len(dataset) - 1.
            global_batch_size: samples of one step over all ranks.
            micro_batch_size: samples of one microbatch, B.
            data_parallel_rank: of this process, in [0, data_parallel_size).
            data_parallel_size: ranks that share a global batch.
            vocab_size: true vocabulary size; ids are checked against it at every read.
            device: where the microbatches go.
            pad_last: fill an incomplete last global batch with sequences whose loss does not count, in place of an error.
            attach: gives a microbatch its target, in the reading thread, from the tokens [B, S] and their keys [B, 2].

        Raises:
            ConfigError: the batch sizes do not divide.
        """
        per_round = micro_batch_size * data_parallel_size
        if global_batch_size % per_round:
            raise ConfigError(
                f"batch.global_batch_size ({global_batch_size}) must be a multiple of batch.micro_batch_size * data-parallel size "
                f"= {micro_batch_size} * {data_parallel_size} = {per_round}"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data_parallel_rank {data_parallel_rank} is not in [0, {data_parallel_size})"
            )
        self.dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._pad_last = pad_last
        self._attach = attach
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[Microbatch]]] | None = None
        self._latest: tuple[int, list[Microbatch]] | None = None

    @property
    def num_batches(self) -> int:
        """Global batches in the dataset; an incomplete last one counts with `pad_last` only."""
        samples = len(self.dataset) + (self._global_batch_size - 1 if self._pad_last else 0)
        return samples // self._global_batch_size

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """This rank's microbatches of the step that starts at `consumed_samples`.

        Microbatch m holds the samples consumed_samples + (m * data_parallel_size + data_parallel_rank) * B + i, i in 0 .. B-1. Asked
        for the same step twice in a row, it gives the same list.

        Raises:
            ConfigError: the data ends before the global batch does, or holds an id outside the vocabulary.
        """
        if not self._holds(consumed_samples):
            raise ConfigError(
                f"{self.dataset.name} has {len(self.dataset)} samples, but samples {consumed_samples} to "
                f"{consumed_samples + self._global_batch_size - 1} were asked for: build it for steps * global_batch_size samples"
            )
        if self._latest is not None and self._latest[0] == consumed_samples:
            return self._latest[1]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == consumed_samples:
            found = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            found = self._read(consumed_samples)
        following = consumed_samples + self._global_batch_size
        if self._holds(following):
            self._ahead = (following, self._reader.submit(self._read, following))
        self._latest = consumed_samples, [microbatch.to(self._device) for microbatch in found]
        return self._latest[1]

    def _holds(self, consumed: int) -> bool:
        last = consumed if self._pad_last else consumed + self._global_batch_size - 1
        return 0 <= consumed and last < len(self.dataset)

    def _read(self, consumed: int) -> list[Microbatch]:
        size = self._micro_batch_size
        rounds = self._global_batch_size // (size * self._size)
        firsts = [consumed + (round_ * self._size + self._rank) * size for round_ in range(rounds)]
        return [self._microbatch(list(range(first, first + size))) for first in firsts]

    def _microbatch(self, ids: list[int]) -> Microbatch:
        """Read the samples `ids` into CPU memory, pinned where they go on to a GPU."""
        present = [sample < len(self.dataset) for sample in ids]
        rows = [
            self.dataset[sample if there else 0] for sample, there in zip(ids, present, strict=True)
        ]
        tokens, labels, loss_mask, named = (
            torch.stack([row[key] for row in rows])
            for key in ("tokens", "labels", "loss_mask", "marked_tokens")
        )
        self._check_range(ids, tokens, labels)
        real = torch.tensor(present)
        loss_mask = loss_mask * real.unsqueeze(1)
        sample_ids = torch.tensor(ids).masked_fill(~real, -1)
        labels = labels.masked_fill(loss_mask == 0, -100)
        within = self.dataset.within_documents
        batch = Microbatch.of(
            named, labels, loss_mask, sample_ids, within_documents=within, attach=self._attach
        )
        return (
            batch.map(lambda tensor: tensor.pin_memory()) if self._device.type == "cuda" else batch
        )

    def _check_range(self, ids: list[int], tokens: torch.Tensor, labels: torch.Tensor) -> None:
        both = torch.cat((tokens, labels[:, -1:]), dim=1)
        wrong = (both < 0) | (both >= self._vocab_size)
        if wrong.any():
            row, position = (int(value) for value in wrong.nonzero()[0])
            raise ConfigError(
                f"{self.dataset.describe(ids[row])} holds token id {int(both[row, position])} at position {position}, outside the "
                f"vocabulary of {self._vocab_size} ids: make the data with the run's tokenizer"
            )

"""Sample a teacher's distribution at random: an unbiased sparse target (arXiv 2503.16870)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.statistics import StatisticsQuery, row_statistics
from megatron_kd.parallel.collectives import Group, all_gather, group_rank
from megatron_kd.parallel.vocab_shards import VocabShard
from megatron_kd.targets.select import target_at
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True, repr=False)
class SampleSelection:
    """Select the ids of `num_draws` independent samples of the teacher's softmax.

    Sampling is with replacement.

    The target holds each sampled id once. The samples of a token depend on (seed, its key) alone,
    whatever the layout, the batch or the chunk.

    Attributes:
        num_draws: samples per token.
        seed: of the counter-based generator, see `uniform`.
        temperature: of the softmax p that is sampled, > 0.
        values: "counts": log(times sampled / num_draws), whose expectation is the teacher's
            distribution, whereas a top-k target over-weighs the probable ids. "probabilities": the
            teacher's own probabilities, rescaled to 1 over the sampled ids (wording of arXiv
            2503.19786), which is biased towards probable ids.
        power: sample from p^power (rescaled) in place of p, and weight each count by p / p^power
            (arXiv 2503.16870: less variance for powers of 0.8 to 1.2). The weighted counts are
            rescaled to 1, so that only the ratio of the summed quantities is unbiased.
    """

    num_draws: int
    seed: int
    temperature: float = 1.0
    values: str = "counts"
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, not {self.num_draws}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0, not {self.temperature}")
        if self.values not in ("counts", "probabilities"):
            raise ValueError(f"values must be counts or probabilities, not {self.values!r}")
        if not 0.0 < self.power < float("inf"):
            raise ValueError(f"power must be > 0, not {self.power}")

    def __repr__(self) -> str:
        """Return a text without `values` and `power` at their defaults.

        It is part of a cache's identity, so it must not change.
        """
        arguments = ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in ("values", "power") or getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({arguments})"

    def check(self, vocab_size: int) -> None:
        """Accept any vocabulary: each can be sampled."""

    def __call__(
        self, rows: ChunkRows, keys: Tensor, shard: VocabShard, group: Group
    ) -> SparseTarget:
        """Return the target of one chunk of C tokens; see `Selection.__call__`.

        Collectives:
            An all-gather of [C, 6], and under tensor parallelism two more, of [C] and [C,
            num_draws]. Where values are not the plain counts, also one of [C, num_draws + 6].
        """
        statistics = row_statistics(
            rows,
            keys.new_empty((len(keys), 0)),
            vocab_start=shard.start,
            group=group,
            query=StatisticsQuery(entropy=True),
        )
        quantiles = uniform(self.seed, keys, self.num_draws)
        ids = _invert(
            rows, quantiles, statistics.shift, self.temperature / self.power, shard, group
        )
        indices, count = _count(ids)
        logprobs = (count / self.num_draws).log()
        if self.values == "probabilities" or self.power != 1.0:
            log_p = (
                target_at(rows, indices, shard, group, temperature=self.temperature).logprobs
                / self.temperature
            )
            weighted = (
                log_p if self.values == "probabilities" else logprobs + (1.0 - self.power) * log_p
            )
            logprobs = torch.where(indices >= 0, weighted, -torch.inf).log_softmax(1)
        return SparseTarget(
            indices, logprobs.float(), None, statistics.entropy, self.temperature, sampled=True
        )


def _invert(
    rows: ChunkRows,
    quantiles: Tensor,
    shift: Tensor,
    temperature: float,
    shard: VocabShard,
    group: Group,
) -> Tensor:
    """Return the global ids at which the cumulative mass in id order exceeds `quantiles`.

    The tile is found by its mass, then the entry inside it. Masses are added in fp64, so that the
    boundaries of vocabulary shards change a sample once in about 1e15.

    Args:
        rows: this rank's logits.
        quantiles: fp64 [C, D] in (0, 1), fractions of the total mass.
        shift: [C], the largest logit of each row.
        temperature: of the softmax.
        shard: this rank's part of the vocabulary.
        group: ranks that hold the other parts.

    Returns:
        int64 [C, D].
    """
    cumulative = rows.tile_mass(shift, temperature).cumsum(1)
    rank_mass = all_gather(cumulative[:, -1], group)
    mass_before = rank_mass[: group_rank(group)].sum(0)
    mass = quantiles * rank_mass.sum(0).unsqueeze(1) - mass_before.unsqueeze(1)
    tiles = torch.searchsorted(cumulative, mass, right=True).clamp(
        max=max((shard.valid - 1) // rows.tile, 0)
    )
    tile_mass = mass - torch.where(tiles > 0, cumulative.gather(1, (tiles - 1).clamp(min=0)), 0.0)
    exps = (rows.tiles(tiles) - shift.view(-1, 1, 1)).div_(temperature).exp_().double()
    skipped_entries = (exps.cumsum(2) <= tile_mass.unsqueeze(2)).sum(2)
    columns = (tiles * rows.tile + skipped_entries.clamp(max=rows.tile - 1)).clamp(
        max=shard.valid - 1
    )
    is_local = (mass >= 0) & (mass < cumulative[:, -1:])
    if group_rank(group) == len(rank_mass) - 1:
        # Rounding at the very end belongs to the last shard.
        is_local |= mass >= cumulative[:, -1:]
    return (
        all_gather(torch.where(is_local & (shard.valid > 0), columns + shard.start, -1), group)
        .amax(0)
        .clamp(min=0)
    )


def _count(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each id of [C, D] once, int32 [C, D], and its count; -1 and 0 in unused slots."""
    ordered = ids.sort(1).values
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slots = is_first.cumsum(1) - 1
    counts = torch.zeros_like(ordered).scatter_add_(1, slots, torch.ones_like(ordered))
    return torch.full_like(ordered, -1).scatter_(1, slots, ordered).int(), counts


def uniform(seed: int, keys: Tensor, draws: int) -> Tensor:
    """Return fp64 numbers in (0, 1) that depend on (seed, key, sample number) alone.

    They are the same on every device. The generator is counter-based: the finaliser of splitmix64
    (Steele, Lea and Flood 2014), once for the key and once for the sample number.

    Args:
        seed: any int64.
        keys: int64 [C], see `sample_keys.token_keys`.
        draws: samples per key.

    Returns:
        fp64 [C, draws].
    """
    numbers = torch.arange(1, draws + 1, device=keys.device)
    hashed = _mix(
        _mix(keys + _mix(torch.tensor(seed, device=keys.device))).unsqueeze(1)
        + numbers * _signed(0x9E3779B97F4A7C15)
    )
    return (_shift(hashed, 11).double() + 0.5) * 2.0**-53


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift(words, 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Return words >> bits with zeros from the left; torch would keep the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

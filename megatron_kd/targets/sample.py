"""Random sampling of a teacher's distribution: an unbiased sparse target (Random Sampling KD, arXiv 2503.16870)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.statistics import row_statistics
from megatron_kd.parallel.collectives import Group, all_gather, group_rank
from megatron_kd.parallel.vocab_shards import VocabShard
from megatron_kd.targets.select import target_at
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True, repr=False)
class SampleSelection:
    """`num_draws` independent draws, with replacement, from the teacher's softmax p at `temperature`.

    The target holds each drawn id once. values "counts": with log(times drawn / num_draws): its expectation is the teacher's
    distribution, whereas a top-k target over-weighs the likely ids. power: draw from p^power (rescaled) in place of p, and weigh each
    count by p / p^power (arXiv 2503.16870: less variance for powers of 0.8 to 1.2); the weighed counts are rescaled to 1, so that only
    the ratio of what is summed is unbiased. values "probabilities": with the teacher's own probabilities, rescaled to 1 over the drawn ids
    (arXiv 2503.19786 words it so): biased towards likely ids. A token's draws depend on (seed, its key) alone, whatever the layout, the
    batch or the chunk.
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
        """Without `values` and `power` at their defaults: a cache is told from another by this text."""
        shown = [
            f
            for f in fields(self)
            if f.name not in ("values", "power") or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def check(self, vocab_size: int) -> None:
        """Any vocabulary can be drawn from."""

    def __call__(
        self, rows: ChunkRows, keys: Tensor, shard: VocabShard, group: Group
    ) -> SparseTarget:
        """One chunk. Collectives: an all-gather of [C, 6], and under tensor parallelism two more of [C] and [C, num_draws]; one of
        [C, num_draws + 6] where values are not the plain counts."""
        nowhere = torch.full_like(keys, -1)
        whole = row_statistics(
            rows,
            nowhere.new_empty((len(keys), 0)),
            nowhere,
            vocab_start=shard.start,
            group=group,
            entropy=True,
        )
        at = uniform(self.seed, keys, self.num_draws)
        ids = _invert(rows, at, whole.shift, self.temperature / self.power, shard, group)
        indices, count = _count(ids)
        logprobs = (count / self.num_draws).log()
        if self.values == "probabilities" or self.power != 1.0:
            known = (
                target_at(rows, indices, shard, group, temperature=self.temperature).logprobs
                / self.temperature
            )
            weighed = (
                known if self.values == "probabilities" else logprobs + (1.0 - self.power) * known
            )
            logprobs = torch.where(indices >= 0, weighed, -torch.inf).log_softmax(1)
        return SparseTarget(
            indices, logprobs.float(), None, whole.entropy, self.temperature, sampled=True
        )


def _invert(
    rows: ChunkRows, at: Tensor, shift: Tensor, temperature: float, shard: VocabShard, group: Group
) -> Tensor:
    """Global ids [C, D] where the cumulative mass in id order passes `at` [C, D] in (0, 1): a tile by its mass, then an entry.

    Masses are added in fp64, so that where the vocabulary is cut moves a draw once in about 1e15.
    """
    cumulative = rows.tile_mass(shift, temperature).cumsum(1)
    totals = all_gather(cumulative[:, -1], group)
    before = totals[: group_rank(group)].sum(0)
    wanted = at * totals.sum(0).unsqueeze(1) - before.unsqueeze(1)
    tile = torch.searchsorted(cumulative, wanted, right=True).clamp(
        max=max((shard.valid - 1) // rows.tile, 0)
    )
    inside = wanted - torch.where(tile > 0, cumulative.gather(1, (tile - 1).clamp(min=0)), 0.0)
    exp = (rows.tiles(tile) - shift.view(-1, 1, 1)).div_(temperature).exp_().double()
    passed = (exp.cumsum(2) <= inside.unsqueeze(2)).sum(2)
    column = (tile * rows.tile + passed.clamp(max=rows.tile - 1)).clamp(max=shard.valid - 1)
    here = (wanted >= 0) & (wanted < cumulative[:, -1:])
    if group_rank(group) == len(totals) - 1:  # rounding at the very end belongs to the last shard
        here |= wanted >= cumulative[:, -1:]
    return (
        all_gather(torch.where(here & (shard.valid > 0), column + shard.start, -1), group)
        .amax(0)
        .clamp(min=0)
    )


def _count(ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [C, D] with repeats -> each id once, int32 [C, D], and how often it is there; -1 and 0 in the slots left over."""
    ordered = ids.sort(1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = new.cumsum(1) - 1
    count = torch.zeros_like(ordered).scatter_add_(1, slot, torch.ones_like(ordered))
    return torch.full_like(ordered, -1).scatter_(1, slot, ordered).int(), count


def uniform(seed: int, keys: Tensor, draws: int) -> Tensor:
    """fp64 [C, draws] in (0, 1): a function of (seed, key, draw) alone, the same on every device. keys: int64 [C].

    A counter-based generator: the finaliser of splitmix64 (Steele, Lea and Flood 2014), once for the key and once for the draw.
    """
    number = torch.arange(1, draws + 1, device=keys.device)
    hashed = _mix(
        _mix(keys + _mix(torch.tensor(seed, device=keys.device))).unsqueeze(1)
        + number * _signed(0x9E3779B97F4A7C15)
    )
    return (_shift(hashed, 11).double() + 0.5) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left; torch keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

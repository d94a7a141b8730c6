"""Test which shards of a cache a job takes as finished.

Also test the comparison of stored targets with the teacher.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_kd.cache import CacheIdentity, CacheInUse, CacheReader, CacheWriter, WrongCache
from megatron_kd.data.batches import Microbatch
from megatron_kd.targets import (
    SampleSelection,
    Selection,
    SparseTarget,
    TopSelection,
    select_targets,
)
from megatron_kd.targets.sample_keys import token_keys
from megatron_kd.teacher.extract import (
    Extraction,
    ShardPlan,
    extract_shard,
    finished_shards,
    make_microbatches,
    sole_writer,
)
from megatron_kd.teacher.recheck import TOLERANCE, recheck, total_variation
from tests.losses.cases import fresh_seed, say

S, V = 16, 300


class Part:
    """Provide samples as a data set of tokens does."""

    def __init__(self, tokens: Tensor) -> None:
        self.samples = [{"marked_tokens": row} for row in tokens]

    def read(self, number: int) -> dict[str, Tensor]:
        return self.samples[number]

    def __len__(self) -> int:
        return len(self.samples)


class Teacher:
    """Return a table of logits by token id, without collectives."""

    def __init__(self, seed: int, selection: Selection) -> None:
        self.table = 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
        self.selection = selection

    def targets(self, microbatches: Sequence[Microbatch]) -> list[SparseTarget]:
        def target(batch: Microbatch) -> SparseTarget:
            logits = self.table[batch.tokens.t()]
            keys = token_keys(batch.sample_keys, S)
            return select_targets(logits, self.selection, row_keys=keys)

        return [target(batch) for batch in microbatches]


def plan_of(
    seed: int, *, samples: int = 50, shard_samples: int = 8, first: int | None = None
) -> ShardPlan:
    tokens = torch.randint(0, V, (samples, S), generator=torch.Generator().manual_seed(seed))
    cut = samples // 3
    return ShardPlan([Part(tokens[:cut]), Part(tokens[cut:])], shard_samples, first)  # type: ignore[list-item]


def store(
    directory: Path, teacher: Teacher, plan: ShardPlan, shards: Sequence[int]
) -> CacheIdentity:
    identity = CacheIdentity("ab", None, V, S, teacher.selection)
    extraction = Extraction(
        plan,
        directory,
        identity,
        writes=True,
        worker=0,
        micro_batch_size=3,
        num_microbatches=2,
        device=torch.device("cpu"),
    )
    for shard in shards:
        extract_shard(teacher, extraction, shard)  # type: ignore[arg-type]
    return identity


SELECTIONS = (TopSelection(20, top_p=0.9), SampleSelection(30, seed=5))


def test_finished_shards_are_those_of_the_same_samples(tmp_path: Path) -> None:
    seed = fresh_seed()
    teacher, plan = Teacher(seed, SELECTIONS[0]), plan_of(seed)
    assert plan.num_shards == 7
    identity = store(tmp_path, teacher, plan, [0, 2, 6])
    assert finished_shards(tmp_path, plan, identity) == {0, 2, 6}
    assert finished_shards(tmp_path / "none", plan, identity) == set()
    with pytest.raises(WrongCache, match="vocab_size: the cache has 300, expected 301"):
        finished_shards(tmp_path, plan, replace(identity, vocab_size=301))
    for other in (
        plan_of(seed, shard_samples=7),
        plan_of(seed, shard_samples=16),
        plan_of(seed + 1),
    ):
        with pytest.raises(
            WrongCache,
            match=r"shard-0000000\d.arrow begins with the sample .*another --shard-samples",
        ):
            finished_shards(tmp_path, other, identity)
    # More data behind the same: only what was the incomplete end is written again.
    short = plan_of(seed, first=20)
    store(tmp_path / "grown", teacher, short, range(short.num_shards))
    assert finished_shards(tmp_path / "grown", short, identity) == {0, 1, 2}
    assert finished_shards(tmp_path / "grown", plan, identity) == {0, 1}
    store(tmp_path / "grown", teacher, plan, range(2, plan.num_shards))
    store(tmp_path / "whole", teacher, plan, range(plan.num_shards))
    for path in (tmp_path / "whole").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "grown" / path.name).read_bytes(), say(
            seed, path.name
        )


@pytest.mark.fault(15)
def test_one_job_at_a_time(tmp_path: Path) -> None:
    with sole_writer(tmp_path, 3, writes=True):
        with (
            pytest.raises(CacheInUse, match=f"is being written by process {os.getpid()} of "),
            sole_writer(tmp_path, 3, writes=True),
        ):
            pass
        with sole_writer(tmp_path, 4, writes=True), sole_writer(tmp_path, 3, writes=False):
            pass
    with sole_writer(tmp_path, 3, writes=True):
        pass


@pytest.mark.parametrize("selection", SELECTIONS, ids=["top", "draws"])
def test_recheck_finds_targets_of_another_teacher(selection: Selection, tmp_path: Path) -> None:
    seed = fresh_seed()
    teacher, plan = Teacher(seed, selection), plan_of(seed)
    identity = store(tmp_path, teacher, plan, range(3))

    def check(live_teacher: Teacher) -> tuple[int, int, int]:
        result = recheck(
            live_teacher,
            CacheReader(tmp_path),
            plan,
            samples=50,
            seed=seed,
            device=torch.device("cpu"),
        )
        assert result is not None
        return len(result.distances), len(result.wrong), len(result.missing)

    assert check(teacher) == (24, 0, 26), say(seed)
    assert check(Teacher(seed + 1, selection)) == (24, 24, 26), say(seed)
    # One sample has another one's target, with correct checksums.
    (other_target,) = Teacher(seed, selection).targets([_batch(plan.sample(10))])
    with CacheWriter(tmp_path, identity, shard=1) as writer:
        for number in range(8, 16):
            (target,) = teacher.targets([_batch(plan.sample(number))])
            writer.add(
                plan.sample(number),
                (other_target if number == 9 else target).map(lambda t: t[:, 0]),
            )
    result = recheck(
        teacher, CacheReader(tmp_path), plan, samples=50, seed=seed, device=torch.device("cpu")
    )
    assert result is not None, say(seed)
    assert list(result.wrong) == [9], say(seed)


def _batch(tokens: Tensor) -> Microbatch:
    ((_, batch),) = make_microbatches([tokens], 1, torch.device("cpu"), False)
    return batch


def test_total_variation() -> None:
    def target(ids: list[int], shares: list[float]) -> SparseTarget:
        return SparseTarget(torch.tensor([ids], dtype=torch.int32), torch.tensor([shares]).log())

    one = target([3, 5, -1], [0.5, 0.25, 0.0])
    for other, expected in (
        (one, 0.0),
        (target([5, 3], [0.1, 0.2]), 0.0),
        (target([7, 9], [0.5, 0.5]), 1.0),
        (target([3, 9], [0.5, 0.5]), 0.5),
        (target([3], [0.9]), 1 / 3),
    ):
        assert float(total_variation(one, other)) == pytest.approx(expected, abs=1e-6)
        assert float(total_variation(other, one)) == pytest.approx(expected, abs=1e-6)
    assert 0 < TOLERANCE < 0.1

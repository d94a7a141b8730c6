"""Test that records are found by their key, in files that are complete or absent.

Damage and mismatch are reported and never read as targets.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_kd.cache import (
    CacheError,
    CacheIdentity,
    CacheInUse,
    CacheReader,
    CacheWriter,
    MissingTarget,
    WrongCache,
)
from megatron_kd.targets.sample_keys import sample_key, sample_keys
from tests.cache.cache_samples import IDENTITY, SELECTION, S, Sample, V, holds, same, samples
from tests.losses.cases import fresh_seed, say


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[tuple[Path, list[Sample]]]:
    """Provide 150 samples in three shards, the middle one of more than one record batch."""
    made = samples(fresh_seed(), 150)
    for shard, part in enumerate((made[:20], made[20:130], made[130:])):
        with CacheWriter(tmp_path / "cache", IDENTITY, shard=shard) as writer:
            for tokens, target in part:
                writer.add(tokens, target)
    yield tmp_path / "cache", made


def test_any_number_of_writers_and_any_order(tmp_path: Path) -> None:
    seed = fresh_seed()
    made = samples(seed, 90)
    random.Random(seed).shuffle(made)
    with (
        CacheWriter(tmp_path, IDENTITY, worker=0, shard_samples=7) as first,
        CacheWriter(tmp_path, IDENTITY, worker=3) as second,
    ):
        for number, (tokens, target) in enumerate(made):
            (first if number % 3 else second).add(tokens, target)
            first.add(tokens, target)  # twice is once
    with CacheWriter(tmp_path, IDENTITY) as third:  # goes on where worker 0 ended
        third.add(*made[0])
    reader = CacheReader(tmp_path)
    assert reader.identity == IDENTITY
    assert all(same(reader.get(tokens.int()), target) for tokens, target in made), say(seed)
    strange = samples(seed + 1, 1)[0][0]
    assert reader.missing([sample_key(made[5][0]), sample_key(strange)]) == [1]
    with pytest.raises(
        MissingTarget, match=f"holds no target for the sample {sample_key(strange).hex()}"
    ):
        reader.get(strange)


def test_names_depend_on_the_ids_alone() -> None:
    tokens = torch.randint(0, V, (3, S))
    words = sample_keys(tokens)
    assert words.shape == (3, 2)
    assert words.dtype == torch.int64
    assert (
        [row.numpy().tobytes() for row in words]
        == [sample_key(row) for row in tokens]
        == [sample_key(row.int()) for row in tokens]
    )
    assert (
        len(
            {
                sample_key(row)
                for row in (tokens[0], tokens[0].flip(0), tokens[0][:-1], tokens[0] + 1)
            }
        )
        == 4
    )


@pytest.mark.fault(9)
def test_another_identity_is_refused_with_every_difference(
    cache: tuple[Path, list[Sample]],
) -> None:
    directory, _ = cache
    other = CacheIdentity("ef" * 32, "cd" * 32, V, 2 * S, SELECTION, "fp32")
    for attempt in (
        lambda: CacheReader(directory, expect=other),
        lambda: CacheWriter(directory, other),
    ):
        with pytest.raises(WrongCache) as caught:
            attempt()
        for part in ("ab" * 32, "ef" * 32, f"sequence_length: the cache has {S}, expected {2 * S}"):
            assert part in str(caught.value)
    with pytest.raises(MissingTarget, match="there is no teacher cache at"):
        CacheReader(directory / "nothing")


@pytest.mark.fault(15)
def test_two_writers_of_one_name(tmp_path: Path) -> None:
    with (
        CacheWriter(tmp_path, IDENTITY) as _,
        pytest.raises(CacheInUse, match=f"is being written by process {os.getpid()} of "),
    ):
        CacheWriter(tmp_path, IDENTITY)
    CacheWriter(tmp_path, IDENTITY).close()


def test_an_error_drops_the_open_shard_only(tmp_path: Path) -> None:
    made = samples(fresh_seed(), 12)

    class StopError(Exception):
        pass

    with pytest.raises(StopError), CacheWriter(tmp_path, IDENTITY, shard_samples=5) as writer:  # noqa: PT012
        for tokens, target in made:
            writer.add(tokens, target)
        raise StopError
    assert holds(tmp_path, made[:10])
    assert not list(tmp_path.glob(".*partial*"))


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokens, target = samples(fresh_seed(), 1)[0]
    with CacheWriter(tmp_path, IDENTITY) as writer:
        with pytest.raises(ValueError, match=r"this cache holds samples of 16 tokens"):
            writer.add(tokens[:-1], target)
        with pytest.raises(ValueError, match=f"id {V} is past the vocabulary of {V} ids"):
            writer.add(
                tokens,
                target.map(
                    lambda t: torch.where(t == t.max(), V, t) if t.dtype == torch.int32 else t
                ),
            )
    assert len(CacheReader(tmp_path)) == 0


def read_all(directory: Path, expected: list[Sample]) -> str | None:
    """Return None if all is right, or the error; a wrong number fails the test."""
    try:
        reader = CacheReader(directory, expect=IDENTITY)
        for tokens, target in expected:
            assert same(reader.get(tokens), target), "a wrong number"
    except CacheError as error:
        return str(error)
    return None


@pytest.mark.fault(5)
def test_every_flipped_byte_is_named_or_harmless(
    cache: tuple[Path, list[Sample]], measured: Callable[[str], None]
) -> None:
    """Flip bytes one by one.

    Harmless ones are in Arrow's alignment padding and in unused parts of its headers.
    """
    directory, made = cache
    seed = fresh_seed()
    generator = random.Random(seed)
    caught = 0
    for name in ("shard-00000000.arrow", "shard-00000000.json", "cache.json"):
        path = directory / name
        good = path.read_bytes()
        for place in generator.sample(range(len(good)), 60):
            path.write_bytes(
                good[:place]
                + bytes([good[place] ^ generator.randrange(1, 256)])
                + good[place + 1 :]
            )
            problem = read_all(directory, made)
            caught += problem is not None
            assert problem is None or str(directory) in problem, say(seed, name, place, problem)
        path.write_bytes(good)
    assert read_all(directory, made) is None
    assert caught > 60
    measured(f"{caught} of 180 flipped bytes named, the rest harmless, 0 wrong numbers")


@pytest.mark.fault(5)
def test_column_names_of_other_bytes(cache: tuple[Path, list[Sample]]) -> None:
    """Check that a name that is no longer text is reported like other damage."""
    directory, made = cache
    path = directory / "shard-00000000.arrow"
    good = path.read_bytes()
    for name in (b"key", b"tokens", b"crc32", b"payload"):
        assert name in good
        path.write_bytes(good.replace(name, b"\xa5" + name[1:]))
        assert str(path) in (read_all(directory, made) or "nothing said"), name
    path.write_bytes(good)
    assert read_all(directory, made) is None


@pytest.mark.fault(5)
def test_truncation_at_any_length_is_named(cache: tuple[Path, list[Sample]]) -> None:
    directory, made = cache
    seed = fresh_seed()
    for name in ("shard-00000001.arrow", "shard-00000001.json", "cache.json"):
        path = directory / name
        good = path.read_bytes()
        for length in (
            0,
            1,
            7,
            8,
            len(good) - 2,
            *random.Random(seed).sample(range(len(good) - 1), 12),
        ):
            path.write_bytes(good[:length])
            problem = read_all(directory, made)
            assert problem is not None, say(seed, name, length, problem)
            assert name in problem, say(seed, name, length, problem)
        path.write_bytes(good)


@pytest.mark.fault(5)
def test_shards_swapped_renamed_deleted_duplicated(cache: tuple[Path, list[Sample]]) -> None:
    directory, made = cache
    first, second = directory / "shard-00000000.arrow", directory / "shard-00000002.arrow"
    shutil.move(first, directory / "aside")
    shutil.move(second, first)
    shutil.move(directory / "aside", second)
    assert "expected" in str(read_all(directory, made))
    shutil.move(first, directory / "aside")
    shutil.move(second, first)
    shutil.move(directory / "aside", second)
    assert read_all(directory, made) is None

    shutil.copy(
        first, directory / "shard-00000009.arrow"
    )  # without its description it was never finished
    assert read_all(directory, made) is None
    shutil.copy(directory / "shard-00000000.json", directory / "shard-00000009.json")
    assert "it names 'shard-00000000.arrow', expected 'shard-00000009.arrow'" in str(
        read_all(directory, made)
    )
    (directory / "shard-00000009.json").unlink()

    shutil.move(first, directory / "shard-00000007.arrow")
    assert f"{first} is missing, but shard-00000000.json says it holds 20 records" in str(
        read_all(directory, made)
    )
    (directory / "shard-00000000.json").unlink()
    assert "holds no target for the sample" in str(read_all(directory, made))


@pytest.mark.fault(5)
def test_shards_of_one_size_swapped(tmp_path: Path) -> None:
    """Swap two shards of one size.

    The file beside a shard has its training step: with the records of another shard, an old target
    would pass for the latest.
    """
    (sample,) = samples(fresh_seed(), 1)
    names = []
    for step in (100, 200):
        with CacheWriter(tmp_path, IDENTITY, step=step) as writer:
            writer.add(*sample)
        names.append(max(path for path in tmp_path.glob("*.arrow")))
    assert names[0].stat().st_size == names[1].stat().st_size
    assert read_all(tmp_path, [sample]) is None
    for source, target in (
        (names[0], tmp_path / "aside"),
        (names[1], names[0]),
        (tmp_path / "aside", names[1]),
    ):
        shutil.move(source, target)
    assert f"{names[0]}: it was written as '{names[1].stem}', expected '{names[0].stem}'" in str(
        read_all(tmp_path, [sample])
    )


def test_a_shard_of_another_cache_is_refused(
    cache: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    directory, made = cache
    other = CacheIdentity("ef" * 32, "cd" * 32, V, S, SELECTION, "fp32")
    with CacheWriter(tmp_path / "other", other, shard=5) as writer:
        writer.add(*made[0])
    for kind in ("arrow", "json"):
        shutil.copy(tmp_path / "other" / f"shard-00000005.{kind}", directory)
    problem = str(read_all(directory, made))
    assert "shard-00000005.arrow: a shard of another cache" in problem
    assert "ab" * 32 in problem
    assert "ef" * 32 in problem


def test_the_latest_training_step_is_read(tmp_path: Path) -> None:
    (tokens, early), (_, late) = samples(fresh_seed(), 2)
    for step, target in ((200, late), (100, early)):
        with CacheWriter(tmp_path, IDENTITY, step=step) as writer:
            writer.add(tokens, target)
    reader = CacheReader(tmp_path)
    assert same(reader.get(tokens), late)
    assert sorted(shard.info.step for shard in reader.shards) == [100, 200]


def test_a_remote_cache_reads_alike(cache: tuple[Path, list[Sample]]) -> None:
    fsspec = pytest.importorskip("fsspec")
    directory, made = cache
    remote = fsspec.filesystem("memory")
    remote.put(str(directory), "/store", recursive=True)
    reader = CacheReader("memory://store", expect=IDENTITY)
    assert len(reader) == 150
    assert all(same(reader.get(tokens), target) for tokens, target in made[::7])
    assert json.loads(remote.cat_file("/store/cache.json"))["identity"]["vocab_size"] == V

"""Test stats, verify, repair and merge, by the library and by the tool."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kd.cache import CacheIdentity, CacheReader, CacheWriter, WrongCache
from megatron_kd.cache.identity import write_identity
from megatron_kd.cache.staged import StagedWriter
from megatron_kd.cache.verify import merge, statistics, verify
from tests.cache.cache_samples import IDENTITY, S, Sample, V, holds, samples
from tests.losses.cases import fresh_seed

ROOT = Path(__file__).parents[2]


def write(directory: Path, made: list[Sample], shards: int) -> None:
    size = -(-len(made) // shards)
    for shard in range(shards):
        with CacheWriter(directory, IDENTITY, shard=shard) as writer:
            for tokens, target in made[shard * size : (shard + 1) * size]:
                writer.add(tokens, target)


def tool(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "tools/inspect_cache.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_statistics(tmp_path: Path) -> None:
    stored = samples(fresh_seed(), 30)
    write(tmp_path / "cache", stored, 2)
    sums = statistics(CacheReader(tmp_path / "cache"))
    kept = [(target.indices >= 0).sum(1) for _, target in stored]
    assert (sums.samples, sums.tokens) == (30, 30 * S)
    assert sum(sums.kept) == sums.tokens
    assert (
        sums.entries
        == sum(int(k.sum()) for k in kept)
        == sum(n * count for n, count in enumerate(sums.kept))
    )
    assert sums.mass == pytest.approx(
        sum(float(t.logprobs.double().exp().sum()) for _, t in stored)
    )
    assert sums.entropy == pytest.approx(
        sum(float(t.entropy.double().sum()) for _, t in stored if t.entropy is not None)
    )
    code, output = tool("stats", tmp_path / "cache", "--json", "--picture", tmp_path / "kept.png")
    assert code == 0, output
    assert json.loads(output)["bytes_per_token"] == pytest.approx(sums.bytes / sums.tokens), output
    assert (tmp_path / "kept.png").stat().st_size > 1000
    code, output = tool("stats", tmp_path / "cache", "--samples", "3")
    assert code == 0
    assert f"{3 * S}" in output
    assert "####" in output


def test_verify_and_repair(tmp_path: Path) -> None:
    made = samples(fresh_seed(), 30)
    cache = tmp_path / "cache"
    write(cache, made, 3)
    assert verify(cache) == ({}, [])
    assert tool("verify", cache)[0] == 0
    path = cache / "shard-00000001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (cache / ".shard-00000005.arrow.partial-77").write_bytes(b"x")
    problems, strays = verify(cache)
    assert list(problems) == ["shard-00000001"]
    assert strays == [".shard-00000005.arrow.partial-77"]
    assert f"{path}: SHA-256" in problems["shard-00000001"]
    assert "expected" in problems["shard-00000001"]
    code, output = tool("verify", cache)
    assert code == 1
    assert "1 bad shards" in output
    code, output = tool("repair", cache)
    assert code == 0, output
    assert "1 shards to write again" in output, output
    assert verify(cache) == ({}, [])
    assert holds(cache, made[:10] + made[20:])
    (cache / "cache.json").write_text("{}")
    assert tool("repair", cache)[0] == 1
    assert len(list(cache.glob("*.arrow"))) == 2


def test_merge(tmp_path: Path) -> None:
    made = samples(fresh_seed(), 40)
    write(tmp_path / "first", made[:25], 2)
    write(tmp_path / "second", made[20:], 1)
    assert merge([tmp_path / "first", tmp_path / "second"], tmp_path / "all") == 3
    assert holds(tmp_path / "all", made)
    assert verify(tmp_path / "all") == ({}, [])
    code, output = tool("merge", tmp_path / "first", "--output", tmp_path / "all")
    assert code == 0, output
    assert "0 shards added, 40 samples" in output, output

    with_steps = tmp_path / "steps"
    write_identity(with_steps, IDENTITY)
    writer = StagedWriter(with_steps, IDENTITY, worker=0, shard_steps=3)
    for step in range(6):
        writer.add(step, *made[step % 4])
    writer.stage()
    writer.publish()
    writer.close()
    ranges = {(0, 2), (3, 5)}
    assert merge([with_steps], tmp_path / "merged") == 2
    for directory in (with_steps, tmp_path / "merged"):
        assert {
            (shard.info.step, shard.info.last_step) for shard in CacheReader(directory).shards
        } == ranges
    assert "training steps       0 to 5" in tool("stats", with_steps)[1]

    with CacheWriter(
        tmp_path / "other", CacheIdentity("ef" * 32, "cd" * 32, V, S, IDENTITY.selection, "fp32")
    ) as writer:
        writer.add(*made[0])
    with pytest.raises(WrongCache, match="teacher: the cache has"):
        merge([tmp_path / "first", tmp_path / "other"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    shutil.rmtree(tmp_path / "all")

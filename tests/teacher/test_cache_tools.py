"""Compare, repair and measure a cache."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.teacher.stored_runs import extraction, records, student
from tests.train.test_program import command, finish, start, write_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def inspect(run_file: Path, *arguments: str, ranks: int = 1) -> tuple[int, str]:
    """Run tools/inspect_cache.py; return its exit code and output."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    program = [sys.executable, *launcher, "tools/inspect_cache.py"]
    return finish(start([*program, *arguments, "--config", str(run_file)]))


@pytest.mark.slow
def test_compare_with_the_teacher(teacher: tuple[Path, str], tmp_path: Path) -> None:
    run_file, cache = student(tmp_path, "student", teacher), tmp_path / "cache"
    code, output = finish(start(extraction(run_file, cache, "--shard-samples", "50")))
    assert code == 0, output

    for ranks, layout in (
        (1, []),
        (2, ["--parallel.tensor", "2"]),
        (2, ["--parallel.pipeline", "2"]),
    ):
        code, output = inspect(
            run_file, "verify", str(cache), "--recompute", "9", *layout, ranks=ranks
        )
        assert code == 0, output
        assert "9 samples compared, 0 wrong" in output, output
    other = write_run(
        tmp_path,
        "other",
        teacher[1],
        model={"hidden_size": 48},
        train={"steps": 2, "seed": 9},
        checkpoint={"interval": 2},
    )
    assert finish(start(command(other)))[0] == 0
    code, output = inspect(
        run_file,
        "verify",
        str(cache),
        "--recompute",
        "3",
        "--teacher.checkpoint",
        str(tmp_path / "other"),
    )
    assert code == 1, output
    assert "teacher: the cache has '" in output, output


@pytest.mark.slow
@pytest.mark.fault(5)
def test_damaged_shards_are_repaired(teacher: tuple[Path, str], tmp_path: Path) -> None:
    run_file, cache = student(tmp_path, "student", teacher), tmp_path / "cache"
    code, output = finish(start(extraction(run_file, cache, "--shard-samples", "50")))
    assert code == 0, output
    before = records(cache)
    shard = cache / "shard-00000001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output = inspect(run_file, "verify", str(cache))
    assert code == 1, output
    assert re.search(
        r"shard-00000001.arrow: SHA-256 .*record \d+ of batch 0 \(key \w+\): checksum", output
    ), output
    cached = ["--teacher.source", "cached", "--teacher.cache", str(cache), "--train.steps", "60"]
    code, output = finish(start([*command(run_file), *cached]))
    assert code == 2, output
    assert re.search(
        r"^megatron_kd: error: teacher.cache: .*shard-00000001.*checksum.*repair$", output, re.M
    ), output
    assert "Traceback" not in output, output
    code, output = inspect(run_file, "repair", str(cache), "--shard-samples", "50")
    assert code == 0, output
    assert f"removed: {shard}: SHA-256" in output, output
    assert records(cache) == before
    code, output = finish(start(extraction(run_file, cache, "--shard-samples", "40")))
    assert code == 2, output
    assert "another --shard-samples" in output, output


@pytest.mark.slow
def test_benchmarks_of_the_cache(teacher: tuple[Path, str], tmp_path: Path) -> None:
    run_file = student(tmp_path, "student", teacher)
    result = tmp_path / "result.json"
    code, output = finish(
        start(
            [
                sys.executable,
                "tools/bench_cache.py",
                *f"--config {run_file} --samples 4 --rounds 2 --output {result}".split(),
            ]
        )
    )
    assert code == 0, output
    assert "megatron" in output, output
    for row in json.loads(result.read_text())["layouts"]:
        assert row["ids_equal"], row
        assert 0 <= row["kl_mean"] < 1e-4, row
        assert row["decode_tokens_per_second"]["min"] > 0, row
        assert 0 < row["bytes_per_token"] < 500, row
        assert row["kl_max"] < 1e-12 or "fp32" not in row["layout"], row
    code, output = finish(start(extraction(run_file, tmp_path / "cache")))
    assert code == 0, output
    source = f"--teacher.source cached --teacher.cache {tmp_path / 'cache'}".split()
    code, output = finish(
        start(
            [
                sys.executable,
                "tools/bench_loader.py",
                "--config",
                str(run_file),
                "--rounds",
                "3",
                "--json",
                *source,
            ]
        )
    )
    assert code == 0, output
    assert 0 < json.loads(output[output.index("{") :])["cached / memory"]["median"] < 10, output

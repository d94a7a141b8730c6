"""The teacher stored once and read by students: the same curves as with the live teacher, in any layout, order and after any kill."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer

from megatron_kd.cache import CacheReader
from megatron_kd.config import dump_toml
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.tiny import VOCAB, tiny, write_tokens
from tests.train.test_program import command, finish, kill_tree, read_metrics, start, write_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

SELECTION = {"top_k": 12, "top_p": 0.95, "tail": "bucket", "alpha": 0.7}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A teacher of a few steps, and the tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    tokens = write_tokens(folder, tokens=4000)
    config = write_run(
        folder,
        "teacher",
        tokens,
        model={"hidden_size": 48},
        train={"steps": 10},
        checkpoint={"interval": 10},
    )
    code, output = finish(start(command(config)))
    assert code == 0, output
    return folder / "teacher", tokens


def extraction(run_file: Path, cache: Path, *options: str, ranks: int = 1) -> list[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    return [
        sys.executable,
        *launcher,
        "tools/cache_teacher.py",
        "--config",
        str(run_file),
        "--output",
        str(cache),
        *options,
    ]


def student(folder: Path, name: str, made: tuple[Path, str], /, **overrides: Any) -> Path:
    settings: dict[str, Any] = {
        "distill": SELECTION,
        "train": {"steps": 6},
        "teacher": {"source": "online", "checkpoint": str(made[0])},
    }
    for section, keys in overrides.items():
        settings[section] = {**settings.get(section, {}), **keys}
    return write_run(folder, name, made[1], **settings)


def records(cache: Path) -> dict[bytes, bytes]:
    reader = CacheReader(cache)
    return {key: reader.record(key).payload for key in reader.keys()}


def losses(folder: Path) -> list[tuple[float, float, float]]:
    return [
        (row["total_loss"], row["ce_loss"], row["kd_loss"])
        for row in read_metrics(folder)
        if "split" not in row
    ]


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_stored_teacher_teaches_like_the_live_one(
    teacher: tuple[Path, str], tmp_path: Path, whole: bool
) -> None:
    """fp32: to the bit in one process; other layouts, micro-batch and seed within what layouts differ by. Quantised: close."""
    online = student(tmp_path, "online", teacher)
    for encoding in ("fp32", "quantized"):
        code, output = finish(
            start(
                extraction(
                    online,
                    tmp_path / encoding,
                    "--value-encoding",
                    encoding,
                    "--shard-samples",
                    "50",
                )
            )
        )
        assert code == 0, output
    assert finish(start(command(online)))[0] == 0

    def cached(
        name: str, encoding: str = "fp32", *, ranks: int = 1, **overrides: Any
    ) -> list[tuple[float, float, float]]:
        source = {"source": "cached", "cache": str(tmp_path / encoding)}
        code, output = finish(
            start(
                command(student(tmp_path, name, teacher, teacher=source, **overrides), ranks=ranks)
            )
        )
        assert code == 0, output
        return losses(tmp_path / name)

    live = losses(tmp_path / "online")
    assert len(live) == 6
    assert all(kd > 0 for _, _, kd in live)
    torch.testing.assert_close(
        torch.tensor(cached("close", "quantized")), torch.tensor(live), rtol=2e-3, atol=2e-4
    )
    assert cached("same") == live
    if not whole:
        return
    for name, ranks, overrides in (
        ("tensor", 2, {"parallel": {"tensor": 2}}),
        ("pipeline", 2, {"parallel": {"pipeline": 2}}),
        ("data", 2, {"batch": {"micro_batch_size": 1}}),
    ):
        torch.testing.assert_close(
            torch.tensor(cached(name, ranks=ranks, **overrides)),
            torch.tensor(live),
            rtol=1e-5,
            atol=1e-6,
        )

    other = {"train": {"seed": 8}}
    assert finish(start(command(student(tmp_path, "online8", teacher, **other))))[0] == 0
    assert cached("other8", **other) != live
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "other8")),
        torch.tensor(losses(tmp_path / "online8")),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_the_readme_s_commands(teacher: tuple[Path, str], tmp_path: Path) -> None:
    """As they stand there, on two processes in place of eight."""
    run_file = student(
        tmp_path, "run", teacher, batch={"global_batch_size": 4, "micro_batch_size": 2}
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
        if "cache_teacher" in block
    ]
    lines = block.splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(
            line.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2"), comments=True
        )
        words = [
            {"run.toml": str(run_file), "cache/": str(tmp_path / "cache")}.get(word, word)
            for word in words
        ]
        module = (
            ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:]
        )
        code, output = finish(start([sys.executable, *module]))
        assert code == 0, output
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_draws_are_the_same_live_and_stored(teacher: tuple[Path, str], tmp_path: Path) -> None:
    draws = {"distill": {"num_draws": 20, "alpha": 0.7}}
    paths = []
    for name, source in (
        ("online", {}),
        ("cached", {"source": "cached", "cache": str(tmp_path / "cache")}),
    ):
        content = tiny(
            tmp_path / name,
            teacher[1],
            teacher={"source": "online", "checkpoint": str(teacher[0]), **source},
            train={"steps": 4},
            **draws,
        )
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(dump_toml(content))
    code, output = finish(start(extraction(paths[0], tmp_path / "cache")))
    assert code == 0, output
    for path in paths:
        code, output = finish(start(command(path)))
        assert code == 0, output
    assert losses(tmp_path / "cached") == losses(tmp_path / "online")


@pytest.mark.slow
@pytest.mark.fault(3)
def test_extraction_killed_and_resumed_with_other_processes(
    teacher: tuple[Path, str], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """SIGKILL at random moments with 2, then 1, then 3 processes: the records of an uninterrupted run, bit for bit."""
    # So many that a fast machine is not through with them when the kill comes.
    many = (teacher[0], write_tokens(tmp_path, tokens=40_000))
    run_file = student(
        tmp_path, "student", many, batch={"global_batch_size": 12, "micro_batch_size": 2}
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = finish(start(extraction(run_file, whole, "--shard-samples", "4")))
    assert code == 0, output
    for ranks in (2, 1, 3):
        process = start(extraction(run_file, broken, "--shard-samples", "4", ranks=ranks))
        before = len(list(broken.glob("*.json"))) if broken.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if broken.exists() and len(list(broken.glob("*.json"))) > before + 3:
                break
            time.sleep(0.02)
        time.sleep(0.2 * random.random())
        kill_tree(process)
        process.communicate()
    assert 0 < len(records(broken)) < len(records(whole))
    measured(
        f"killed on 2, 1 and 3 processes, {len(records(broken))} of {len(records(whole))} records there; then the same bytes"
    )
    code, output = finish(start(extraction(run_file, broken, "--shard-samples", "4", ranks=2)))
    assert code == 0, output
    assert records(broken) == records(whole)
    assert {p.name for p in broken.glob("shard-*")} == {p.name for p in whole.glob("shard-*")}


def train_vocabulary(prefix: Path, word: str) -> Path:
    """A SentencePiece model of as many ids as the data has."""
    text = prefix.with_suffix(".txt")
    text.write_text(
        "\n".join(
            f"{word} {number} {chr(97 + number % 26)}{chr(65 + number % 26)} {number * 7919}"
            for number in range(3000)
        )
    )
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.mark.slow
@pytest.mark.fault(9)
def test_what_does_not_fit_is_refused_before_step_0(
    teacher: tuple[Path, str], tmp_path: Path
) -> None:
    run_file = student(tmp_path, "online", teacher)
    cache = tmp_path / "cache"
    code, output = finish(start(extraction(run_file, cache, "--first-samples", "30")))
    assert code == 0, output
    source = {"source": "cached", "cache": str(cache)}

    def refused(name: str, **overrides: Any) -> str:
        overrides["teacher"] = {**source, **overrides.get("teacher", {})}
        code, output = finish(start(command(student(tmp_path, name, teacher, **overrides))))
        assert code == 2, output
        assert not (tmp_path / name / "metrics.jsonl").exists(), output
        (sentence,) = [
            line for line in output.splitlines() if line.startswith("megatron_kd: error:")
        ]
        return sentence

    assert "lacks " in (said := refused("part"))
    assert "of the next 24 samples" in said
    assert "made from a part of the data" in said
    assert "sequence_length: the cache has 24, expected 16" in refused(
        "short", batch={"sequence_length": 16}
    )
    assert "selection: the cache has 'TopSelection(top_k=12" in refused(
        "other_k", distill={"top_k": 13}
    )
    digest = json.loads((cache / "cache.json").read_text())["identity"]["teacher"]
    config = write_run(
        tmp_path, "second", teacher[1], train={"steps": 2, "seed": 3}, checkpoint={"interval": 2}
    )
    assert finish(start(command(config)))[0] == 0
    said = refused("other_teacher", teacher={"checkpoint": str(tmp_path / "second")})
    assert f"teacher: the cache has '{digest}', expected '" in said
    # Two vocabularies of equal size. Nothing but the cache knows which one its ids are of.
    models = [train_vocabulary(tmp_path / name, name) for name in ("first", "other")]
    named = student(tmp_path, "named", teacher, data={"tokenizer": str(models[0])})
    assert (
        finish(start(extraction(named, tmp_path / "named_cache", "--first-samples", "2")))[0] == 0
    )
    said = refused(
        "other_words",
        data={"tokenizer": str(models[1])},
        teacher={"cache": str(tmp_path / "named_cache")},
    )
    digests = [load_tokenizer(model)[1].digest for model in models]
    assert f"tokenizer: the cache has '{digests[0]}', expected '{digests[1]}'" in said
    assert "there is no teacher cache at" in refused(
        "nowhere", teacher={"cache": str(tmp_path / "nothing")}
    )

    # Where it is asked for, the live teacher answers for what is missing: the same losses as with it alone.
    online = finish(start(command(run_file)))
    assert online[0] == 0, online[1]
    # What keeps fewer entries takes them out of the same cache.
    fewer = {"top_k": 5, "top_p": 0.8}
    assert (
        finish(
            start(
                command(
                    student(tmp_path, "fewer", teacher, distill=fewer, teacher={"source": "online"})
                )
            )
        )[0]
        == 0
    )
    assert abs(losses(tmp_path / "fewer")[-1][2] / losses(tmp_path / "online")[-1][2] - 1) > 0.01
    cases = (
        ("mixed", "online", 1, {}, {}),
        ("mixed_pipeline", "online", 2, {"pipeline": 2}, {}),
        ("part_of_it", "fewer", 1, {}, fewer),
    )
    for name, like, ranks, parallel, distill in cases:
        mixed = student(
            tmp_path,
            name,
            teacher,
            teacher={**source, "on_miss": "online"},
            parallel=parallel,
            distill=distill,
        )
        code, output = finish(start(command(mixed, ranks=ranks)))
        assert code == 0, output
        torch.testing.assert_close(
            torch.tensor(losses(tmp_path / name)),
            torch.tensor(losses(tmp_path / like)),
            rtol=3e-3,
            atol=3e-4,
        )


@pytest.mark.slow
@pytest.mark.fault(5)
def test_a_cache_is_compared_with_its_teacher_and_repaired(
    teacher: tuple[Path, str], tmp_path: Path
) -> None:
    run_file, cache = student(tmp_path, "student", teacher), tmp_path / "cache"
    code, output = finish(start(extraction(run_file, cache, "--shard-samples", "50")))
    assert code == 0, output

    def inspect(*arguments: str, ranks: int = 1) -> tuple[int, str]:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            if ranks > 1
            else []
        )
        return finish(
            start(
                [
                    sys.executable,
                    *launcher,
                    "tools/inspect_cache.py",
                    *arguments,
                    "--config",
                    str(run_file),
                ]
            )
        )

    for ranks, layout in (
        (1, []),
        (2, ["--parallel.tensor", "2"]),
        (2, ["--parallel.pipeline", "2"]),
    ):
        code, output = inspect("verify", str(cache), "--recompute", "9", *layout, ranks=ranks)
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
        "verify", str(cache), "--recompute", "3", "--teacher.checkpoint", str(tmp_path / "other")
    )
    assert code == 1, output
    assert "teacher: the cache has '" in output, output

    before = records(cache)
    shard = cache / "shard-00000001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output = inspect("verify", str(cache))
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
    code, output = inspect("repair", str(cache), "--shard-samples", "50")
    assert code == 0, output
    assert f"removed: {shard}: SHA-256" in output, output
    assert records(cache) == before
    code, output = finish(start(extraction(run_file, cache, "--shard-samples", "40")))
    assert code == 2, output
    assert "another --shard-samples" in output, output


@pytest.mark.slow
def test_the_cache_s_benchmarks(teacher: tuple[Path, str], tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.fault(6, 15)
def test_two_writers_and_a_full_disk(teacher: tuple[Path, str], tmp_path: Path) -> None:
    run_file = student(tmp_path, "student", teacher)
    cache = tmp_path / "cache"
    from megatron_kd.cache.writer import lock_writer

    held = lock_writer(cache / ".job-00000.lock")
    code, output = finish(start(extraction(run_file, cache)))
    held.release()
    assert code == 3, output
    assert f"is being written by process {os.getpid()} of" in output, output
    limited = [
        "bash",
        "-c",
        'ulimit -f 16; trap "" XFSZ; exec "$@"',
        "bash",
        *extraction(
            run_file, tmp_path / "full", "--shard-samples", "500", "--value-encoding", "fp32"
        ),
    ]
    process = subprocess.Popen(
        limited,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, output = finish(process)
    assert code == 5, output
    assert "finished shards are kept" in output, output

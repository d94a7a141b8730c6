"""Test the digests of a checkpoint's files.

Any changed byte is detected, and nothing outside the folder is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.checkpoint.background_verify import CheckpointLog, Verifier
from megatron_kd.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    DamagedCheckpointError,
    DigestingStream,
    _part,
    read_manifest,
    seal,
    verify,
    wait_for_sizes,
    write_file,
)
from megatron_kd.checkpoint.store import (
    complete_steps,
    prune,
    quarantine,
    remove_leftovers,
    step_folder,
)
from tests.helpers.tools import run_tools
from tests.losses.cases import fresh_seed


def make(folder: Path, files: int = 4, seed: int = 0) -> Path:
    """Return a sealed folder of random files."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records = {
        f"__{i}_0.distcp": write_file(folder, f"__{i}_0.distcp", rng.bytes(3000 + 100 * i))
        for i in range(files)
    }
    state = json.dumps(
        {
            "format": 2,
            "step": 0,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "nonfinite_steps": 0,
            "model": {},
        }
    )
    state = state[:-1] + (
        ', "vocab_size": 9, "tokenizer": null, "precision": "fp32", "distributed_optimizer": '
        'null, "version": "0"}'
    )
    records["state.json"] = write_file(folder, "state.json", state.encode())
    seal(folder, records)
    return folder


def test_any_byte_of_any_file(tmp_path: Path) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    folder = make(tmp_path / "step", seed=seed)
    assert verify(folder) == []
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for position in (0, len(original) - 1, int(rng.integers(len(original)))):
            changed = bytearray(original)
            changed[position] ^= int(rng.integers(1, 256))
            path.write_bytes(changed)
            problems = verify(folder)
            # White space in commit.json is free.
            harmless = (
                path.name == COMMIT and not problems and json.loads(changed) == json.loads(original)
            )
            assert problems or harmless, (seed, path.name, position)
            if path.name not in (MANIFEST, COMMIT):
                assert len(problems) == 1, (seed, problems)
                assert str(path) in problems[0], (seed, problems)
                assert "expected" in problems[0], (seed, problems)
        path.write_bytes(original)
    assert verify(folder) == []


def _swap(folder: Path) -> None:
    os.replace(folder / "__0_0.distcp", folder / "x")
    os.replace(folder / "__1_0.distcp", folder / "__0_0.distcp")
    os.replace(folder / "x", folder / "__1_0.distcp")


def _link(folder: Path) -> None:
    shutil.move(folder / "__0_0.distcp", folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")


def _fifo(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "__2_0.distcp").unlink(), "__2_0.distcp is missing"),
    "cut": (
        lambda f: os.truncate(f / "__2_0.distcp", 99),
        "__2_0.distcp has 99 bytes, expected 3200",
    ),
    "empty": (
        lambda f: os.truncate(f / "__2_0.distcp", 0),
        "__2_0.distcp has 0 bytes, expected 3200",
    ),
    "longer": (lambda f: os.truncate(f / "__2_0.distcp", 3201), "has 3201 bytes"),
    "swapped": (_swap, "bytes, expected"),
    "duplicate": (
        lambda f: shutil.copy(f / "__2_0.distcp", f / "__9_0.distcp"),
        "__9_0.distcp is not a file of this checkpoint",
    ),
    "link": (_link, "__0_0.distcp is not a regular file"),
    "pipe": (_fifo, "__0_0.distcp is not a regular file"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "no mark": (lambda f: (f / COMMIT).unlink(), "commit.json is missing"),
    "empty mark": (lambda f: (f / COMMIT).write_bytes(b""), "is not a list of files and digests"),
    "manifest of another": (
        lambda f: shutil.copy(make(f.parent / "b", seed=1) / MANIFEST, f / MANIFEST),
        "has SHA-256",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.fault(5)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "step")
    action, words = DAMAGE[name]
    action(folder)
    assert any(words in problem for problem in verify(folder)), verify(folder)


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "a/b", "..", "", "a\x00b", "a\nb", MANIFEST, "x" * 300]
)
@pytest.mark.fault(13)
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    """Check crafted manifests with a correct digest."""
    folder = make(tmp_path / "step")
    (tmp_path / "out").write_bytes(b"secret")
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = {"bytes": 6, "sha256": "0" * 64}
    for path in (folder / MANIFEST, folder / COMMIT):
        path.unlink()
    digest = write_file(folder, MANIFEST, json.dumps(content).encode()).sha256
    write_file(folder, COMMIT, json.dumps({"manifest_sha256": digest}).encode())
    with pytest.raises(DamagedCheckpointError, match="cannot be called"):
        read_manifest(folder)
    with pytest.raises(DamagedCheckpointError, match="cannot be called"):
        seal(tmp_path, {name: next(iter(read_manifest(make(tmp_path / "other")).values()))})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out", "step"]


def test_manifest_that_repeats_a_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "step")
    text = (folder / MANIFEST).read_text().replace('"__1_0.distcp"', '"__0_0.distcp"')
    for path in (folder / MANIFEST, folder / COMMIT):
        path.unlink()
    digest = write_file(folder, MANIFEST, text.encode()).sha256
    write_file(folder, COMMIT, json.dumps({"manifest_sha256": digest}).encode())
    assert "a name occurs twice" in verify(folder)[0]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    files = read_manifest(make(tmp_path / "step", files=7))
    parts = [_part(files, index, 3) for index in range(3)]
    assert sorted(sum(parts, [])) == sorted(files)
    sizes = [sum(files[name].bytes for name in part) for part in parts]
    assert max(sizes) - min(sizes) <= max(record.bytes for record in files.values())
    read: list[int] = []
    verify(tmp_path / "step", share=(0, 3), progress=read.append)
    assert sum(read) == sizes[0]


@pytest.mark.fault(16)
def test_a_stale_view_of_a_folder(tmp_path: Path) -> None:
    """Wait for a file that is still empty, as network file systems may show it.

    After the patience it counts as damage.
    """
    folder = make(tmp_path / "step")
    path = folder / "__1_0.distcp"
    original = path.read_bytes()
    path.write_bytes(b"")
    timer = threading.Timer(0.3, path.write_bytes, (original,))
    timer.start()
    assert verify(folder, patience=20.0) == []
    timer.join()
    path.write_bytes(b"")
    timer = threading.Timer(0.3, path.write_bytes, (original,))
    timer.start()
    wait_for_sizes(folder, read_manifest(folder), patience=20.0)
    assert path.stat().st_size == len(original)
    timer.join()
    path.write_bytes(b"")
    begin = time.monotonic()
    with pytest.raises(OSError, match="it has 0 bytes here, 3100 were written"):
        wait_for_sizes(folder, read_manifest(folder), patience=0.2)
    assert "has 0 bytes" in verify(folder, patience=0.2)[0]
    assert time.monotonic() - begin < 5


def test_stream_digests_what_is_written(tmp_path: Path) -> None:
    data = np.random.default_rng(fresh_seed()).bytes(100_000)
    with open(tmp_path / "a", "wb") as raw:
        stream = DigestingStream(raw, tmp_path / "a")
        for start in range(0, len(data), 777):
            assert stream.tell() == start
            stream.write(memoryview(data[start : start + 777]))
        stream.flush()
    assert stream.record() == write_file(tmp_path, "b", data)


def test_the_last_verified_one_is_never_removed(tmp_path: Path) -> None:
    def steps(*numbers: int) -> None:
        for step in numbers:
            step_folder(tmp_path, step).mkdir(exist_ok=True)

    steps(1, 2, 3, 4)
    assert prune(tmp_path, 1, verified=()) == []
    assert complete_steps(tmp_path) == [1, 2, 3, 4]
    assert prune(tmp_path, 1, verified={2, 9}) == [1, 3]
    assert complete_steps(tmp_path) == [2, 4]
    assert prune(tmp_path, 1, verified={2, 4}) == [2]
    assert complete_steps(tmp_path) == [4]
    steps(5, 6)
    assert prune(tmp_path, 2, verified={4, 6}) == [4]
    assert complete_steps(tmp_path) == [5, 6]
    quarantine(step_folder(tmp_path, 6))
    (tmp_path / ".incomplete-step-00000007").mkdir()
    (tmp_path / ".removed-step-00000001").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-step-00000006",
        "step-00000005",
    ]


@pytest.mark.fault(17, "S7")
def test_damaged_newest_keeps_the_last_verified(tmp_path: Path) -> None:
    """Check with keep_last = 1 that a checkpoint that does not read back replaces no other."""
    verifier = Verifier(tmp_path, keep_last=1, log=CheckpointLog(tmp_path / "log"))

    def add(step: int, *, damaged: bool = False) -> list[int]:
        folder = make(step_folder(tmp_path, step), seed=step)
        if damaged:
            (folder / "__0_0.distcp").write_bytes(bytes(3000))
        verifier.add(step)
        _wait(verifier)
        return complete_steps(tmp_path)

    assert [add(1), add(2), add(3, damaged=True), add(4, damaged=True)] == [
        [1],
        [2],
        [2, 3],
        [2, 3, 4],
    ]
    assert verifier.verified == {2}
    assert set(verifier.damaged) == {3, 4}
    assert add(5) == [5]
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [
        (record["event"], record["step"]) for record in records if record["event"] == "damaged"
    ] == [
        ("damaged", 3),
        ("damaged", 4),
    ]
    verifier.close()


def _wait(verifier: Verifier) -> None:
    deadline = time.monotonic() + 20
    while verifier.busy and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_start_finishes_a_killed_rotation(tmp_path: Path) -> None:
    """Check a kill between the last checkpoint and its rotation.

    A checkpoint that was verified at the start is not read again, and older ones are removed.
    """
    for step in (1, 2, 3):
        make(step_folder(tmp_path, step), seed=step)
    verifier = Verifier(tmp_path, keep_last=1, log=CheckpointLog(tmp_path / "log"))
    verifier.add(3, verified=True)
    _wait(verifier)
    verifier.close()
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert complete_steps(tmp_path) == [3]
    assert [(record["event"], record["step"]) for record in records] == [
        ("removed", 1),
        ("removed", 2),
    ]


def test_tool_reports_the_state_of_steps(tmp_path: Path) -> None:
    run = tmp_path / "run/checkpoints"
    for step in (1, 2, 3):
        make(run / f"step-0000000{step}", seed=step)
    os.truncate(run / "step-00000002/__0_0.distcp", 7)
    old = json.loads((run / "step-00000001/state.json").read_text())
    (tmp_path / "old/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "old/checkpoints/step-00000001/state.json").write_text(
        json.dumps({**old, "format": 1})
    )
    tool = "verify_checkpoint.py"
    # With one byte of state.json changed, nothing would be compared if only state.json decided.
    changed_state = make(tmp_path / "fooled/checkpoints/step-00000001") / "state.json"
    changed_state.write_text(changed_state.read_text().replace('"format": 2', '"format": 1'))
    done = run_tools(
        {
            "run": [tool, tmp_path / "run"],
            "json": [tool, run, "--json"],
            "good": [tool, run / "step-00000003"],
            "nothing": [tool, tmp_path / "nowhere"],
            "old": [tool, tmp_path / "old"],
            "fooled": [tool, tmp_path / "fooled"],
        },
        cwd=tmp_path,
    )
    assert [done[name].code for name in ("run", "json", "good", "nothing", "old", "fooled")] == [
        1,
        1,
        0,
        2,
        1,
        1,
    ]
    assert done["fooled"].out.startswith("damaged")
    assert "state.json has SHA-256" in done["fooled"].out
    states = [
        (Path(result["folder"]).name, result["state"]) for result in json.loads(done["json"].out)
    ]
    assert states == [
        ("step-00000003", "good"),
        ("step-00000002", "damaged"),
        ("step-00000001", "good"),
    ]
    assert "__0_0.distcp has 7 bytes, expected 3000" in done["run"].out
    assert done["good"].out.startswith("good ")
    assert "no checkpoint at" in done["nothing"].err
    assert "without digests" in done["old"].out

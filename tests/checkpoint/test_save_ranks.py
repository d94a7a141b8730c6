"""Test saving on two ranks.

A checkpoint is complete when every rank is, holds the state of its step, and a failure of one rank
reaches all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_kd.checkpoint.manifest import read_manifest
from megatron_kd.checkpoint.store import step_folder
from tests.checkpoint.fault_runs import events, intact_steps, state_digests
from tests.checkpoint.save_ranks import in_two_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saves")
    config = tiny(
        folder / "run", write_tokens(folder), parallel={"tensor": 2}, checkpoint={"keep_last": 9}
    )
    return folder, run_ranks(in_two_ranks, 2, config, folder)


def test_every_rank_writes_with_digests(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = saved
    assert intact_steps(folder / "waiting") == [2]
    files = read_manifest(step_folder(folder / "waiting/checkpoints", 2))
    assert {
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
        "common.pt",
        "metadata.json",
        "state.json",
    } == files.keys()


@pytest.mark.fault(2, "S5")
@pytest.mark.fault("S4")
def test_complete_when_every_rank_is(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    _, results = saved
    for result in results:
        assert result["seen"] == [[], [], []]
        assert result["then"] == [2]
        assert result["before the next"] == [2]
        assert result["at the next"] == [2, 5]
        assert result["at the end"] == [2, 5, 6]


@pytest.mark.fault("S1", "S2")
def test_saved_state_is_that_of_its_step(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Check a save during which three steps ran."""
    folder, _ = saved
    assert intact_steps(folder / "later") == [2, 5, 6]
    assert state_digests(folder / "later", 2) == state_digests(folder / "waiting", 2)
    records = [record for record in events(folder / "later") if record["event"] == "saved"]
    assert [record["step"] for record in records] == [2, 5, 6]
    assert records[0]["stalled_seconds"] < records[0]["seconds"]


@pytest.mark.fault(6, "S3")
def test_a_failure_of_one_rank_reaches_all(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = saved
    for rank, result in enumerate(results):
        prefix = "" if rank else "rank 1: "
        for name, newest in (("full", 2), ("full later", 6)):
            words = (
                f"{prefix}the checkpoint of step 6 could not be written: ",
                f"the checkpoint of step {newest} is untouched",
            )
            assert result[name].startswith(words[0]), result[name]
            assert "part: No space left on device" in result[name], result[name]
            assert words[1] in result[name], result[name]
        assert result["slow"].startswith(f"{prefix}the checkpoint of step 6"), result["slow"]
        assert "writing part has taken 0." in result["slow"], result["slow"]
        assert "taken over by somebody" in result["lost"]
    assert intact_steps(folder / "waiting") == [2]

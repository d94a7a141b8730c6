"""Saving on two ranks: complete when every rank is, what is saved is the step's, and what befalls one rank is told to all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_kd.checkpoint.manifest import read_manifest
from megatron_kd.checkpoint.store import step_folder
from tests.checkpoint.fault_runs import events, sound_steps, state_of
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
    assert sound_steps(folder / "waiting") == [2]
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
    _, found = saved
    for each in found:
        assert each["seen"] == [[], [], []]
        assert each["then"] == [2]
        assert each["before the next"] == [2]
        assert each["at the next"] == [2, 5]
        assert each["at the end"] == [2, 5, 6]


@pytest.mark.fault("S1", "S2")
def test_what_is_saved_is_the_state_of_its_step(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Three steps were taken while it was written."""
    folder, _ = saved
    assert sound_steps(folder / "later") == [2, 5, 6]
    assert state_of(folder / "later", 2) == state_of(folder / "waiting", 2)
    rows = [row for row in events(folder / "later") if row["event"] == "saved"]
    assert [row["step"] for row in rows] == [2, 5, 6]
    assert rows[0]["stalled_seconds"] < rows[0]["seconds"]


@pytest.mark.fault(6, "S3")
def test_all_are_told_of_one_ranks_failure(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = saved
    for rank, each in enumerate(found):
        prefix = "" if rank else "rank 1: "
        for name, newest in (("full", 2), ("full later", 6)):
            words = (
                f"{prefix}the checkpoint of step 6 could not be written: ",
                f"the checkpoint of step {newest} is untouched",
            )
            assert each[name].startswith(words[0]), each[name]
            assert "part: No space left on device" in each[name], each[name]
            assert words[1] in each[name], each[name]
        assert each["slow"].startswith(f"{prefix}the checkpoint of step 6"), each["slow"]
        assert "writing part has taken 0." in each["slow"], each["slow"]
        assert "taken over by somebody" in each["lost"]
    assert sound_steps(folder / "waiting") == [2]

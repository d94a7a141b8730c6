"""Provide a trained teacher to the tests of stored targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import write_tokens
from tests.train.test_program import command, finish, start, write_run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train a teacher for a few steps; return its run directory and its tokens."""
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

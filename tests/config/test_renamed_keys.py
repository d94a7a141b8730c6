"""Accept keys under the names of the previous version, with a notice of one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.config.keys import KEYS, RENAMED_KEYS

Load = Callable[..., RunConfig]
TOY_NAMES = {"train.updates": "train.steps", "adam.lr": "optimizer.learning_rate"}


@pytest.fixture
def toy_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for old, new in TOY_NAMES.items():
        monkeypatch.setitem(RENAMED_KEYS, old, new)


def test_renamed_keys_are_no_keys_and_lead_to_keys() -> None:
    assert not RENAMED_KEYS.keys() & KEYS.keys()
    assert set(RENAMED_KEYS.values()) <= KEYS.keys()


def test_without_renamed_keys_there_is_no_notice(
    load: Load, capfd: pytest.CaptureFixture[str]
) -> None:
    load()
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("toy_names")
def test_old_name_in_a_run_file(
    load: Load, run_text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load(text=run_text.replace("steps = 10", "updates = 11"))
    assert config.train.steps == 11
    assert capfd.readouterr().err == (
        "megatron_kd: notice: train.updates in run.toml is now called train.steps: rename it, the "
        "next version refuses the old name\n"
    )


@pytest.mark.usefixtures("toy_names")
def test_old_section_in_a_run_file(load: Load, run_text: str) -> None:
    text = run_text.replace("[optimizer]\nlearning_rate = 1e-3", "[adam]\nlr = 2e-3")
    assert load(text=text).optimizer.learning_rate == 2e-3


@pytest.mark.usefixtures("toy_names")
def test_old_name_on_the_command_line(load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    assert load("--train.updates", "12").train.steps == 12
    assert "train.updates on the command line is now called train.steps" in capfd.readouterr().err


@pytest.mark.usefixtures("toy_names")
def test_only_rank_0_prints_notices(
    load: Load, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    load("--train.updates", "12")
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("toy_names")
def test_both_names_in_a_run_file_are_refused(load: Load, run_text: str) -> None:
    text = run_text.replace("steps = 10", "steps = 10\nupdates = 11")
    with pytest.raises(ConfigError, match="train.steps in run.toml is set twice, once by its old"):
        load(text=text)


@pytest.mark.usefixtures("toy_names")
def test_unknown_key_in_an_old_section(load: Load, run_text: str) -> None:
    with pytest.raises(ConfigError, match="unknown key adam.beta in run.toml"):
        load(text=run_text + "[adam]\nbeta = 1\n")

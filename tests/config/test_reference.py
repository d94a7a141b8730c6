"""Render every section and key of a run file into the reference page."""

from __future__ import annotations

import pytest

from megatron_kd.config.key_reference import run_file_reference
from megatron_kd.config.keys import KEYS, SECTIONS, allowed_values
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair

PAGE = run_file_reference()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


ROWS = {
    cells(line)[0].strip("`"): cells(line) for line in PAGE.splitlines() if line.startswith("| `")
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_has_a_heading(section: str) -> None:
    assert f"\n## [{section}]\n" in PAGE


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_row(key: str) -> None:
    _, values, default, description = ROWS[key]
    assert values == allowed_values(KEYS[key])
    assert (default == "required") == KEYS[key].is_required()
    assert description.replace("\\|", "|") == " ".join((KEYS[key].description or "").split())


def test_every_row_is_a_key_or_an_entry() -> None:
    assert ROWS.keys() == KEYS.keys() | HiddenStatesPair.model_fields.keys()


def test_defaults_are_those_of_a_run_file() -> None:
    assert ROWS["distill.top_k"][2] == "`64`"
    assert ROWS["telemetry.tensorboard"][2] == "`true`"
    assert ROWS["teacher.checkpoint"][2] == "unset"


def test_tables_have_one_width() -> None:
    widths = {len(cells(line)) for line in PAGE.splitlines() if line.startswith("| ")}
    assert widths == {4}


@pytest.mark.parametrize("key", KEYS)
def test_every_description_is_a_sentence(key: str) -> None:
    description = KEYS[key].description or ""
    assert description.endswith(".")
    assert description[0].isalpha() or description[0] == '"'

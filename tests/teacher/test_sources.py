"""Find the source that a run file names, and add one with a declaration and a module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from megatron_kd.config import RunConfig
from megatron_kd.config.sections import teacher_section
from megatron_kd.config.sections.teacher_section import (
    TEACHER_SOURCES,
    SourceTraits,
    TeacherSection,
)
from megatron_kd.teacher.source import TeacherInputs, TeacherSource, teacher_source
from megatron_kd.teacher.teacher import Teacher
from megatron_kd.train.startup.input_checks import check_inputs
from tests.helpers.tiny import VOCAB, tiny, write_tokens


@pytest.mark.parametrize("name", TEACHER_SOURCES)
def test_every_declared_source_has_a_module(name: str) -> None:
    module = importlib.import_module(f"megatron_kd.teacher.{name}")
    assert issubclass(module.Source, TeacherSource)


def test_the_run_file_accepts_what_is_declared() -> None:
    names = get_args(TeacherSection.model_fields["source"].annotation)
    assert set(names) == set(TEACHER_SOURCES)


class ConstantTeacher(Teacher):
    """Give the same target to every microbatch."""

    def targets(self, microbatches: Sequence[Any], *, step: int | None = None) -> list[Any]:
        return ["target"] * len(microbatches)


class ConstantSource(TeacherSource):
    """Source that a newcomer writes: one method."""

    def build(self, inputs: TeacherInputs, groups: Any) -> Teacher:
        return ConstantTeacher()


@pytest.fixture
def constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Declare a source and add its module; return the config of a run that names it."""
    declared = {**TEACHER_SOURCES, "constant": SourceTraits("a constant.", runs_in_job=True)}
    monkeypatch.setattr(teacher_section, "TEACHER_SOURCES", declared)
    module = ModuleType("megatron_kd.teacher.constant")
    module.Source = ConstantSource  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = tiny(tmp_path / "run", write_tokens(tmp_path), distill={"top_k": 8})
    section = config.teacher.model_copy(update={"source": "constant"})
    return config.model_copy(update={"teacher": section})


def test_a_new_source_passes_the_input_checks(constant: RunConfig) -> None:
    inputs = check_inputs(constant, world_size=1)
    assert inputs.teacher == TeacherInputs(VOCAB)
    assert constant.teacher.runs_in_job


def test_a_new_source_is_named_in_fingerprints(constant: RunConfig) -> None:
    source = teacher_source(constant)
    assert source.run_fingerprint(TeacherInputs(VOCAB)) == {"teacher.source": "constant"}
    assert source.weights_fingerprint(TeacherInputs(VOCAB)) == {"teacher.source": "constant"}
    assert source.read_model() is None


def test_a_new_source_builds_its_teacher(constant: RunConfig) -> None:
    teacher = teacher_source(constant).build(TeacherInputs(VOCAB), None)  # type: ignore[arg-type]
    assert teacher.targets([0, 1], step=3) == ["target", "target"]  # type: ignore[list-item]
    assert teacher.layers is None

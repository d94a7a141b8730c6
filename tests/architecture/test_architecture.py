"""Hold the shape of the house: who imports whom, and how long things are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_kd"

# Each room may import the rooms before it; rooms of one level do not import each other.
LEVELS: list[set[str]] = [
    {"config"},
    {"storage"},
    {"parallel"},
    {"head"},
    {"targets"},
    {"losses"},
    {"cache", "data", "models", "telemetry", "planning"},
    {"checkpoint"},
    {"teacher"},
    {"train"},
    {"inference", "sweep"},
    {"pretrain", "cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MEGATRON = {"parallel", "data", "models", "teacher", "checkpoint", "train", "inference"}
# A run file is checked, a plan made and a sweep started without torch.
WITHOUT_TORCH = {"config", "storage", "planning", "sweep", "cli"}
# The loss needs torch and a process group, and of the run file only the declared divergences.
LOSS_ROOMS = {"head", "targets", "losses"}
DECLARATIONS = {
    "megatron_kd.config.declarations.divergences",
    "megatron_kd.config.declarations.adaptive_methods",
}
MOST_FILES, MOST_LINES = 14, 2500
# Folders with more files, and why.
LARGE_FOLDERS = {
    "megatron_kd/config/sections": "one file per section of the run file",
    "megatron_kd/losses/divergences": "one file per divergence",
}
FUNCTION_P90 = 25

FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [
    path
    for folder in ("megatron_kd", "tools", "tests", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def relative(path: Path) -> str:
    """Return a path as it is named in messages."""
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[str]:
    """Return every module that a file imports, at its top or inside a function."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            modules.append(node.module)
    return modules


def room_of(path: Path) -> str:
    """Return the room of a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def functions(path: Path) -> list[tuple[str, int]]:
    """Return name and length of each function of a file, docstrings left out."""
    lengths = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1
            lengths.append((node.name, lines - len((docstring or "").splitlines())))
    return lengths


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_rooms_import_leftwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not [name for name in imports(path) if name.startswith(("megatron", "torch"))]
        return
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "megatron_kd" and rest:
            assert rest[0] == room or LEVEL[rest[0]] < LEVEL[room], f"{room} must not import {name}"
        assert top not in ("tests", "tools", "examples"), f"{room} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        top = name.split(".")[0]
        if top == "megatron":
            assert room in MEGATRON, f"{room} must not know megatron-core"
        if top == "torch":
            assert room not in WITHOUT_TORCH, f"{room} must not import torch"
        if name.startswith("megatron.core.parallel_state"):
            assert room == "parallel", "only parallel/ reads megatron-core's groups"
        if room in LOSS_ROOMS and name.startswith("megatron_kd.config"):
            assert name in DECLARATIONS, f"{room} must not know the run file"


def test_a_run_does_not_import_preparation() -> None:
    """Making token files belongs to the tools: no other room and no reader of data imports it."""
    for path in FILES:
        if "preparation" not in path.parts:
            wrong = [name for name in imports(path) if "data.preparation" in name]
            assert not wrong, relative(path)


def test_only_groups_reads_parallel_state() -> None:
    readers = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "parallel_state" in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            readers.append(path.name)
    assert readers == ["groups.py"]


def test_sources_of_targets_are_compared_in_their_room() -> None:
    """Elsewhere a teacher is asked what it can do, never what it is."""
    for path in [*FILES, *sorted((ROOT / "tools").rglob("*.py"))]:
        if path.parent.name in ("teacher", "config") and PACKAGE in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Compare) else ""
            assert "teacher.source" not in text, f"{relative(path)}: {text}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert "Teacher" not in ast.unparse(node.args[1]), (
                    f"{relative(path)}: {node.lineno}"
                )


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for name, lines in functions(path):
        assert lines <= 50, f"{relative(path)}: {name} has {lines} lines"


def test_most_functions_are_very_short() -> None:
    lengths = sorted(lines for path in FILES for _, lines in functions(path))
    assert lengths[int(0.9 * len(lengths))] <= FUNCTION_P90


def test_rooms_are_small() -> None:
    """A folder past 14 files or 2,500 lines gets folders inside."""
    for folder in sorted({path.parent for path in FILES}):
        files = sorted(folder.glob("*.py"))
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        if relative(folder) not in LARGE_FOLDERS:
            assert len(files) - 1 <= MOST_FILES, relative(folder)
        assert lines <= MOST_LINES, f"{relative(folder)} has {lines} lines"


def test_file_names_are_unique_in_the_package() -> None:
    """One name, one file: only rooms' __init__ share theirs."""
    by_name: dict[str, list[str]] = {}
    for path in FILES:
        by_name.setdefault(path.name, []).append(relative(path))
    by_name.pop("__init__.py")
    assert not {name: paths for name, paths in by_name.items() if len(paths) > 1}

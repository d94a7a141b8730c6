"""The shape of the house: who imports whom, where megatron-core may appear, how long things are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_kd"

# Each room may import the rooms before it; rooms of one level do not import each other.
LEVELS: list[set[str]] = [
    {"config"},
    {"parallel"},
    {"kernels"},
    {"targets"},
    {"losses"},
    {"cache", "data", "models", "telemetry"},
    {"teacher", "checkpoint", "planning", "experiments"},
    {"train"},
    {"pretrain"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MEGATRON = {"parallel", "data", "models", "teacher", "checkpoint", "train"}
# Longer than the limit for a reason: file or function -> why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_leftwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not [name for name in imports(path) if name.startswith(("megatron", "torch"))]
        return
    for name in imports(path):
        top, *rest = name.split(".")
        if room == "experiments" and top == "megatron_kd":
            assert name.startswith(
                (
                    "megatron_kd.config",
                    "megatron_kd.sweep",
                    "megatron_kd.storage.provenance",
                )
            ), name
        if top == "megatron_kd" and rest:
            other = rest[0]
            assert other == room or LEVEL[other] < LEVEL[room], f"{room} must not import {name}"
        assert top not in ("tests", "tools", "examples"), f"{room} must not import {name}"
        if top == "megatron":
            assert room in MEGATRON, f"{room} must not know megatron-core"
        if top == "torch":
            assert room not in ("config", "experiments"), (
                "a run file is checked, and a sweep started, without torch"
            )
        if (
            name.startswith("megatron.core.parallel_state")
            or name == "megatron.core.parallel_state"
        ):
            assert room == "parallel", "only parallel/ reads megatron-core's groups"


def test_only_groups_reads_parallel_state() -> None:
    readers = [
        path.name for path in FILES if "parallel_state" in {node.id for node in _names(path)}
    ]
    assert readers == ["groups.py"]


def _names(path: Path) -> list[ast.Name]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name)
    ]


@pytest.mark.parametrize(
    "path",
    [*FILES, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))],
    ids=lambda p: p.name,
)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400 or path.name in LONG_FILES, (
        f"{path} is longer than 400 lines"
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            length = (
                (node.end_lineno or 0)
                - node.lineno
                + 1
                - (len(docstring.splitlines()) if docstring else 0)
            )
            assert length <= 50 or node.name in LONG_FUNCTIONS, (
                f"{path}: {node.name} has {length} lines"
            )

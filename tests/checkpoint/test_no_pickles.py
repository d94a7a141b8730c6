"""Check in the source that no file of the package reads a pickle that could run code."""

from __future__ import annotations

import ast
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_kd.checkpoint.tensors import read_metadata
from megatron_kd.config import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("megatron_kd", "tools", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The only unpickler, which knows only what a table of contents needs.
ALLOWED = {("megatron_kd/checkpoint/tensors.py", "pickle.Unpickler")}


def _name(node: ast.expr) -> str:
    return (
        f"{_name(node.value)}.{node.attr}"
        if isinstance(node, ast.Attribute)
        else getattr(node, "id", "")
    )


def unsafe(path: str, tree: ast.Module) -> list[str]:
    """Return the lines where a pickle, or an array of objects, could be read."""
    problems = []
    for node in ast.walk(tree):
        location = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            problems += [
                f"{location} {item.name} by another name"
                for item in node.names
                if item.asname and item.name in (*PICKLES, "torch")
            ]
        elif isinstance(node, ast.ImportFrom):
            hidden = (
                node.module in PICKLES
                or (node.module or "").startswith("torch")
                and any(item.name == "load" for item in node.names)
            )
            problems += [f"{location} from {node.module}"] if hidden else []
        elif isinstance(node, ast.Attribute):
            name = _name(node)
            if (
                name.split(".")[0] in PICKLES
                and node.attr in ("load", "loads", "Unpickler")
                and (path, name) not in ALLOWED
            ):
                problems.append(f"{location} {name}")
            if node.attr in ("add_safe_globals", "safe_globals", "set_default_mmap_options"):
                problems.append(f"{location} {name}")
        elif isinstance(node, ast.Call):
            values = {
                item.arg: item.value.value
                for item in node.keywords
                if isinstance(item.value, ast.Constant)
            }
            if (
                _name(node.func) in ("torch.load", "torch.jit.load")
                and values.get("weights_only") is not True
            ):
                problems.append(f"{location} {_name(node.func)} without weights_only=True")
            if (
                values.get("weights_only", True) is not True
                or values.get("allow_pickle", False) is not False
            ):
                problems.append(f"{location} {_name(node.func)}")
            if any(
                item.arg in ("weights_only", "allow_pickle")
                and not isinstance(item.value, ast.Constant)
                for item in node.keywords
            ):
                problems.append(f"{location} {_name(node.func)}: not a constant")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_reads_pickles(path: Path) -> None:
    assert (
        unsafe(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) == []
    )


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "pickle.load(f)",
        "pickle.loads(b)",
        "from pickle import load",
        "import pickle as p",
        "class U(pickle.Unpickler): ...",
        "np.load(f, allow_pickle=True)",
        "other(f, weights_only=False)",
        "torch.serialization.add_safe_globals([x])",
        "from torch import load",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert unsafe("megatron_kd/x.py", ast.parse(line))


class AsPython3112(pickle.Pickler):
    """Pickle enumerations as Python 3.11.0 to 3.11.3 do.

    `member` replaces their name.
    """

    member: str | None = None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return getattr, (type(value), self.member or value.name)
        return NotImplemented


def test_metadata_of_another_python(tmp_path: Path) -> None:
    """Check that `getattr` finds members of enumerations, and nothing else."""
    metadata = Metadata({}, None, {})
    metadata.storage_meta = [WriteItemType.TENSOR]
    with open(tmp_path / ".metadata", "wb") as stream:
        AsPython3112(stream).dump(metadata)
    assert read_metadata(tmp_path, setting="x").storage_meta == [WriteItemType.TENSOR]
    AsPython3112.member = "__subclasses__"
    with open(tmp_path / ".metadata", "wb") as stream:
        AsPython3112(stream).dump(metadata)
    with pytest.raises(ConfigError, match="it asks for '__subclasses__' of <enum 'WriteItemType'>"):
        read_metadata(tmp_path, setting="x")

"""Hold the language of the code: names that say what they hold, docstrings with a verb first."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_kd", "tools", "examples", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Pronouns, adverbs and participles say nothing of a value.
BANNED_NAMES = set(
    "apart away at each found given here mine named nothing ours own said theirs there told "
    "wanted where whole".split()
)
# Everyday words for which the field has terms; see docs/glossary.md.
BANNED_PARTS = {
    "asked": "requested",
    "foreign": "huggingface, external",
    "fullest": "peak",
    "heeded": "acknowledged",
    "leaving": "shutdown",
    "likeliest": "top, most probable",
    "settle": "reconcile",
}
# Headless clauses: "What a sample is called", "Whether it fits".
BANNED_OPENINGS = re.compile(
    r"(what|whether|whose|who|whoever|whatever|which|of|how|where|why|nobody|everything|"
    r"nothing|not|same|the same|as)\b",
    re.IGNORECASE,
)
# Share of docstrings of the package that must begin with a verb in its base form.
VERB_SHARE = 0.9
VERBS = set((Path(__file__).parent / "verbs.txt").read_text(encoding="utf-8").split())


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a file names itself."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.arg():
                yield node.lineno, node.arg
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "lineno", 1), docstring


def parts(name: str) -> set[str]:
    """Return the words of a snake_case or CamelCase name."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_what_they_hold(path: Path) -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for line, name in names(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_") in BANNED_NAMES or parts(name) & BANNED_PARTS.keys()
    ]
    assert not problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_sentence(path: Path) -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if BANNED_OPENINGS.match(text)
    ]
    assert not problems


def test_docstrings_begin_with_a_verb() -> None:
    """Count the package's docstrings that begin with a verb of verbs.txt (a base form a line)."""
    opening = [
        (text.split()[0].strip(".,:").lower(), f"{path.relative_to(ROOT)}:{line}")
        for path in sorted((ROOT / "megatron_kd").rglob("*.py"))
        for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
    ]
    others = [(word, place) for word, place in opening if word not in VERBS]
    assert len(others) <= (1 - VERB_SHARE) * len(opening), others


def test_the_checks_see_what_they_ban() -> None:
    tree = ast.parse('def f(given):\n    """What it is."""\n    found, self.likeliest_id = 1, 2\n')
    assert [name for _, name in names(tree) if name in BANNED_NAMES] == ["given", "found"]
    assert any(parts(name) & BANNED_PARTS.keys() for _, name in names(tree))
    ((_, text),) = docstrings(tree)
    assert BANNED_OPENINGS.match(text)

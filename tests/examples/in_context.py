"""Load the modules of the in-context example."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.helpers.program import ROOT

FOLDER = ROOT / "examples/in_context"


def load(name: str) -> ModuleType:
    """Return a module of the example.

    language.py and blocks.py get the names by which prepare.py and probe.py import them.
    """
    module_name = name if name in ("language", "blocks") else f"in_context_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


language, blocks, prepare, probe = map(load, ("language", "blocks", "prepare", "probe"))
WORDS, IDS = language.WORDS, language.IDS
RIGHT_SOLUTIONS = language.Noise(0.0, 0.0)


def read_terms(prompt: list[str]) -> list[int]:
    """Return the signed amounts of the thing in question, read from the prompt's text alone."""
    terms = []
    for start in range(1, len(prompt) - 3, 4):
        _, verb, amount, thing = prompt[start : start + 4]
        if thing == prompt[-2]:
            terms.append({"finds": 1, "loses": -1}[verb] * int(amount))
    return terms

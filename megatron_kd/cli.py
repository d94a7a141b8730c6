"""Run a program of the installed package: `megatron-kd VERB [OPTION ...]`.

Every program of the folder tools/ is a verb, written with dashes: tools/preprocess_data.py is
`megatron-kd preprocess-data`. `megatron-kd train` is megatron_kd.pretrain in one process; torchrun
starts it in several. Benchmarks are no verbs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent
_TRAIN = "train"
_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that a verb names with the remaining arguments.

    Args:
        argv: The verb and the arguments of its program. Default: those of the process.

    Returns:
        The exit code of the program, 0 for --help, and 2 for an unknown verb.
    """
    verb, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    programs = verbs()
    path = programs.get(verb.replace("_", "-"))
    if path is None:
        print(
            f"megatron-kd: error: {verb} is not a verb: choose one of {', '.join(programs)}",
            file=sys.stderr,
        )
        return _BAD_INPUT
    # argparse takes the name in usage and error messages from here.
    sys.argv = [f"megatron-kd {verb}", *arguments]
    exit_code: int = _import_program(path).main(arguments)
    return exit_code


def verbs() -> dict[str, Path]:
    """Return the file of each program by its verb, in alphabetical order after `train`."""
    programs = {
        path.stem.replace("_", "-"): path
        for path in sorted(_programs_folder().glob("*.py"))
        if not path.name.startswith(("bench_", "_"))
    }
    return {_TRAIN: _PACKAGE / "pretrain.py", **programs}


def usage() -> str:
    """Return the help text: every verb with the first line of its program's docstring."""
    programs = verbs()
    width = max(map(len, programs))
    lines = [f"  {verb:{width}}  {_summary(path)}" for verb, path in programs.items()]
    return "\n".join(
        [
            "usage: megatron-kd VERB [OPTION ...]",
            "",
            "verbs (`megatron-kd VERB --help` lists the options of one):",
            *lines,
        ]
    )


def _programs_folder() -> Path:
    """Return the folder of the programs: of a wheel inside the package, of a checkout beside it."""
    installed = _PACKAGE / "tools"
    return installed if installed.is_dir() else _PACKAGE.parent / "tools"


def _summary(path: Path) -> str:
    """Return the first line of a program's docstring without importing the program."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _import_program(path: Path) -> ModuleType:
    """Import a program from its file; `megatron_kd.tools` is a package in wheels only."""
    if path.parent == _PACKAGE:
        return importlib.import_module(f"megatron_kd.{path.stem}")
    name = f"megatron_kd.tools.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look a module up by its name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())

"""The megatron-kd command: every program of tools/ is a verb of it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kd import cli

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    path.stem for path in (ROOT / "tools").glob("*.py") if not path.stem.startswith("bench_")
}
# Call main([verb, "--help"]) for every verb in one process, and print exit code and text of each.
HELP_OF_EACH_VERB = """
import contextlib, io, json
from megatron_kd import cli
results = {}
for verb in cli.verbs():
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            code = cli.main([verb, "--help"])
        except SystemExit as end:
            code = end.code
    results[verb] = [code, text.getvalue()]
print(json.dumps(results))
"""


def run_python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_program_is_a_verb() -> None:
    assert cli.verbs().keys() == {name.replace("_", "-") for name in PROGRAMS} | {"train"}


def test_usage_lists_every_verb_with_the_first_line_of_its_docstring() -> None:
    text = cli.usage()
    for verb, path in cli.verbs().items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {verb} "))
        first_line = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("r").strip('"')
        assert line.removeprefix(f"  {verb}").strip() == first_line, verb


def test_usage_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from megatron_kd.cli import main; main([])"
    assert run_python("-c", code).startswith("usage: megatron-kd VERB")


def test_help_of_every_verb_names_the_verb() -> None:
    results = json.loads(run_python("-c", HELP_OF_EACH_VERB).splitlines()[-1])
    assert results.keys() == cli.verbs().keys()
    for verb, (code, text) in results.items():
        assert code == 0, verb
        if verb != "train":
            assert text.startswith(f"usage: megatron-kd {verb} "), verb


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plann"]) == 2
    error = capsys.readouterr().err
    assert "plann is not a verb: choose one of train, cache-teacher" in error
    assert "bench" not in error


def test_a_verb_passes_arguments_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["unchanged"])
    assert cli.main(["report", str(tmp_path), "--output", "curves.png"]) == 2
    assert f"{tmp_path / 'metrics.jsonl'} does not exist" in capsys.readouterr().err
    # A name with underscores is the same verb.
    assert cli.main(["verify_checkpoint", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.verbs())
def test_main_of_a_program_takes_its_arguments(verb: str) -> None:
    main: Callable[..., int] = cli._import_program(cli.verbs()[verb]).main
    parameters = list(inspect.signature(main).parameters.values())
    assert len(parameters) == 1
    assert parameters[0].default is None

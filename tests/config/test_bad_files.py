"""Refuse every kind of bad run file with one sentence, word for word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kd.config import ConfigError, RunConfig, load_config

Load = Callable[..., RunConfig]

BAD_FILES = {
    "typo": (
        "learning_rate = 1e-3",
        "learning_rate = 1e-3\nlearning_rat = 1",
        "unknown key optimizer.learning_rat in run.toml: did you mean optimizer.learning_rate?",
    ),
    "section typo": (
        "[optimizer]",
        "[optimiser]",
        "unknown key optimiser in run.toml: did you mean optimizer?",
    ),
    "outside any section": (
        "\n[model]",
        "\nsteps = 3\n[model]",
        "unknown key steps in run.toml: did you mean train.steps?",
    ),
    "quoted dots": (
        "\n[model]",
        '\n"train.seed" = 3\n[model]',
        'unknown key "train.seed" in run.toml: did you mean train.seed?',
    ),
    "no section": (
        "\n[model]",
        "\nteacher = 3\n[model]",
        "teacher in run.toml must be a section, [teacher] with its keys below, got 3",
    ),
    "array of sections": (
        "[run]",
        "[[run]]",
        'run in run.toml must be a section, [run] with its keys below, got [{"directory": '
        '"runs/first"}]',
    ),
    "missing key": (
        "steps = 10",
        "",
        "train.steps is missing: set it to a whole number > 0 in run.toml or with --train.steps",
    ),
    "missing section": (
        "[run]\ndirectory",
        "[teacher]\ncheckpoint",
        "run.directory is missing: set it to a path in run.toml or with --run.directory",
    ),
    "text for a number": (
        "steps = 10",
        'steps = "10"',
        'train.steps must be a whole number > 0, got "10" in run.toml',
    ),
    "fraction": (
        "steps = 10",
        "steps = 10.0",
        "train.steps must be a whole number > 0, got 10.0 in run.toml",
    ),
    "boolean for a number": (
        "steps = 10",
        "steps = true",
        "train.steps must be a whole number > 0, got true in run.toml",
    ),
    "number for a boolean": (
        "vocab_size = 512",
        "vocab_size = 512\nqk_norm = 1",
        "model.qk_norm must be true or false, got 1 in run.toml",
    ),
    "section for a number": (
        "steps = 10",
        "steps = { a = 1 }",
        'train.steps must be a whole number > 0, got {"a": 1} in run.toml',
    ),
    "range": (
        "steps = 10",
        "steps = 0",
        "train.steps must be a whole number > 0, got 0 in run.toml",
    ),
    "infinite": (
        "1e-3",
        "inf",
        "optimizer.learning_rate must be a number > 0, got Infinity in run.toml",
    ),
    "date": (
        '"runs/first"',
        "2020-01-01",
        'run.directory must be a path, got "2020-01-01" in run.toml',
    ),
    "key missing in a list of tables": (
        "\n[model]",
        "\n[[distill.hidden_states]]\nstudent_layer = 1\nteacher_layer = 2\n[model]",
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, "
        "weight, got "
        '[{"student_layer": 1, "teacher_layer": 2}] in run.toml (entry 1, weight: field required)',
    ),
    "type in a list of tables": (
        "\n[model]",
        '\n[[distill.hidden_states]]\nstudent_layer = 1\nteacher_layer = 2\nweight = "1"\n'
        '[teacher]\nsource = "online"\ncheckpoint = "t"\n[model]',
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, "
        "weight, got "
        '[{"student_layer": 1, "teacher_layer": 2, "weight": "1"}] in run.toml (entry 1, weight: '
        "input should be a valid number)",
    ),
    "empty path": ('"runs/first"', '""', 'run.directory must be a path, got "" in run.toml'),
    "text for a list": (
        '["corpus/text"]',
        '"corpus/text"',
        'data.train must be a list of text (at least 1), got "corpus/text" in run.toml',
    ),
    "entry": (
        '["corpus/text"]',
        "[3]",
        "data.train must be a list of text (at least 1), got [3] in run.toml",
    ),
    "syntax": (
        "steps = 10",
        "steps = ",
        "run.toml is not valid TOML: Invalid value (at line 17, column 9)",
    ),
    "unfinished": (
        'directory = "runs/first"\n',
        'directory = "runs',
        "run.toml is not valid TOML: Unterminated string (at line 19, column 18)",
    ),
    "twice": (
        "steps = 10",
        "steps = 10\nsteps = 11",
        "run.toml is not valid TOML: Cannot overwrite a value (at line 18, column 11)",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_sentence(load: Load, run_text: str, case: str) -> None:
    old, new, sentence = BAD_FILES[case]
    assert old in run_text
    with pytest.raises(ConfigError) as caught:
        load(text=run_text.replace(old, new, 1))
    assert str(caught.value) == sentence


def test_files_that_cannot_be_read(load: Load) -> None:
    load()
    Path("latin1.toml").write_bytes(b'a = 1\nb = "\xff"')
    for argv, sentence in [
        (
            [],
            "no run file: start with python -m megatron_kd.pretrain --config run.toml "
            "[--section.key value ...] (--help lists every key)",
        ),
        (["--config", "nowhere.toml"], "run file nowhere.toml does not exist"),
        (["--config", "."], "cannot read run file .: Is a directory"),
        (
            ["--config", "latin1.toml"],
            "latin1.toml is not valid TOML: it is not UTF-8 (at line 2, column 6)",
        ),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config(argv)
        assert str(caught.value) == sentence


def test_every_problem_is_listed_once(load: Load, run_text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            "--distill.alpha",
            "2",
            "--teacher.source",
            "online",
            text=run_text.replace("steps = 10", "seed = -1"),
        )
    assert str(caught.value).splitlines() == [
        "train.seed must be a whole number in [0, 2147483648), got -1 in run.toml",
        'teacher.source = "online" needs teacher.checkpoint',
        "distill.alpha must be a number in [0, 1], got 2 on the command line",
        "train.steps is missing: set it to a whole number > 0 in run.toml or with --train.steps",
    ]


def test_a_bad_file_value_is_refused_even_where_overridden(load: Load, run_text: str) -> None:
    with pytest.raises(
        ConfigError, match='train.steps must be a whole number > 0, got "10" in run.toml'
    ):
        load("--train.steps", "5", text=run_text.replace("steps = 10", 'steps = "10"'))

"""Refuse every kind of bad override with one sentence, word for word."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_kd.config import ConfigError, RunConfig

Load = Callable[..., RunConfig]

BAD_OVERRIDES = {
    "typo": (
        ["--optimizer.learning_rat", "3"],
        "unknown key optimizer.learning_rat on the command line: did you mean "
        "optimizer.learning_rate?",
    ),
    "typo with =": (
        ["--train.step=3"],
        "unknown key train.step on the command line: did you mean train.steps?",
    ),
    "wrong section": (
        ["--train.learning_rate", "3"],
        "unknown key train.learning_rate on the command line: did you mean "
        "optimizer.learning_rate?",
    ),
    "no section": (
        ["--alpha", "1"],
        "unknown key alpha on the command line: did you mean distill.alpha?",
    ),
    "far off": (["--zzz", "3"], "unknown key zzz on the command line: --help lists every key"),
    "config typo": (
        ["--confg", "a.toml"],
        "unknown key confg on the command line: did you mean config?",
    ),
    "section": (
        ["--model", "{}"],
        "model on the command line is a section: override its keys, --model.key value",
    ),
    "inside a table": (
        ["--model.mcore.x", "3"],
        "unknown key model.mcore.x on the command line: give the whole of model.mcore as JSON, "
        "--model.mcore '{\"name\": value}'",
    ),
    "stray": (["extra"], "unexpected argument extra: write overrides as --section.key value"),
    "one dash": (
        ["-train.steps"],
        "unexpected argument -train.steps: write overrides as --section.key value",
    ),
    "two files": (["--config", "b.toml"], "--config is given 2 times: one run has one run file"),
    "no value": (
        ["--train.steps"],
        "train.steps on the command line needs a value: --train.steps=value",
    ),
    "no value before the next": (
        ["--train.steps", "--train.seed", "3"],
        "train.steps on the command line needs a value: --train.steps=value",
    ),
    "empty": (
        ["--run.directory="],
        "run.directory on the command line needs a value: --run.directory=value",
    ),
    "integer": (
        ["--train.steps", "1.5"],
        "train.steps must be a whole number > 0, got 1.5 on the command line",
    ),
    "negative": (
        ["--optimizer.learning_rate", "-1e-3"],
        "optimizer.learning_rate must be a number > 0, got -1e-3 on the command line",
    ),
    "not finite": (
        ["--optimizer.learning_rate", "nan"],
        "optimizer.learning_rate must be a number > 0, got nan on the command line",
    ),
    "closed range": (
        ["--distill.alpha", "1.5"],
        "distill.alpha must be a number in [0, 1], got 1.5 on the command line",
    ),
    "half-open range": (
        ["--optimizer.beta2", "1"],
        "optimizer.beta2 must be a number in [0, 1), got 1 on the command line",
    ),
    "lower bound": (
        ["--distill.z_loss", "-1"],
        "distill.z_loss must be a number >= 0, got -1 on the command line",
    ),
    "boolean": (
        ["--model.qk_norm", "maybe"],
        "model.qk_norm must be true or false, got maybe on the command line",
    ),
    "choice": (
        ["--teacher.source", "disk"],
        "teacher.source must be one of none, online, cached, huggingface, got disk on the command "
        "line",
    ),
    "null": (
        ["--run.directory", "null"],
        "run.directory must be a path, got null on the command line",
    ),
    "null list": (
        ["--data.train", "null"],
        "data.train must be a list of text (at least 1), got null on the command line",
    ),
    "empty list": (
        ["--data.train", "[]"],
        "data.train must be a list of text (at least 1), got [] on the command line",
    ),
    "entry": (
        ["--data.train", '["a", 1]'],
        'data.train must be a list of text (at least 1), got ["a", 1] on the command line',
    ),
    "numbers": (
        ["--data.train_weights", "x"],
        'data.train_weights must be a list of numbers, got ["x"] on the command line',
    ),
    "entry of a list of tables": (
        ["--distill.hidden_states", '{"student_layer": 1, "teacher_layer": 2, "weight": 0}'],
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, "
        "weight, got "
        '[{"student_layer": 1, "teacher_layer": 2, "weight": 0}] on the command line (entry 1, '
        "weight: input should be greater than 0)",
    ),
    "no entry of a list of tables": (
        ["--distill.hidden_states", "3"],
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, "
        "weight, got [3] on the command line",
    ),
    "broken list": (
        ["--data.train", '["a"'],
        'data.train must be a list of text (at least 1) as JSON, got ["a" on the command line: '
        "Expecting ',' delimiter",
    ),
    "list twice": (
        ["--data.train", '["a"]', "--data.train", "b"],
        "data.train is given 2 times on the command line: give one JSON list, or repeat it with "
        "one entry each",
    ),
    "broken table": (
        ["--data.valid", "x"],
        "data.valid must be a table of name = text as JSON, got x on the command line: Expecting "
        "value",
    ),
    "no table": (
        ["--data.valid", "[1]"],
        "data.valid must be a table of name = text, got [1] on the command line",
    ),
    "table entry": (
        ["--data.valid", '{"a": 1}'],
        'data.valid must be a table of name = text, got {"a": 1} on the command line',
    ),
    "null in a table": (
        ["--model.mcore", '{"a": [{"b": null}]}'],
        "model.mcore.a.b cannot be written to a run file: TOML has no form for null, leave the "
        "key out",
    ),
    "not Unicode": (
        ["--run.directory", "\udcff"],
        "run.directory is not valid Unicode text: '\\udcff' cannot be written to a run file",
    ),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_override_is_one_sentence(load: Load, case: str) -> None:
    overrides, sentence = BAD_OVERRIDES[case]
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert str(caught.value) == sentence

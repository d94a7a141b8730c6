"""Every sentence a run file or an override can be refused with, word for word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kd.config import ConfigError, RunConfig, load_config

Load = Callable[..., RunConfig]

BAD_OVERRIDES = {
    "typo": (
        ["--optimizer.learning_rat", "3"],
        "unknown key optimizer.learning_rat on the command line: did you mean optimizer.learning_rate?",
    ),
    "typo with =": (
        ["--train.step=3"],
        "unknown key train.step on the command line: did you mean train.steps?",
    ),
    "wrong section": (
        ["--train.learning_rate", "3"],
        "unknown key train.learning_rate on the command line: did you mean optimizer.learning_rate?",
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
        "unknown key model.mcore.x on the command line: give the whole of model.mcore as JSON, --model.mcore '{\"name\": value}'",
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
        "teacher.source must be one of none, online, cached, huggingface, got disk on the command line",
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
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, weight, got "
        '[{"student_layer": 1, "teacher_layer": 2, "weight": 0}] on the command line (entry 1, weight: input should be greater than 0)',
    ),
    "no entry of a list of tables": (
        ["--distill.hidden_states", "3"],
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, weight, got [3] on the command line",
    ),
    "broken list": (
        ["--data.train", '["a"'],
        "data.train must be a list of text (at least 1) as JSON, got [\"a\" on the command line: Expecting ',' delimiter",
    ),
    "list twice": (
        ["--data.train", '["a"]', "--data.train", "b"],
        "data.train is given 2 times on the command line: give one JSON list, or repeat it with one entry each",
    ),
    "broken table": (
        ["--data.valid", "x"],
        "data.valid must be a table of name = text as JSON, got x on the command line: Expecting value",
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
        "model.mcore.a.b cannot be written to a run file: TOML has no form for null, leave the key out",
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
        'run in run.toml must be a section, [run] with its keys below, got [{"directory": "runs/first"}]',
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
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, weight, got "
        '[{"student_layer": 1, "teacher_layer": 2}] in run.toml (entry 1, weight: field required)',
    ),
    "type in a list of tables": (
        "\n[model]",
        '\n[[distill.hidden_states]]\nstudent_layer = 1\nteacher_layer = 2\nweight = "1"\n'
        '[teacher]\nsource = "online"\ncheckpoint = "t"\n[model]',
        "distill.hidden_states must be a list of tables of student_layer, teacher_layer, loss, weight, got "
        '[{"student_layer": 1, "teacher_layer": 2, "weight": "1"}] in run.toml (entry 1, weight: input should be a valid number)',
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
            "no run file: start with python -m megatron_kd.pretrain --config run.toml [--section.key value ...] (--help lists every key)",
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


# Values that are each fine and do not fit together: first those of one section, then those between sections.
RELATIONS = {
    "--model.num_query_groups=3": "model.num_attention_heads (4) must be a multiple of num_query_groups (3)",
    "--model.num_attention_heads=3": "model.hidden_size (64) must be a multiple of num_attention_heads (3), or set head_dim",
    "--model.head_dim=3": "model.head_dim (3) must be even: rotary embedding rotates pairs of values",
    "--model.num_attention_heads=64": "model.head_dim (1) must be even: rotary embedding rotates pairs of values",
    "--teacher.source=online": 'teacher.source = "online" needs teacher.checkpoint',
    "--distill.min_k=65": "distill.min_k (65) must be at most top_k (64)",
    "--distill.num_draws=5 --distill.top_k=8": (
        "distill.num_draws draws at random: leave top_k, top_p and min_k unset, or unset num_draws"
    ),
    "--distill.dense=true --distill.num_draws=5": (
        "distill.dense compares whole distributions: leave top_k, top_p, min_k, truncate, num_draws and tail unset"
    ),
    "--distill.dense=true --distill.top_k=63": (
        "distill.dense compares whole distributions: leave top_k, top_p, min_k, truncate, num_draws and tail unset"
    ),
    "--distill.dense=true --distill.tail=bucket": (
        "distill.dense compares whole distributions: leave top_k, top_p, min_k, truncate, num_draws and tail unset"
    ),
    "--distill.dense=true --distill.head_schedule=recompute": (
        'distill.dense cannot be served by head_schedule = "recompute": the teacher\'s logits exist once'
    ),
    "--distill.divergence=mse_logits": (
        'distill.divergence = "mse_logits" compares the logits of all ids: it needs the dense teacher, not a sparse target (dense = true)'
    ),
    "--distill.divergence=reverse_kl": (
        'distill.divergence = "reverse_kl" with tail = "renormalize" is infinite, because the teacher\'s probability outside '
        'the kept ids is 0: use tail = "bucket", or the dense teacher (dense = true)'
    ),
    "--distill.divergence=skew_kl --distill.tail=drop": (
        'distill.divergence = "skew_kl" with a sparse target takes tail = "bucket" or "renormalize", not "drop"'
    ),
    "--distill.divergence=alpha_beta --distill.num_draws=9": (
        'distill.divergence = "alpha_beta" with random samples has a term of its own for every id outside the kept ones: '
        "keep the top ids, or the dense teacher (dense = true)"
    ),
    "--distill.alpha_warmup_fraction=0.995": "distill.alpha_warmup_fraction (0.995) + alpha_decay_fraction (0.01) must be at most 1",
    "--data.train_weights=[1,2]": "data.train_weights ([1.0, 2.0]) needs one weight > 0 for each of data.train's 1 entries",
    "--data.train_weights=[0]": "data.train_weights ([0.0]) needs one weight > 0 for each of data.train's 1 entries",
    "--optimizer.min_learning_rate=1": "optimizer.min_learning_rate (1.0) must be at most learning_rate (0.001)",
    "--optimizer.schedule=wsd": 'optimizer.schedule = "wsd" needs optimizer.decay_steps > 0',
    "--parallel.virtual_pipeline=2": "parallel.virtual_pipeline (2) above 1 needs pipeline > 1",
    "--parallel.sequence_parallel=true": "parallel.sequence_parallel needs tensor > 1",
    "--parallel.tensor=2 --model.hidden_size=65 --model.head_dim=2": "model.hidden_size (65) must be a multiple of parallel.tensor (2)",
    "--parallel.tensor=2 --model.num_attention_heads=3 --model.num_query_groups=3 --model.head_dim=2": (
        "model.num_attention_heads (3) must be a multiple of parallel.tensor (2)\n"
        "model.num_query_groups (3) must be a multiple of parallel.tensor (2)"
    ),
    "--parallel.tensor=4 --model.num_query_groups=2": "model.num_query_groups (2) must be a multiple of parallel.tensor (4)",
    "--parallel.tensor=2 --model.ffn_hidden_size=129": "model.ffn_hidden_size (129) must be a multiple of parallel.tensor (2)",
    "--parallel.tensor=2 --model.vocab_size_multiple=1": "model.vocab_size_multiple (1) must be a multiple of parallel.tensor (2)",
    "--parallel.pipeline=2 --parallel.virtual_pipeline=4": (
        "model.num_layers (4) must be a multiple of parallel.pipeline * parallel.virtual_pipeline (8)"
    ),
    "--batch.micro_batch_size=3": "batch.global_batch_size (8) must be a multiple of batch.micro_batch_size (3)",
    "--parallel.tensor=2 --parallel.sequence_parallel=true --batch.sequence_length=33": (
        "batch.sequence_length (33) must be a multiple of parallel.tensor (sequence_parallel) (2)"
    ),
    "--model.vocab_size=null": "set model.vocab_size or data.tokenizer: one of them must give the vocabulary size",
    "--teacher.source=online --teacher.checkpoint=t --distill.top_k=513": "distill.top_k (513) must be at most model.vocab_size (512)",
    "--optimizer.warmup_steps=11": "optimizer.warmup_steps (11) must be at most train.steps (10)",
    "--optimizer.schedule=wsd --optimizer.warmup_steps=5 --optimizer.decay_steps=6": (
        "optimizer.warmup_steps (5) + optimizer.decay_steps (6) must be at most train.steps (10)"
    ),
    "--parallel.overlap_param_gather=true --optimizer.distributed=true": (
        "parallel.overlap_param_gather needs optimizer.distributed and parallel.overlap_grad_reduce"
    ),
    "--parallel.overlap_param_gather=true --parallel.overlap_grad_reduce=true": (
        "parallel.overlap_param_gather needs optimizer.distributed and parallel.overlap_grad_reduce"
    ),
}


@pytest.mark.parametrize("overrides", RELATIONS)
def test_relation(load: Load, overrides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides.split())
    assert str(caught.value) == RELATIONS[overrides]


@pytest.mark.parametrize(
    "overrides",
    [
        "--batch.sequence_length=33 --parallel.tensor=2",
        "--distill.top_k=513",
        "--model.num_layers=8 --parallel.pipeline=2 --parallel.virtual_pipeline=4",
        "--optimizer.schedule=wsd --optimizer.warmup_steps=5 --optimizer.decay_steps=5",
        "--parallel.overlap_param_gather=true --parallel.overlap_grad_reduce=true --optimizer.distributed=true",
        "--distill.alpha_warmup_fraction=0.9 --distill.alpha_decay_fraction=0.1",
        "--model.vocab_size=null --data.tokenizer=t.model",
        "--distill.num_draws=5 --distill.top_k=64",
        "--distill.dense=true --distill.divergence=mse_logits",
        "--distill.divergence=reverse_kl --distill.tail=bucket",
        "--distill.divergence=jensen_shannon --distill.num_draws=5",
        "--distill.divergence=alpha_beta --distill.ab_alpha=0.4 --distill.ab_beta=0.6",
    ],
)
def test_values_at_the_edge_of_a_relation_are_taken(load: Load, overrides: str) -> None:
    load(*overrides.split())

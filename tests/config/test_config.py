"""Load run files with overrides, dump them again, and print --help."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

import megatron_kd.config
from megatron_kd.config import ConfigError, RunConfig, dump_toml, load_config

Load = Callable[..., RunConfig]


def leaf_fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    fields_by_key: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields_by_key |= leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            fields_by_key[prefix + name] = field
    return fields_by_key


def test_file_values_and_defaults(load: Load) -> None:
    config = load()
    assert (config.model.hidden_size, config.optimizer.learning_rate, config.data.train) == (
        64,
        1e-3,
        ("corpus/text",),
    )
    assert (config.distill.top_k, config.teacher.source, config.checkpoint.initialize_from) == (
        64,
        "none",
        None,
    )
    with pytest.raises(ValidationError, match="frozen"):
        config.train.__setattr__("steps", 11)


def test_relative_paths_stay_relative(load: Load) -> None:
    assert load().run.directory == Path("runs/first")
    assert load("--checkpoint.initialize_from", "runs/zero").checkpoint.initialize_from == Path(
        "runs/zero"
    )


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (("--train.steps", "7"), "train.steps", 7),
        (("--train.steps=7",), "train.steps", 7),
        (("--train.steps", "6", "--train.steps", "7"), "train.steps", 7),
        (("--distill.z_loss", "1e-4"), "distill.z_loss", 1e-4),
        (("--parallel.overlap_grad_reduce", "true"), "parallel.overlap_grad_reduce", True),
        (("--telemetry.tensorboard=false",), "telemetry.tensorboard", False),
        (("--run.directory", "a,b=[c] d"), "run.directory", Path("a,b=[c] d")),
        (("--run.directory=--odd",), "run.directory", Path("--odd")),
        (("--model.recompute", "none"), "model.recompute", "none"),
        (("--data.train", '["a","b,c"]'), "data.train", ("a", "b,c")),
        (("--data.train", r'["a\"b\\c"]'), "data.train", ('a"b\\c',)),
        (("--data.train", "a,b"), "data.train", ("a,b",)),
        (("--data.train", "a", "--data.train=7"), "data.train", ("a", "7")),
        (("--data.train_weights", "[3]"), "data.train_weights", (3.0,)),
        (("--data.train_weights", "0.5"), "data.train_weights", (0.5,)),
        (("--data.valid", '{"code": "p"}'), "data.valid", {"code": "p"}),
        (("--distill.hidden_states", "[]"), "distill.hidden_states", ()),
        (
            ("--model.mcore", '{"a": {"b": [1, 2.5, true, "x"]}}'),
            "model.mcore",
            {"a": {"b": [1, 2.5, True, "x"]}},
        ),
    ],
)
def test_override_wins_over_file(
    load: Load, run_text: str, overrides: tuple[str, ...], key: str, value: object
) -> None:
    text = run_text.replace("[data]", '[data]\nvalid = { books = "q" }') + "[model.mcore]\nc = 1\n"
    config = load(*overrides, text=text)
    section, name = key.split(".")
    actual = getattr(getattr(config, section), name)
    assert actual == value
    assert type(actual) is type(value)


@pytest.mark.parametrize("null", ["null", "none", "None"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint.initialize_from", '"runs/zero"'),
        ("data.train_weights", "[1]"),
        ("distill.chunk_tokens", "8"),
        ("telemetry.peak_tflops", "1.5"),
        ("teacher.checkpoint", '"runs/teacher"'),
    ],
)
def test_null_unsets_a_key(load: Load, run_text: str, key: str, value: str, null: str) -> None:
    section, name = key.split(".")
    head = f"[{section}]\n"
    text = (run_text if head in run_text else run_text + head).replace(
        head, f"{head}{name} = {value}\n"
    )
    assert getattr(getattr(load(text=text), section), name) is not None
    assert getattr(getattr(load(f"--{key}", null, text=text), section), name) is None


def test_overrides_alone_can_be_a_complete_run(load: Load, run_text: str) -> None:
    file = tomllib.loads(run_text)
    flat = {
        f"{section}.{name}": value
        for section, table in file.items()
        for name, value in table.items()
    }
    overrides = {
        key: f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in flat.items()
    }
    assert load_config(list(overrides.values())) == load()
    del overrides["train.steps"]
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides.values()))
    assert str(caught.value) == (
        "train.steps is missing: set it to a whole number > 0 with --train.steps, or give a run "
        "file with --config"
    )


def test_environment_and_dotenv_are_no_source(
    load: Load, run_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load()
    for name in (
        "train.steps",
        "TRAIN.STEPS",
        "train__steps",
        "TRAIN__STEPS",
        "TRAIN_STEPS",
        "steps",
        "STEPS",
    ):
        monkeypatch.setenv(name, "99")
    monkeypatch.setenv("train", '{"steps": 99}')
    monkeypatch.setenv("TRAIN", '{"steps": 99}')
    monkeypatch.setenv("config", "nowhere.toml")
    Path(".env").write_text('train={"steps": 99}\ntrain.steps=99\nTRAIN__STEPS=99\n')
    assert load() == expected
    with pytest.raises(ConfigError, match="train.steps is missing"):
        load(text=run_text.replace("steps = 10", ""))


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ("", 1, (1, 4)),
        ("", 4, (4, 1)),
        ("--parallel.tensor=2", 4, (2, 2)),
        ("--parallel.tensor=2 --parallel.pipeline=2 --parallel.virtual_pipeline=2", 4, (1, 4)),
        (
            "--parallel.tensor=2",
            3,
            "3 processes cannot be split into parallel.tensor * parallel.pipeline = 2: start a "
            "multiple of 2 processes",
        ),
        (
            "",
            3,
            "batch.global_batch_size (8) must be a multiple of batch.micro_batch_size * "
            "data-parallel size = 2 * 3 = 6",
        ),
        (
            "--parallel.pipeline=4 --parallel.virtual_pipeline=2 --model.num_layers=8",
            8,
            "the interleaved pipeline schedule needs the microbatches per step (2) to be a "
            "multiple of parallel.pipeline (4): "
            "change batch.global_batch_size or batch.micro_batch_size",
        ),
    ],
)
def test_data_parallel_size_and_microbatches(
    load: Load, overrides: str, world_size: int, expected: tuple[int, int] | str
) -> None:
    config = load(*overrides.split())
    if isinstance(expected, tuple):
        assert (
            config.data_parallel_size(world_size),
            config.num_microbatches(world_size),
        ) == expected
        return
    for method in (config.data_parallel_size, config.num_microbatches):
        with pytest.raises(ConfigError) as caught:
            method(world_size)
        assert str(caught.value) == expected


HARD_TABLE = (
    r'{"plain": 1, "two words": [[1, 2.0], [], {"a.b": "\"\\\n\t\u0000\u007f é 中 😀"}],'
    r' "": {}, "big": 1e300, "deep": {"x": {"y": false}}}'
)


# A list of tables, one option for each entry.
LAYERS = [
    "--distill.hidden_states",
    '{"student_layer": 1, "teacher_layer": 3, "weight": 1e-3}',
    "--distill.hidden_states",
    '{"student_layer": 2, "teacher_layer": 3, "weight": 2, "loss": "cosine"}',
]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "--data.valid",
            r'{"web": "a/b", "two words": "c \"d\" \\ \u007f é", "": "x", "\n": "y", "1-2_3": "z"}',
        ],
        ["--model.mcore", HARD_TABLE],
        [
            "--data.train",
            '["a", "b\'c"]',
            "--data.train_weights",
            "[1e-12, 3]",
            "--run.directory",
            'with "quotes" and \\',
        ],
        [
            "--teacher.source=online",
            "--teacher.checkpoint=t",
            "--optimizer.eps=1e-300",
            "--train.seed=2147483647",
        ],
        ["--distill.num_draws=50"],
        ["--distill.dense=true", "--distill.divergence=mse_logits", "--distill.ab_alpha=0"],
        ["--teacher.source=online", "--teacher.checkpoint=t", *LAYERS],
    ],
)
def test_round_trip(load: Load, overrides: list[str]) -> None:
    config = load(*overrides)
    text = dump_toml(config)
    assert load(text=text) == config
    assert dump_toml(load(text=text)) == text


def test_a_list_of_tables(load: Load, run_text: str) -> None:
    text = run_text + '[teacher]\nsource = "online"\ncheckpoint = "t"\n'
    text += "[[distill.hidden_states]]\nstudent_layer = 1\nteacher_layer = 3\nweight = 1e-3\n"
    text += "[[distill.hidden_states]]\nstudent_layer = 2\nteacher_layer = 3\nweight = 2.0\n"
    text += 'loss = "cosine"\n'
    config = load(text=text)
    assert [tuple(pair.model_dump().values()) for pair in config.distill.hidden_states] == [
        (1, 3, "mse", 1e-3),
        (2, 3, "cosine", 2.0),
    ]
    teacher = ["--teacher.source=online", "--teacher.checkpoint=t"]
    assert (
        load(*teacher, *LAYERS)
        == load(*teacher, "--distill.hidden_states", f"[{LAYERS[1]}, {LAYERS[3]}]")
        == config
    )


def test_round_trip_of_dates_from_the_file(load: Load, run_text: str) -> None:
    text = (
        run_text
        + "[model.mcore]\nday = 2020-01-02\nat = 10:20:30.5\nwhen = 2020-01-02T10:20:30+01:00\n"
    )
    config = load(text=text)
    assert load(text=dump_toml(config)) == config


def test_dump_has_every_key_and_leaves_only_unset_ones_out(load: Load) -> None:
    config = load()
    text = dump_toml(config)
    for key, field in leaf_fields(RunConfig).items():
        section, _, name = key.rpartition(".")
        body = text.split(f"[{section}]\n")[1].split("\n\n[", 1)[0]
        value = attrgetter(key)(config)
        if isinstance(value, dict):
            assert f"\n[{key}]\n" in text
        else:
            assert (f"\n{name} = " in f"\n{body}") == (value is not None), key
        # Leaving a key out means its default, so only a key whose default is None may be None.
        assert NoneType not in get_args(field.annotation) or field.default is None, key


def test_dump_refuses_what_toml_cannot_hold(load: Load) -> None:
    config = load()
    model = config.model.model_copy(update={"mcore": {"f": {"g": print}}})
    with pytest.raises(
        ConfigError,
        match=(
            "model.mcore.f.g cannot be written to a run file: TOML has no form for a "
            "builtin_function"
        ),
    ):
        dump_toml(config.model_copy(update={"model": model}))


def test_help_lists_every_key_with_its_text_and_default() -> None:
    program = (
        "from megatron_kd.config import load_config; load_config(['--train.steps', 'x', '--help'])"
    )
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env={"COLUMNS": "1000"},
    )
    assert (process.returncode, process.stderr) == (0, "")
    options = " ".join(process.stdout.split())
    for key, field in leaf_fields(RunConfig).items():
        entry = options.split(f" --{key} ", 1)[1].split(" --", 1)[0]
        assert " ".join(field.description.split()) in entry, key
        assert ("(required)" in entry) == field.is_required(), key
        assert ("(default: " in entry) != field.is_required(), key
    for expected in [
        "usage: python -m megatron_kd.pretrain --config run.toml [--section.key value ...]",
        "--config path Run file (TOML)",
        "Define the shape of the student: a Llama-style decoder",
        "--optimizer.learning_rate number Peak learning rate. Must be > 0. (required)",
        "--distill.alpha number Largest weight of the distillation loss, in [0, 1]. Unused "
        "without a teacher. (default: 0.9)",
        "--train.precision {bf16,fp32} ",
        "--parallel.sequence_parallel {true,false} ",
        "--telemetry.tensorboard {true,false} Write TensorBoard event files. (default: true)",
        "--distill.chunk_tokens integer Tokens whose logits exist at one time in the output head.",
        "never from free memory. Must be > 0. (default: unset)",
        "--model.mcore table Further fields",
        "--data.train list Prefixes of the training data (path without .bin/.idx). A JSON list; "
        "or repeat the option. (required)",
    ]:
        assert expected in options
    for python_word in (
        "Optional",
        "NoneType",
        "tuple[",
        "dict[",
        "int |",
        "factory",
        "None)",
        "True)",
        "PydanticUndefined",
    ):
        assert python_word not in process.stdout


def test_config_imports_neither_torch_nor_megatron_core() -> None:
    for source in Path(megatron_kd.config.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] != "torch", (
                    source.name,
                    name,
                )
                assert not name.startswith("megatron."), (
                    source.name,
                    name,
                )

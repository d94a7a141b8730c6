"""Compare known model shapes with published sizes, and use them in run files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kd.config import ConfigError, ModelSection, RunConfig, dump_toml, load_config
from megatron_kd.config.presets import PRESETS
from megatron_kd.planning.parameters import parameter_count
from tests.config.conftest import RUN_FILE

ROOT = Path(__file__).parents[2]

# Exact: numbers of weights of the released checkpoints.
RELEASED = {
    "llama-3.1-8b": 8_030_261_248,  # also Llama 3 8B
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "glm-9b": 9_399_951_360,  # GLM-4-9B
}
# In billions as the source rounds them: (all weights, digits) and, where given, without embeddings.
NAMED: dict[str, tuple[float, int, float | None]] = {
    "glm-330m": (0.33, 2, None),  # arXiv 2410.16215, table 7
    "glm-670m": (0.67, 2, None),
    "glm-1.9b": (1.9, 1, None),
    "glm-3.8b": (3.8, 1, None),
    "glm-6.8b": (6.8, 1, None),
    "llama3-0.7b": (0.7, 1, None),  # arXiv 2605.23857
    "llama3-1.7b": (1.7, 1, None),
    "llama3-3.8b": (3.8, 1, None),
    "llama3-8b": (8.0, 1, None),
    "qwen3-0.15b": (0.15, 2, None),  # arXiv 2605.23857, ablation
    "qwen3-0.3b": (0.3, 1, None),
    "qwen3-1b": (1.0, 1, None),
    "qwen3-1.7b": (1.7, 1, 1.4),  # model cards of Qwen3
    "qwen3-4b": (4.0, 1, 3.6),
    "qwen3-8b": (8.2, 1, 6.95),
}


def test_every_preset_is_checked_against_a_source() -> None:
    assert {*RELEASED, *NAMED} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_the_published_ones(name: str) -> None:
    model = ModelSection.model_validate({"preset": name})
    assert model.vocab_size is not None
    count = parameter_count(model, model.vocab_size)
    if name in RELEASED:
        assert count == RELEASED[name]
        return
    billions, digits, without_embeddings = NAMED[name]
    # Sources truncate or round: less than one unit of the last digit.
    assert abs(count / 1e9 - billions) < 0.99 * 10.0**-digits, count
    if without_embeddings is not None:
        embeddings = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
        assert abs((count - embeddings) / 1e9 - without_embeddings) < 0.05


def test_single_keys_win_over_the_preset(load: Callable[..., RunConfig]) -> None:
    text = (
        f'[model]\npreset = "qwen3-0.6b"\nnum_layers = 4\nvocab_size = '
        f"512\n[data]{RUN_FILE.partition('[data]')[2]}"
    )
    model = load(text=text).model
    assert (model.num_layers, model.vocab_size, model.hidden_size, model.qk_norm) == (
        4,
        512,
        1024,
        True,
    )
    model = load(
        "--model.ffn_hidden_size", "64", "--model.num_query_groups", "null", text=text
    ).model
    assert (model.ffn_hidden_size, model.num_query_groups) == (64, 8)


def test_preset_on_the_command_line_wins_over_the_run_file(load: Callable[..., RunConfig]) -> None:
    model = load("--model.preset", "llama-3.2-1b", "--model.num_layers", "2").model
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.rope_scaling_factor) == (
        2048,
        2,
        128_256,
        32.0,
    )


def test_a_dumped_run_with_a_preset_is_the_same_run(
    load: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = load("--model.preset", "qwen3-0.3b", "--model.num_layers", "6")
    (tmp_path / "dumped.toml").write_text(dump_toml(config))
    assert load_config(["--config", str(tmp_path / "dumped.toml")]) == config


def test_unknown_preset_names_the_nearest(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(
        ConfigError,
        match=r'model.preset \("llama-3.2-1"\) is not known: did you mean "llama-3.2-1b"',
    ) as error:
        load("--model.preset", "llama-3.2-1")
    assert len(str(error.value).splitlines()) == 1


def test_window_shorter_than_the_sequence_is_refused(load: Callable[..., RunConfig]) -> None:
    assert load("--model.sliding_window", "32").model.sliding_window == 32
    with pytest.raises(
        ConfigError,
        match=(
            r"batch.sequence_length \(32\) must be at most the model's sliding window \(31 "
            r"tokens\)"
        ),
    ):
        load("--model.sliding_window", "31")


def test_describe_model(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "tools/describe_model.py"), *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        return process.stdout

    output = run()
    for name in PRESETS:
        assert name in output
    description = json.loads(
        run("--preset", "llama-3.2-1b", "--ranks", "8", "--parallel.tensor", "2", "--json")
    )
    assert description["parameters"]["total"] == RELEASED["llama-3.2-1b"]
    assert description["layout"]["data"] == 4
    assert len(description["memory_per_rank"]) == 1
    process = subprocess.run(
        [sys.executable, str(ROOT / "tools/describe_model.py"), "--preset", "gpt5"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "is not known" in process.stderr

"""Provide a small complete run file, and a fixture that loads it with changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kd.config import RunConfig, load_config

RUN_FILE = """
[model]
hidden_size = 64
num_layers = 4
num_attention_heads = 4
ffn_hidden_size = 128
vocab_size = 512
[data]
train = ["corpus/text"]
[batch]
global_batch_size = 8
micro_batch_size = 2
sequence_length = 32
[optimizer]
learning_rate = 1e-3
[train]
steps = 10
[run]
directory = "runs/first"
"""


@pytest.fixture
def run_text() -> str:
    return RUN_FILE


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Load `text` as run.toml in an empty working directory, with overrides on top."""
    monkeypatch.chdir(tmp_path)

    def load_text(*overrides: str, text: str = RUN_FILE) -> RunConfig:
        Path("run.toml").write_text(text)
        return load_config(["--config", "run.toml", *overrides])

    return load_text

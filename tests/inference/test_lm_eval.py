"""Check task files and models before lm-evaluation-harness runs them.

The run itself is tested in test_exported_student.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.inference.lm_eval import _start_id, read_task

EXAMPLES = Path(__file__).parents[2] / "examples/evaluation"


def test_example_tasks_are_complete(tmp_path: Path) -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        with pytest.raises(ConfigError, match="does not exist: name its folder"):
            read_task(path, tmp_path)
        name = next(
            line.split(": ")[1]
            for line in path.read_text().splitlines()
            if line.startswith("data_file")
        )
        (tmp_path / name).write_text("{}\n")
        task = read_task(path, tmp_path)
        assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / name)


def test_remote_data_and_code_are_refused(tmp_path: Path) -> None:
    piqa = (EXAMPLES / "piqa.yaml").read_text()
    for text, message in (
        (piqa + "dataset_path: ybisk/piqa\n", "sets dataset_path"),
        (piqa + "process_docs: !function utils.run\n", "cannot be read"),
        (piqa.replace("task: piqa", ""), "lacks task"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_task(tmp_path / "bad.yaml", tmp_path)


class Ids:
    def __init__(self, bos: int | None, eos: int | list[int] | None) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos


class Model:
    def __init__(self, config: Ids) -> None:
        self.config = config


@pytest.mark.parametrize(
    ("tokenizer", "config", "start_id"),
    [
        (Ids(0, 1), Ids(2, 3), 0),
        (Ids(None, 1), Ids(2, 3), 1),
        (Ids(None, None), Ids(None, [4, 5]), 4),
    ],
)
def test_start_id(tokenizer: Ids, config: Ids, start_id: int, tmp_path: Path) -> None:
    """Take the tokenizer's ids first. Many a tokenizer.json names none, and config.json does."""
    assert _start_id(Model(config), tokenizer, tmp_path) == start_id


def test_a_model_without_a_start_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names a bos or eos id"):
        _start_id(Model(Ids(None, None)), Ids(None, None), tmp_path)

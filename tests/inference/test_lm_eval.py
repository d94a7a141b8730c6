"""The folders of tasks and models that lm-evaluation-harness is given, checked before it runs; the run itself: test_use_student.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.inference.lm_eval import _start_id, read_task

ROOT = Path(__file__).parents[2]


def test_task_files(tmp_path: Path) -> None:
    """The examples are whole; a file that would bring data or code from elsewhere is refused."""
    for path in sorted((ROOT / "examples/evaluation").glob("*.yaml")):
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
    piqa = (ROOT / "examples/evaluation/piqa.yaml").read_text()
    for text, sentence in (
        (piqa + "dataset_path: ybisk/piqa\n", "sets dataset_path"),
        (piqa + "process_docs: !function utils.run\n", "cannot be read"),
        (piqa.replace("task: piqa", ""), "lacks task"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            read_task(tmp_path / "bad.yaml", tmp_path)


def test_texts_are_scored_after_a_known_id(tmp_path: Path) -> None:
    """The tokenizer's own ids come first; many a tokenizer.json names none, and config.json does."""

    class Ids:
        def __init__(self, bos: int | None, eos: int | list[int] | None) -> None:
            self.bos_token_id, self.eos_token_id = bos, eos

    class Model:
        def __init__(self, config: Ids) -> None:
            self.config = config

    for tokenizer, config, wanted in (
        (Ids(0, 1), Ids(2, 3), 0),
        (Ids(None, 1), Ids(2, 3), 1),
        (Ids(None, None), Ids(None, [4, 5]), 4),
    ):
        assert _start_id(Model(config), tokenizer, tmp_path) == wanted
    with pytest.raises(ConfigError, match="names a bos or eos id"):
        _start_id(Model(Ids(None, None)), Ids(None, None), tmp_path)

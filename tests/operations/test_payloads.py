"""Untrusted files with code or outside paths: no code is run, no outside file is touched.

Checkpoints and their manifests: tests/checkpoint/. Job names and scripts: test_slurm_scripts.py.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface
from megatron_kd.config import ConfigError, ModelSection, load_config
from megatron_kd.data.preparation.jobs.conversations import ChatTemplate, ConversationError
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.models.huggingface.transformers_model import load_causal_lm, load_text_tokenizer
from tests.helpers.text import make_tokenizers
from tests.models.folders import write_folder

pytestmark = pytest.mark.fault(12)

MODEL = ModelSection(
    hidden_size=32, num_layers=1, num_attention_heads=2, ffn_hidden_size=64, vocab_size=64
)


class Payload:
    """Make a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.sentinel,)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "sentinel"


def code(sentinel: Path) -> str:
    return f"import pathlib\npathlib.Path({str(sentinel)!r}).mkdir()\nclass Stranger: pass\n"


def test_the_payload_works(sentinel: Path) -> None:
    pickle.loads(pickle.dumps(Payload(sentinel)))
    assert sentinel.exists()


def test_pickled_weights(sentinel: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", MODEL)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        torch.save({"weight": Payload(sentinel)}, folder / name)
        with pytest.raises(ConfigError, match="only pickled weights"):
            open_huggingface(folder)
        with pytest.raises(ConfigError, match="transformers cannot load"):
            load_causal_lm(folder, torch.float32, setting="teacher.checkpoint")
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(sentinel)))
    with pytest.raises(ConfigError, match="truncated or damaged"):
        open_huggingface(folder)
    assert not sentinel.exists()


def test_a_model_s_own_code(sentinel: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", MODEL)
    (folder / "modeling_stranger.py").write_text(code(sentinel))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config
            | {
                "model_type": "stranger",
                "auto_map": {
                    "AutoConfig": "modeling_stranger.Stranger",
                    "AutoModelForCausalLM": "modeling_stranger.Stranger",
                },
            }
        )
    )
    with pytest.raises(ConfigError, match="transformers cannot load"):
        load_causal_lm(folder, torch.float32, setting="teacher.checkpoint")
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_stranger.Stranger"}})
    )
    assert load_causal_lm(folder, torch.float32, setting="teacher.checkpoint")
    with pytest.raises(ConfigError, match="which is never run"):
        open_huggingface(folder)
    assert not sentinel.exists()


def test_tokenizers(sentinel: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "ranks.tiktoken"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(sentinel)))
        with pytest.raises(ConfigError, match="is no tokenizer"):
            load_tokenizer(tmp_path / name)
        (tmp_path / name).unlink()
    folder = tmp_path / "untrusted"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(make_tokenizers(tmp_path)["huggingface"].read_bytes())
    (folder / "tokenization_stranger.py").write_text(code(sentinel))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "auto_map": {"AutoTokenizer": ["tokenization_stranger.Stranger", None]},
                "tokenizer_class": "Stranger",
            }
        )
    )
    assert load_tokenizer(folder)[1].vocab_size > 0
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers loads"):
        load_text_tokenizer(folder, setting="--tokenizer")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{% for i in range(10**12) %}{% endfor %}",
    ],
)
def test_chat_templates(text: str, tmp_path: Path) -> None:
    template = ChatTemplate(text, load_tokenizer(make_tokenizers(tmp_path)["huggingface"])[0])
    with pytest.raises(ConversationError, match="the template refuses it"):
        template.render([{"role": "user", "content": "x"}], prompt=False)


def _outside(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "a/../../secret.safetensors", ""]
)
def test_an_index_that_points_elsewhere(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", MODEL)
    _outside(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": name}})
    )
    with pytest.raises(ConfigError, match="to files beside it|is missing in"):
        open_huggingface(folder)


RUN = """
[model]
hidden_size = 32
num_layers = 1
num_attention_heads = 2
ffn_hidden_size = 64
vocab_size = 64
[data]
train = [{data}]
[batch]
global_batch_size = 1
micro_batch_size = 1
sequence_length = 8
[optimizer]
learning_rate = 1e-3
[train]
steps = 1
[run]
directory = {directory}
"""


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    "word",
    [
        "$(touch sentinel)",
        "; touch sentinel",
        "`touch sentinel`",
        "{0.__class__}",
        "%(x)s",
        "__import__('os')",
    ],
)
def test_run_files(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are never run or expanded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        RUN.replace("{data}", json.dumps(word)).replace("{directory}", json.dumps(f"runs/{word}"))
    )
    config = load_config(["--config", "run.toml", "--run.directory", f"other/{word}"])
    assert str(config.run.directory) == f"other/{word}"
    assert config.data.train == (word,)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]

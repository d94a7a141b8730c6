"""Refuse damaged or unsupported model folders and checkpoints with one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface, write_checkpoint
from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
from megatron_kd.checkpoint.store import read_info
from megatron_kd.checkpoint.tensors import TensorReader
from megatron_kd.config import ConfigError
from tests.models.folders import write_small_folder


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = dict(load_file(folder / "model.safetensors"))
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def _index(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {
        "weight_map": {
            **dict.fromkeys(names, "model.safetensors"),
            "lm_head.weight": "model-2.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _two_models(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "part.safetensors")
    index = {
        "weight_map": dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "wrong family": (_edit_config(model_type="gpt2"), "model_type 'gpt2'"),
    "own code": (_edit_config(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "not a causal lm": (
        _edit_config(architectures=["Qwen2ForSequenceClassification"]),
        "Qwen2ForSequenceClassification",
    ),
    "activation": (_edit_config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantized": (_edit_config(quantization_config={"quant_method": "fp8"}), "quantized"),
    "rope": (_edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "type 'yarn'"),
    "partial rope": (_edit_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "some windows": (
        _edit_config(use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "1 of 2 layers",
    ),
    "no layers": (_edit_config(num_hidden_layers=0), "num_layers"),
    "another size": (
        _edit_config(hidden_size=32),
        r"has shape \[50, 16\], but config.json says \[50, 32\]",
    ),
    "more layers": (
        _edit_config(num_hidden_layers=3),
        "model.layers.2.input_layernorm.weight and 11 more missing",
    ),
    "fewer layers": (_edit_config(num_hidden_layers=1), "holds model.layers.1"),
    "another family's parts": (
        _edit_config(model_type="llama", architectures=None),
        "holds model.layers.0.self_attn.k_proj.bias",
    ),
    "tied but different": (_edit_config(tie_word_embeddings=True), "lm_head.weight differs"),
    "missing tensor": (_edit_tensors(lambda t: t.pop(O_PROJ)), f"{O_PROJ} missing"),
    "extra tensor": (
        _edit_tensors(lambda t: t.update({"model.extra": torch.ones(2)})),
        "holds model.extra",
    ),
    "wrong shape": (
        _edit_tensors(lambda t: t.update({O_PROJ: torch.ones(16, 8)})),
        rf"{O_PROJ} has shape \[16, 8\]",
    ),
    "integer weights": (
        _edit_tensors(lambda t: t.update({O_PROJ: torch.ones(16, 16, dtype=torch.int8)})),
        "type I8",
    ),
    "truncated": (_truncate, "truncated or damaged"),
    "missing file": (
        _index,
        "model-2.safetensors named in model.safetensors.index.json is missing",
    ),
    "pickled": (_pickled, "only pickled weights .pytorch_model.bin."),
    "wrong type": (_edit_config(rope_parameters=[1]), "a value has the wrong type"),
    "wrong type of family": (_edit_config(model_type=["llama"]), "a value has the wrong type"),
    "heads and groups": (
        _edit_config(num_key_value_heads=3),
        r"no usable model \(num_attention_heads \(4\) must be a multiple",
    ),
    "endless layers": (
        _edit_config(num_hidden_layers=10**12),
        "says 1000000000000 layers, but .* holds only 27 tensors",
    ),
    "two models": (
        _two_models,
        "holds both model.safetensors and an model.safetensors.index.json of other files",
    ),
    "not finite": (
        _edit_tensors(lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "final_layernorm.weight, .* not finite",
    ),
    "nested config": (
        lambda folder: (folder / "config.json").write_text("[" * 10**5),
        "cannot be read as JSON",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_named(tmp_path: Path, name: str) -> None:
    """Report one sentence and write nothing."""
    damage, message = BAD[name]
    folder = write_small_folder(tmp_path / "huggingface")
    open_huggingface(folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        write_checkpoint(tmp_path / "checkpoint", open_huggingface(folder), tokenizer=None)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "checkpoint").exists()


def test_other_files_are_not_read(tmp_path: Path) -> None:
    """Ignore the copy of the weights under other names in Mistral's folders."""
    folder = write_small_folder(tmp_path / "huggingface")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert "tok_embeddings.weight" not in open_huggingface(folder).weights.tensors


def test_file_damaged_while_it_is_read(tmp_path: Path) -> None:
    source = open_huggingface(write_small_folder(tmp_path / "huggingface"))
    _truncate(tmp_path / "huggingface")
    with pytest.raises(ConfigError, match="truncated or damaged"):
        write_checkpoint(tmp_path / "checkpoint", source, tokenizer=None)
    assert not (tmp_path / "checkpoint").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.fault(12)
def test_checkpoint_metadata_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(
        tmp_path / "checkpoint",
        open_huggingface(write_small_folder(tmp_path / "huggingface")),
        tokenizer=None,
    )
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match="which no checkpoint needs"):
        TensorReader(folder, setting="test")
    assert not Path("ran").exists()
    (folder / ".metadata").unlink()
    with pytest.raises(ConfigError, match="no .metadata file"):
        TensorReader(folder, setting="test")


@pytest.mark.fault(5)
def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "checkpoint",
        open_huggingface(write_small_folder(tmp_path / "huggingface")),
        tokenizer=None,
    )
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(
        ConfigError, match=r"__0_0.distcp has \d+ bytes, expected \d+: the checkpoint is damaged"
    ):
        write_huggingface(
            tmp_path / "back", folder, read_info(folder, setting="test"), max_positions=64
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "huggingface"]

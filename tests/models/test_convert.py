"""Convert Hugging Face folders and Megatron checkpoints: weights, types, memory, tokenizers."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_kd.checkpoint.conversion.checkpoint_weights import CheckpointWeights
from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface, write_checkpoint
from megatron_kd.checkpoint.conversion.from_megatron import adopt_checkpoint
from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
from megatron_kd.checkpoint.store import read_info
from megatron_kd.checkpoint.tensors import TensorReader
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.data.tokenizer_files import huggingface_files
from megatron_kd.models.huggingface.config_json import config_from_model
from megatron_kd.models.huggingface.tensor_names import tensor_mappings
from megatron_kd.models.huggingface.transformers_model import load_text_tokenizer
from tests.losses.cases import fresh_seed
from tests.models.folders import MODEL, write_folder, write_small_folder


def test_vocabulary_is_cut_and_padded(tmp_path: Path) -> None:
    """Fill rows past the true size with zeros on import, and leave them out on export."""
    source = open_huggingface(
        write_small_folder(tmp_path / "huggingface", seed=fresh_seed()),
        vocab_size=45,
        vocab_size_multiple=16,
    )
    folder = write_checkpoint(tmp_path / "checkpoint", source, tokenizer="0" * 64)
    info = read_info(folder, setting="test")
    assert (info.vocab_size, info.tokenizer, info.precision, info.step) == (45, "0" * 64, "fp32", 0)
    original = load_file(tmp_path / "huggingface/model.safetensors")
    reader = TensorReader(folder, setting="test")
    for megatron_name, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        assert reader.tensors[megatron_name].shape == (48, 16)
        rows = reader.read(megatron_name, (0, 0), (48, 16))
        assert torch.equal(rows[:45], original[name][:45])
        assert not rows[45:].any()
        assert torch.equal(reader.read(megatron_name, (3, 5), (7, 2)), original[name][3:10, 5:7])
    write_huggingface(tmp_path / "back", folder, info, max_positions=64)
    assert torch.equal(
        load_file(tmp_path / "back/model.safetensors")["lm_head.weight"],
        original["lm_head.weight"][:45],
    )


def test_types(tmp_path: Path) -> None:
    """Keep bf16, and convert fp16, which bf16 cannot hold, to fp32."""
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp32")):
        source = open_huggingface(write_small_folder(tmp_path / str(dtype), dtype=dtype))
        folder = write_checkpoint(tmp_path / precision, source, tokenizer=None)
        info = read_info(folder, setting="test")
        assert info.precision == precision
        write_huggingface(tmp_path / f"{precision}_back", folder, info, max_positions=64)
        original, exported = (
            load_file(tmp_path / f"{dtype}/model.safetensors"),
            load_file(tmp_path / f"{precision}_back/model.safetensors"),
        )
        assert original.keys() == exported.keys()
        assert all(torch.equal(original[name].float(), exported[name].float()) for name in original)


def test_megatron_checkpoint(tmp_path: Path) -> None:
    """Adopt a checkpoint of another program with wider padding and further tensors."""
    wide = open_huggingface(
        write_small_folder(tmp_path / "huggingface", seed=fresh_seed()), vocab_size_multiple=64
    )
    source = write_checkpoint(tmp_path / "megatron", wide, tokenizer=None)
    (source / "state.json").unlink()
    folder = adopt_checkpoint(source, MODEL, tmp_path / "adopted", tokenizer=None)
    source_weights, adopted = (
        CheckpointWeights(path, MODEL, 50, setting="test") for path in (source, folder)
    )
    assert all(
        torch.equal(source_weights.read(*key), adopted.read(*key)) for key in tensor_mappings(MODEL)
    )
    assert adopted.reader.tensors["output_layer.weight"].shape == (64, 16)
    larger = MODEL.model_copy(update={"num_layers": 3})
    with pytest.raises(ConfigError, match=r"has shape \[2, 16\], but the model says \[3, 16\]"):
        adopt_checkpoint(source, larger, tmp_path / "no", tokenizer=None)
    with pytest.raises(ConfigError, match="lacks .*q_layernorm.weight"):
        adopt_checkpoint(
            source, MODEL.model_copy(update={"qk_norm": True}), tmp_path / "no", tokenizer=None
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.fault(16)
def test_a_killed_conversion_leaves_the_name_free(tmp_path: Path) -> None:
    """Write the folder completely or not at all, and replace an earlier attempt."""
    (tmp_path / ".incomplete-checkpoint/checkpoints/.incomplete-step-00000000").mkdir(parents=True)
    source = open_huggingface(write_small_folder(tmp_path / "huggingface"))
    write_checkpoint(tmp_path / "checkpoint", source, tokenizer=None, files={"note": b"1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "huggingface"]
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "checkpoints",
        "note",
    ]
    with pytest.raises(ConfigError, match="exists already"):
        write_checkpoint(tmp_path / "checkpoint", source, tokenizer=None)
    # A name that no folder can be given: the failure comes after all weights have been written.
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "other", source, tokenizer=None, files={"no/such/folder": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "huggingface"]


def _peak_growth(run: Callable[[], Any]) -> int:
    """Return the peak growth of this process's memory while `run` runs, bytes."""

    def kilobytes(name: str) -> int:
        return next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="measured through Linux's /proc"
)
def test_conversion_holds_a_few_tensors_in_memory(tmp_path: Path) -> None:
    """Hold a few tensors, or one output file, of a model of 32 layers and 100 MB."""
    shape = {
        "hidden_size": 256,
        "num_layers": 32,
        "ffn_hidden_size": 768,
        "vocab_size": 1000,
        "qkv_bias": False,
    }
    folder = write_folder(
        tmp_path / "huggingface",
        ModelSection.model_validate({**MODEL.model_dump(), **shape, "num_attention_heads": 4}),
    )
    size = (folder / "model.safetensors").stat().st_size
    assert size > 90e6
    warm = open_huggingface(write_small_folder(tmp_path / "small"))
    write_huggingface(
        tmp_path / "b",
        write_checkpoint(tmp_path / "a", warm, tokenizer=None),
        _info(tmp_path / "a"),
        max_positions=64,
    )
    source = open_huggingface(folder)
    assert (
        _peak_growth(lambda: write_checkpoint(tmp_path / "checkpoint", source, tokenizer=None))
        < size / 4
    )
    info, folder = _info(tmp_path / "checkpoint"), tmp_path / "checkpoint/checkpoints/step-00000000"
    assert (
        _peak_growth(
            lambda: write_huggingface(
                tmp_path / "back", folder, info, max_positions=64, shard_bytes=10**7
            )
        )
        < size / 3
    )


def _info(folder: Path) -> Any:
    return read_info(folder / "checkpoints/step-00000000", setting="test")


def test_exported_tokenizer_keeps_its_rules(tmp_path: Path) -> None:
    """Keep numbers whole, which transformers' class for Qwen3 models splits into digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text := "it's 1234567 and 1234567\n\n"] * 9,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet),
    )
    (tmp_path / "folder").mkdir()
    for name in ("own_name.json", "folder/tokenizer.json"):
        tokenizer.save(str(tmp_path / name))
        folder = tmp_path / f"exported_{Path(name).stem}"
        folder.mkdir()
        qwen3 = MODEL.model_copy(update={"qkv_bias": False, "qk_norm": True})
        config = config_from_model(qwen3, vocab_size=300, dtype="float32", max_positions=64)
        (folder / "config.json").write_text(json.dumps(config))
        for file, content in huggingface_files(tmp_path / name).items():
            (folder / file).write_bytes(content)
        exported = load_text_tokenizer(folder, setting="model")
        assert exported(text).input_ids == tokenizer.encode(text).ids
        assert len(tokenizer.encode(" 1234567").ids) == 1
        assert exported.decode(exported(text).input_ids) == text
        # For Qwen2 models transformers has its own rules, whatever the files say.
        (folder / "config.json").write_text(
            json.dumps(config_from_model(MODEL, vocab_size=300, dtype="float32", max_positions=64))
        )
        with pytest.raises(ConfigError, match="does not read .*tokenizer.json as it is written"):
            load_text_tokenizer(folder, setting="model")

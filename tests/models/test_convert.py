"""Hugging Face folders in and out: the same weights, the same logits in every layout, and named errors."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kd.checkpoint.conversion.checkpoint_weights import CheckpointWeights
from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface, write_checkpoint
from megatron_kd.checkpoint.conversion.from_megatron import adopt_checkpoint
from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
from megatron_kd.checkpoint.store import read_info
from megatron_kd.checkpoint.tensors import TensorReader
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.data.tokenizer_files import huggingface_files
from megatron_kd.models.huggingface.config_json import config_from_model, model_from_config
from megatron_kd.models.huggingface.tensor_names import tensor_mappings
from megatron_kd.models.huggingface.transformers_model import load_text_tokenizer
from tests.helpers.ranks import run_ranks
from tests.losses.cases import fresh_seed
from tests.models.families import FAMILIES, LAYOUTS, Found, convert_all
from tests.models.folders import write_folder as write_model


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run_ranks(convert_all, 2, tmp_path_factory.mktemp("families"), fresh_seed())[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", FAMILIES)
def test_families_agree_with_transformers(converted: dict[str, Found], name: str) -> None:
    found = converted[name]
    assert found.scale > 1.0, "logits too small to tell models apart"
    for layout in LAYOUTS:
        assert found.difference[layout] <= 1e-4, (layout, found)
    assert found.back
    assert found.again == 0.0


MODEL = ModelSection(
    hidden_size=16,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=50,
    vocab_size_multiple=16,
    qkv_bias=True,
)


def write_folder(folder: Path, **options: Any) -> Path:
    return write_model(folder, MODEL, **options)


def test_model_section_survives_config_json() -> None:
    tied = {"tied_embeddings": True, "rope_base": 5e5, "norm_eps": 1e-6}
    scaled = {
        "rope_scaling_factor": 32.0,
        "rope_original_length": 4096,
        "rope_low_frequency_factor": 2.0,
    }
    for changes in (
        tied,
        scaled,
        {"qk_norm": True, "qkv_bias": False, "head_dim": 8},
        {"qkv_bias": False, "sliding_window": 32},
    ):
        model = ModelSection.model_validate(
            {**MODEL.model_dump(), "vocab_size_multiple": 128, "head_dim": 4, **changes}
        )
        config = config_from_model(model, vocab_size=50, dtype="float32", max_positions=64)
        assert model_from_config(json.loads(json.dumps(config)), what="test") == model


def test_vocabulary_is_cut_and_padded(tmp_path: Path) -> None:
    """Rows past the true size are zero, whatever padding the folder had; the export has the true rows alone."""
    source = open_huggingface(
        write_folder(tmp_path / "theirs", seed=fresh_seed()), vocab_size=45, vocab_size_multiple=16
    )
    folder = write_checkpoint(tmp_path / "ours", source, tokenizer="0" * 64)
    info = read_info(folder, what="test")
    assert (info.vocab_size, info.tokenizer, info.precision, info.step) == (45, "0" * 64, "fp32", 0)
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    reader = TensorReader(folder, what="test")
    for ours, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        assert reader.tensors[ours].shape == (48, 16)
        rows = reader.read(ours, (0, 0), (48, 16))
        assert torch.equal(rows[:45], theirs[name][:45])
        assert not rows[45:].any()
        assert torch.equal(reader.read(ours, (3, 5), (7, 2)), theirs[name][3:10, 5:7])
    write_huggingface(tmp_path / "back", folder, info, max_positions=64)
    assert torch.equal(
        load_file(tmp_path / "back/model.safetensors")["lm_head.weight"],
        theirs["lm_head.weight"][:45],
    )


def test_types(tmp_path: Path) -> None:
    """bf16 stays bf16; fp16, which bf16 cannot hold, becomes fp32."""
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp32")):
        source = open_huggingface(write_folder(tmp_path / str(dtype), dtype=dtype))
        folder = write_checkpoint(tmp_path / precision, source, tokenizer=None)
        info = read_info(folder, what="test")
        assert info.precision == precision
        write_huggingface(tmp_path / f"{precision}_back", folder, info, max_positions=64)
        one, other = (
            load_file(tmp_path / f"{dtype}/model.safetensors"),
            load_file(tmp_path / f"{precision}_back/model.safetensors"),
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].float(), other[name].float()) for name in one)


def test_foreign_megatron_checkpoint(tmp_path: Path) -> None:
    """One written elsewhere, with wider padding and other tensors beside the weights, comes in; a wrong shape is named."""
    wide = open_huggingface(
        write_folder(tmp_path / "theirs", seed=fresh_seed()), vocab_size_multiple=64
    )
    foreign = write_checkpoint(tmp_path / "foreign", wide, tokenizer=None)
    (foreign / "state.json").unlink()
    folder = adopt_checkpoint(foreign, MODEL, tmp_path / "adopted", tokenizer=None)
    one, other = (CheckpointWeights(path, MODEL, 50, what="test") for path in (foreign, folder))
    assert all(
        torch.equal(one.read(*place), other.read(*place)) for place in tensor_mappings(MODEL)
    )
    assert other.reader.tensors["output_layer.weight"].shape == (64, 16)
    larger = MODEL.model_copy(update={"num_layers": 3})
    with pytest.raises(ConfigError, match=r"has shape \[2, 16\], but the model says \[3, 16\]"):
        adopt_checkpoint(foreign, larger, tmp_path / "no", tokenizer=None)
    with pytest.raises(ConfigError, match="lacks .*q_layernorm.weight"):
        adopt_checkpoint(
            foreign, MODEL.model_copy(update={"qk_norm": True}), tmp_path / "no", tokenizer=None
        )
    assert not (tmp_path / "no").exists()


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
    """One sentence, and nothing written."""
    spoil, sentence = BAD[name]
    folder = write_folder(tmp_path / "theirs")
    open_huggingface(folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=sentence) as error:
        write_checkpoint(tmp_path / "ours", open_huggingface(folder), tokenizer=None)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ours").exists()


def test_what_lies_beside_the_model_is_not_read(tmp_path: Path) -> None:
    """Mistral's folders hold the same weights once more under other names."""
    folder = write_folder(tmp_path / "theirs")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert "tok_embeddings.weight" not in open_huggingface(folder).weights.tensors


@pytest.mark.fault(16)
def test_a_killed_conversion_leaves_the_name_free(tmp_path: Path) -> None:
    """The folder appears whole: under its name there is nothing before, and an earlier attempt is no obstacle."""
    (tmp_path / ".incomplete-ours/checkpoints/.incomplete-step-00000000").mkdir(parents=True)
    source = open_huggingface(write_folder(tmp_path / "theirs"))
    write_checkpoint(tmp_path / "ours", source, tokenizer=None, files={"note": b"1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["checkpoints", "note"]
    with pytest.raises(ConfigError, match="exists already"):
        write_checkpoint(tmp_path / "ours", source, tokenizer=None)
    # A name that no folder can be given: the failure comes after all weights have been written.
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "other", source, tokenizer=None, files={"no/such/folder": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def _peak_growth(run: Callable[[], Any]) -> int:
    """Bytes by which the memory of this process grew at most while `run` ran."""

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
def test_memory_of_a_conversion_is_that_of_its_largest_pieces(tmp_path: Path) -> None:
    """A model of 32 layers, 100 MB: neither way holds much more than a few tensors, or one output file."""
    shape = {
        "hidden_size": 256,
        "num_layers": 32,
        "ffn_hidden_size": 768,
        "vocab_size": 1000,
        "qkv_bias": False,
    }
    folder = write_model(
        tmp_path / "theirs",
        ModelSection.model_validate({**MODEL.model_dump(), **shape, "num_attention_heads": 4}),
    )
    size = (folder / "model.safetensors").stat().st_size
    assert size > 90e6
    warm = open_huggingface(write_folder(tmp_path / "small"))
    write_huggingface(
        tmp_path / "b",
        write_checkpoint(tmp_path / "a", warm, tokenizer=None),
        _info(tmp_path / "a"),
        max_positions=64,
    )
    source = open_huggingface(folder)
    assert (
        _peak_growth(lambda: write_checkpoint(tmp_path / "ours", source, tokenizer=None)) < size / 4
    )
    info, ours = _info(tmp_path / "ours"), tmp_path / "ours/checkpoints/step-00000000"
    assert (
        _peak_growth(
            lambda: write_huggingface(
                tmp_path / "back", ours, info, max_positions=64, shard_bytes=10**7
            )
        )
        < size / 3
    )


def _info(folder: Path) -> Any:
    return read_info(folder / "checkpoints/step-00000000", what="test")


def test_file_damaged_while_it_is_read(tmp_path: Path) -> None:
    source = open_huggingface(write_folder(tmp_path / "theirs"))
    _truncate(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="truncated or damaged"):
        write_checkpoint(tmp_path / "ours", source, tokenizer=None)
    assert not (tmp_path / "ours").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.fault(12)
def test_checkpoint_metadata_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(
        tmp_path / "ours", open_huggingface(write_folder(tmp_path / "theirs")), tokenizer=None
    )
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match="which no checkpoint needs"):
        TensorReader(folder, what="test")
    assert not Path("ran").exists()
    (folder / ".metadata").unlink()
    with pytest.raises(ConfigError, match="no .metadata file"):
        TensorReader(folder, what="test")


@pytest.mark.fault(5)
def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "ours", open_huggingface(write_folder(tmp_path / "theirs")), tokenizer=None
    )
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(
        ConfigError, match=r"__0_0.distcp has \d+ bytes, expected \d+: the checkpoint is damaged"
    ):
        write_huggingface(
            tmp_path / "back", folder, read_info(folder, what="test"), max_positions=64
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_models_that_no_family_has(tmp_path: Path) -> None:
    for changes, sentence in (
        ({"qk_norm": True}, "both model.qk_norm and model.qkv_bias"),
        ({"mcore": {"x": 1}}, "model.mcore"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            config_from_model(
                MODEL.model_copy(update=changes), vocab_size=50, dtype="float32", max_positions=64
            )


def test_exported_tokenizer_keeps_its_rules(tmp_path: Path) -> None:
    """Numbers are one word for this tokenizer; the class that transformers has for Qwen3 models cuts them into digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    mine = Tokenizer(models.BPE())
    mine.pre_tokenizer, mine.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    mine.train_from_iterator(
        [text := "it's 1234567 and 1234567\n\n"] * 9,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet),
    )
    (tmp_path / "given").mkdir()
    for name in ("own_name.json", "given/tokenizer.json"):
        mine.save(str(tmp_path / name))
        folder = tmp_path / f"exported_{Path(name).stem}"
        folder.mkdir()
        qwen3 = MODEL.model_copy(update={"qkv_bias": False, "qk_norm": True})
        config = config_from_model(qwen3, vocab_size=300, dtype="float32", max_positions=64)
        (folder / "config.json").write_text(json.dumps(config))
        for file, content in huggingface_files(tmp_path / name).items():
            (folder / file).write_bytes(content)
        theirs = load_text_tokenizer(folder, what="model")
        assert theirs(text).input_ids == mine.encode(text).ids
        assert len(mine.encode(" 1234567").ids) == 1
        assert theirs.decode(theirs(text).input_ids) == text
        # For Qwen2 models transformers has its own rules, whatever the files say.
        (folder / "config.json").write_text(
            json.dumps(config_from_model(MODEL, vocab_size=300, dtype="float32", max_positions=64))
        )
        with pytest.raises(ConfigError, match="does not read .*tokenizer.json as it is written"):
            load_text_tokenizer(folder, what="model")

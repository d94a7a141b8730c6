"""Hugging Face folders of Llama 3, Qwen2, Qwen3 and Mistral models: their config.json and tensor names beside ours.

Everything is read as data: config.json as JSON, weights as safetensors. No model code is imported or run, and no pickle is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_kd.config import ConfigError, ModelSection


@dataclass(frozen=True)
class Family:
    """What a model_type fixes. Defaults are those of its configuration class, for keys that config.json leaves out.

    defaults: of keys that mean the same everywhere. qkv_bias, qk_norm: None where config.json decides.
    """

    architecture: str
    qkv_bias: bool
    qk_norm: bool
    defaults: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", False, False, {"rms_norm_eps": 1e-6}),
    "mistral": Family(
        "MistralForCausalLM",
        False,
        False,
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        True,
        False,
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        False,
        True,
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    ),
}


@dataclass(frozen=True)
class Row:
    """One tensor of ours and those of theirs that it is made of; {} is the layer.

    kind: "copy"; "vocabulary" (rows are ids, padded on our side); "gate_up" (theirs one below the other); "qkv" (theirs
    interleaved: for each key/value head its query heads, the key, the value). when: the model key that must be true, with "!" false.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: str = "copy"
    when: str | None = None

    def applies(self, model: ModelSection) -> bool:
        """Whether such a model has this tensor."""
        if self.when is None:
            return True
        wanted = not self.when.startswith("!")
        return bool(getattr(model, self.when.removeprefix("!"))) == wanted


_ATTENTION, _MLP = "decoder.layers.self_attention", "decoder.layers.mlp"
_THEIR_ATTENTION, _THEIR_MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
_QKV = tuple(f"{_THEIR_ATTENTION}.{letter}_proj" for letter in "qkv")

WHOLE_ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("output_layer.weight", ("lm_head.weight",), "vocabulary", when="!tied_embeddings"),
)
LAYER_ROWS = (
    Row(f"{_ATTENTION}.linear_qkv.layer_norm_weight", ("model.layers.{}.input_layernorm.weight",)),
    Row(f"{_ATTENTION}.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), "qkv"),
    Row(
        f"{_ATTENTION}.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV),
        "qkv",
        when="qkv_bias",
    ),
    Row(f"{_ATTENTION}.q_layernorm.weight", (f"{_THEIR_ATTENTION}.q_norm.weight",), when="qk_norm"),
    Row(f"{_ATTENTION}.k_layernorm.weight", (f"{_THEIR_ATTENTION}.k_norm.weight",), when="qk_norm"),
    Row(f"{_ATTENTION}.linear_proj.weight", (f"{_THEIR_ATTENTION}.o_proj.weight",)),
    Row(
        f"{_MLP}.linear_fc1.layer_norm_weight", ("model.layers.{}.post_attention_layernorm.weight",)
    ),
    Row(
        f"{_MLP}.linear_fc1.weight",
        (f"{_THEIR_MLP}.gate_proj.weight", f"{_THEIR_MLP}.up_proj.weight"),
        "gate_up",
    ),
    Row(f"{_MLP}.linear_fc2.weight", (f"{_THEIR_MLP}.down_proj.weight",)),
)
# Layers of ours that store an entry without content beside their weight, one per layer.
EXTRA_STATES = (
    f"{_ATTENTION}.linear_qkv",
    f"{_ATTENTION}.linear_proj",
    f"{_MLP}.linear_fc1",
    f"{_MLP}.linear_fc2",
)
# What old exports hold besides weights: tables that are functions of config.json.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def rows_of(model: ModelSection) -> list[tuple[Row, int | None]]:
    """Every tensor of the model with its layer (None: not in a layer), in the order of a forward pass."""
    first, norm, head = WHOLE_ROWS
    layers = [(row, layer) for layer in range(model.num_layers) for row in LAYER_ROWS]
    return [
        (row, layer)
        for row, layer in [(first, None), *layers, (norm, None), (head, None)]
        if row.applies(model)
    ]


def their_names(row: Row, layer: int | None) -> list[str]:
    """Names of the tensors in the Hugging Face folder."""
    return [name.format(layer) for name in row.theirs]


def head_dim(model: ModelSection) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def their_shapes(row: Row, model: ModelSection, vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors in the Hugging Face folder, in the order of `Row.theirs`."""
    hidden, width = model.hidden_size, head_dim(model)
    queries, keys = (
        model.num_attention_heads * width,
        (model.num_query_groups or model.num_attention_heads) * width,
    )
    if row.kind == "vocabulary":
        return [(vocab_size, hidden)]
    if row.kind == "gate_up":
        return [(model.ffn_hidden_size, hidden)] * 2
    if row.kind == "qkv":
        tail = () if row.ours.endswith("bias") else (hidden,)
        return [(queries, *tail), (keys, *tail), (keys, *tail)]
    if row.ours.endswith("linear_proj.weight"):
        return [(hidden, queries)]
    if row.ours.endswith("linear_fc2.weight"):
        return [(hidden, model.ffn_hidden_size)]
    return [(width,) if row.when == "qk_norm" else (hidden,)]


def model_from_config(config: Mapping[str, Any], *, what: str) -> ModelSection:
    """The model section of a config.json. ConfigError, one sentence, for what is not one of FAMILIES or not supported here."""
    try:
        return _model_from_config(config, what)
    except KeyError as error:
        raise ConfigError(f"{what}: config.json lacks {error.args[0]}") from error
    except ValidationError as error:
        reasons = (
            (".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, "))
            for found in error.errors()
        )
        reason = "; ".join(
            f"{place}: {problem}" if place else problem for place, problem in reasons
        )
        raise ConfigError(f"{what}: config.json describes no usable model ({reason})") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{what}: config.json describes no usable model (a value has the wrong type: {error})"
        ) from error


def _model_from_config(config: Mapping[str, Any], what: str) -> ModelSection:
    family = _family(config, what)
    _refuse_unsupported(config, what)

    def get(name: str, default: Any = None) -> Any:
        value = config.get(name)
        return family.defaults.get(name, default) if value is None and name not in config else value

    heads = config["num_attention_heads"]
    values = {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_query_groups": get("num_key_value_heads", heads) or heads,
        "head_dim": get("head_dim"),
        "ffn_hidden_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "tied_embeddings": bool(get("tie_word_embeddings", False)),
        "qk_norm": family.qk_norm,
        "qkv_bias": family.qkv_bias,
        "norm_eps": get("rms_norm_eps"),
        "sliding_window": _window(config, get("sliding_window"), what),
        **_rope(config, what),
    }
    return ModelSection.model_validate(values)


def _family(config: Mapping[str, Any], what: str) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{what}: config.json says model_type {kind!r}: only {', '.join(FAMILIES)} (dense) can be converted"
        )
    if config.get("auto_map"):
        raise ConfigError(
            f"{what}: config.json asks for model code of its own (auto_map), which is never run: convert a plain {kind} model"
        )
    architectures = config.get("architectures") or [FAMILIES[kind].architecture]
    if architectures != [FAMILIES[kind].architecture]:
        raise ConfigError(
            f"{what}: config.json says architectures {architectures}: only {FAMILIES[kind].architecture} can be converted"
        )
    return FAMILIES[kind]


def _refuse_unsupported(config: Mapping[str, Any], what: str) -> None:
    if config.get("quantization_config"):
        raise ConfigError(
            f"{what}: the weights are quantized (quantization_config): convert the bf16, fp16 or fp32 original"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{what}: config.json says hidden_act {config['hidden_act']!r}: only silu (SwiGLU) is supported"
        )
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ConfigError(
                f"{what}: config.json says {name}, a bias that models here do not have"
            )
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise ConfigError(
            f"{what}: config.json says partial_rotary_factor {config['partial_rotary_factor']}: only 1 is supported"
        )


def _window(config: Mapping[str, Any], window: int | None, what: str) -> int | None:
    """The sliding window of all layers, None where no layer has one. ConfigError where only some have."""
    if config["model_type"] == "mistral":
        return window
    if config["model_type"] == "llama" or not config.get("use_sliding_window") or window is None:
        return None
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    full = (
        kinds.count("full_attention") if kinds else min(config.get("max_window_layers", 28), layers)
    )
    if 0 < full < layers:
        raise ConfigError(
            f"{what}: config.json gives a sliding window to {layers - full} of {layers} layers: only all or none are supported"
        )
    return window if full == 0 else None


def _rope(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Keys of the model section for the rotary embedding; both spellings of config.json (`rope_parameters` since transformers 5)."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = found.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{what}: config.json says partial_rotary_factor {found['partial_rotary_factor']}: only 1 is supported"
        )
    if kind == "default":
        return {"rope_base": base}
    if kind != "llama3":
        raise ConfigError(
            f'{what}: config.json asks for rotary scaling of type {kind!r}: only "default" and "llama3" are supported'
        )
    return {
        "rope_base": base,
        "rope_scaling_factor": found["factor"],
        "rope_low_frequency_factor": found["low_freq_factor"],
        "rope_high_frequency_factor": found["high_freq_factor"],
        "rope_original_length": found["original_max_position_embeddings"],
    }


def family_of(model: ModelSection) -> str:
    """The model_type that a model of ours is exported as. ConfigError where no family has its parts."""
    if model.qk_norm and model.qkv_bias:
        raise ConfigError(
            "no Hugging Face family has both model.qk_norm and model.qkv_bias: this model cannot be exported"
        )
    if model.mcore:
        raise ConfigError(
            f"the model sets model.mcore ({', '.join(model.mcore)}), which no Hugging Face family has: it cannot be exported"
        )
    if model.qk_norm:
        return "qwen3"
    if model.qkv_bias:
        return "qwen2"
    return "mistral" if model.sliding_window is not None else "llama"


def config_from_model(
    model: ModelSection,
    *,
    vocab_size: int,
    dtype: str,
    max_positions: int,
    special_ids: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The config.json of a model of ours. dtype: "float32", "bfloat16" or "float16"; special_ids: bos_token_id, eos_token_id."""
    kind = family_of(model)
    window = model.sliding_window
    config: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": head_dim(model),
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "max_position_embeddings": max_positions,
        "rope_theta": model.rope_base,
        "dtype": dtype,
        # Readers from before transformers 5 know these two names only.
        "torch_dtype": dtype,
        "rope_scaling": None,
        **(special_ids or {}),
    }
    if model.rope_scaling_factor != 1.0:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_frequency_factor,
            "high_freq_factor": model.rope_high_frequency_factor,
            "original_max_position_embeddings": model.rope_original_length,
        }
    if kind == "mistral":
        config["sliding_window"] = window
    elif kind != "llama":
        config |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window else model.num_layers,
        }
    if kind == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    return config

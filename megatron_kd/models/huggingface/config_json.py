"""Convert between a model section and Hugging Face's config.json.

config.json is read as data: no model code is imported or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.models.huggingface.families import FAMILIES, Family, family_of
from megatron_kd.models.huggingface.tensor_names import head_dim


def model_from_config(config: Mapping[str, Any], *, setting: str) -> ModelSection:
    """Return the model section that a config.json describes.

    Args:
        config: content of config.json.
        setting: beginning of error messages.

    Raises:
        ConfigError: the model is of no known family, or has parts that are not supported.
    """
    try:
        return _model_from_config(config, setting)
    except KeyError as error:
        raise ConfigError(f"{setting}: config.json lacks {error.args[0]}") from error
    except ValidationError as error:
        reason = "; ".join(map(_validation_message, error.errors()))
        raise ConfigError(f"{setting}: config.json describes no usable model ({reason})") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{setting}: config.json describes no usable model (a value has the wrong type: "
            f"{error})"
        ) from error


def _validation_message(error: Any) -> str:
    key, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _model_from_config(config: Mapping[str, Any], setting: str) -> ModelSection:
    family = _read_family(config, setting)
    _refuse_unsupported(config, setting)
    values = {**family.defaults, **config}
    heads = config["num_attention_heads"]
    return ModelSection.model_validate(
        {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_query_groups": values.get("num_key_value_heads", heads) or heads,
            "head_dim": values.get("head_dim"),
            "ffn_hidden_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "tied_embeddings": bool(values.get("tie_word_embeddings", False)),
            "qk_norm": family.qk_norm,
            "qkv_bias": family.qkv_bias,
            "norm_eps": values.get("rms_norm_eps"),
            "sliding_window": _read_window(config, family, setting),
            **_read_rope(config, setting),
        }
    )


def _read_family(config: Mapping[str, Any], setting: str) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{setting}: config.json says model_type {model_type!r}: only {', '.join(FAMILIES)} "
            "(dense) can be converted"
        )
    if config.get("auto_map"):
        raise ConfigError(
            f"{setting}: config.json asks for model code of its own (auto_map), which is never "
            f"run: convert a plain {model_type} model"
        )
    architecture = FAMILIES[model_type].architecture
    architectures = config.get("architectures") or [architecture]
    if architectures != [architecture]:
        raise ConfigError(
            f"{setting}: config.json says architectures {architectures}: only {architecture} can "
            "be converted"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(config: Mapping[str, Any], setting: str) -> None:
    if config.get("quantization_config"):
        raise ConfigError(
            f"{setting}: the weights are quantized (quantization_config): convert the bf16, fp16 "
            "or fp32 original"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{setting}: config.json says hidden_act {config['hidden_act']!r}: only silu (SwiGLU) "
            "is supported"
        )
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ConfigError(
                f"{setting}: config.json says {name}, a bias that models here do not have"
            )
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        _refuse_partial_rotary(config["partial_rotary_factor"], setting)


def _refuse_partial_rotary(factor: float, setting: str) -> None:
    raise ConfigError(
        f"{setting}: config.json says partial_rotary_factor {factor}: only 1 is supported"
    )


def _read_window(config: Mapping[str, Any], family: Family, setting: str) -> int | None:
    """Return the attention window of all layers, or None. Refuse a window of some layers."""
    window = {**family.defaults, **config}.get("sliding_window")
    if family.window == "always":
        return window
    if family.window == "none" or not config.get("use_sliding_window") or window is None:
        return None
    layers, layer_types = config["num_hidden_layers"], config.get("layer_types")
    if layer_types:
        without_window = layer_types.count("full_attention")
    else:
        without_window = min(config.get("max_window_layers", 28), layers)
    if 0 < without_window < layers:
        raise ConfigError(
            f"{setting}: config.json gives a sliding window to {layers - without_window} of "
            f"{layers} layers: only all or none are supported"
        )
    return window if without_window == 0 else None


def _read_rope(config: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Return the keys of the model section for the rotary embedding.

    config.json spells them `rope_scaling`, and since transformers 5 `rope_parameters`.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse_partial_rotary(rope["partial_rotary_factor"], setting)
    if rope_type == "default":
        return {"rope_base": base}
    if rope_type != "llama3":
        raise ConfigError(
            f"{setting}: config.json asks for rotary scaling of type {rope_type!r}: only "
            '"default" and "llama3" are supported'
        )
    return {
        "rope_base": base,
        "rope_scaling_factor": rope["factor"],
        "rope_low_frequency_factor": rope["low_freq_factor"],
        "rope_high_frequency_factor": rope["high_freq_factor"],
        "rope_original_length": rope["original_max_position_embeddings"],
    }


def config_from_model(
    model: ModelSection,
    *,
    vocab_size: int,
    dtype: str,
    max_positions: int,
    special_ids: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        model: the model section.
        vocab_size: true vocabulary size.
        dtype: "float32", "bfloat16" or "float16".
        max_positions: longest sequence, tokens.
        special_ids: such as bos_token_id and eos_token_id.

    Raises:
        ConfigError: no family has the parts of the model.
    """
    model_type = family_of(model)
    family = FAMILIES[model_type]
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
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
        # Programs from before transformers 5 know the following two names only.
        "torch_dtype": dtype,
        "rope_scaling": _rope_scaling(model),
        **(special_ids or {}),
        **_window_keys(model, family),
        **family.exported,
    }


def _rope_scaling(model: ModelSection) -> dict[str, Any] | None:
    if model.rope_scaling_factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_frequency_factor,
        "high_freq_factor": model.rope_high_frequency_factor,
        "original_max_position_embeddings": model.rope_original_length,
    }


def _window_keys(model: ModelSection, family: Family) -> dict[str, Any]:
    window = model.sliding_window
    if family.window == "none":
        return {}
    if family.window == "always":
        return {"sliding_window": window}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window else model.num_layers,
    }

"""Declare the Hugging Face model families that can be imported and exported.

A further Llama-like family is one entry of FAMILIES, and one of FAMILIES in
`tests/models/families.py`. `config_json.py` reads and writes config.json by these entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_kd.config import ConfigError, ModelSection


@dataclass(frozen=True)
class Family:
    """Declare the models of one model_type.

    Attributes:
        architecture: class in transformers, the entry of `architectures`.
        defaults: values of its configuration class for keys that config.json may leave out.
        qkv_bias: its query, key and value projections have a bias.
        qk_norm: it normalises queries and keys.
        window: attention window. "none": it has none. "always": sliding_window applies to all
            layers. "optional": use_sliding_window and layer_types or max_window_layers choose.
        exported: further keys of config.json on export.
    """

    architecture: str
    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "always", "optional"] = "none"
    exported: Mapping[str, Any] = field(default_factory=dict)

    def can_hold(self, model: ModelSection) -> bool:
        """Return True if the family has the parts of `model`, and no others."""
        if model.sliding_window is not None and self.window == "none":
            return False
        return (self.qkv_bias, self.qk_norm) == (model.qkv_bias, model.qk_norm)


# model_type -> family. Models are exported as the first family that can hold them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"rms_norm_eps": 1e-6},
        exported={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        window="always",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096},
        qkv_bias=True,
        window="optional",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        qk_norm=True,
        window="optional",
    ),
}


def family_of(model: ModelSection) -> str:
    """Return the model_type as which a model is exported.

    Raises:
        ConfigError: no family has the parts of the model.
    """
    candidates = [name for name, family in FAMILIES.items() if family.can_hold(model)]
    if not candidates:
        raise ConfigError(
            "no Hugging Face family has both model.qk_norm and model.qkv_bias: this model cannot "
            "be exported"
        )
    if model.mcore:
        raise ConfigError(
            f"the model sets model.mcore ({', '.join(model.mcore)}), which no Hugging Face family "
            "has: it cannot be exported"
        )
    return candidates[0]

"""Define known model shapes: `model.preset = "..."` in a run file fills the model section.

Keys that the run file sets itself override those of the preset. Sources:

* glm-330m to glm-6.8b: the students of arXiv 2410.16215, table 7, with GLM-4's vocabulary of
  151,552 ids, which gives the sizes that the paper states. The paper does not state rotary base
  and biases; these presets use a rotary base of 10,000 and no biases. glm-9b: GLM-4-9B.
* llama3-*: arXiv 2605.23857, Llama-3.1-style, with 32 query and 8 key/value heads of width 128 at
  every size. qwen3-0.15b, -0.3b and -1b: its Qwen3-style ablation.
* arXiv 2509.01649 states no sizes for its 8B teacher and 1B students. llama-3.1-8b and
  llama-3.2-1b are the nearest published models.
* llama-3.*: config.json of Llama 3.1 and 3.2, rotary scaling included. qwen3-0.6b to -8b:
  config.json of Qwen3.
"""

from __future__ import annotations

import difflib
from typing import Any

_GLM = {
    "vocab_size": 151_552,
    "tied_embeddings": False,
    "qk_norm": False,
    "norm_eps": 1e-5,
    "rope_base": 10_000.0,
}
_LLAMA = {
    "vocab_size": 128_256,
    "num_query_groups": 8,
    "tied_embeddings": False,
    "qk_norm": False,
    "norm_eps": 1e-5,
    "rope_base": 500_000.0,
}
_LLAMA3 = {**_LLAMA, "num_attention_heads": 32, "head_dim": 128}
_SCALED = {
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 4.0,
    "rope_original_length": 8192,
}
_QWEN3 = {
    "vocab_size": 151_936,
    "tied_embeddings": True,
    "qk_norm": True,
    "norm_eps": 1e-6,
    "rope_base": 1_000_000.0,
}


def _shape(
    hidden_size: int,
    num_layers: int,
    ffn_hidden_size: int,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """Return the keys that are not None."""
    values = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "head_dim": head_dim,
    }
    return {name: value for name, value in values.items() if value is not None}


PRESETS: dict[str, dict[str, Any]] = {
    "glm-330m": {**_GLM, **_shape(1024, 12, 4096, 16, 2, 64), "tied_embeddings": True},
    "glm-670m": {**_GLM, **_shape(1024, 24, 4096, 16, 2, 64)},
    "glm-1.9b": {**_GLM, **_shape(2048, 24, 6912, 16, 2, 128)},
    "glm-3.8b": {**_GLM, **_shape(3072, 28, 8192, 24, 8, 128)},
    "glm-6.8b": {**_GLM, **_shape(4096, 28, 12800, 32, 8, 128)},
    "glm-9b": {**_GLM, **_shape(4096, 40, 13696, 32, 2, 128), "qkv_bias": True},
    "llama3-0.7b": {**_LLAMA3, **_shape(1024, 12, 8192)},
    "llama3-1.7b": {**_LLAMA3, **_shape(2048, 16, 8192)},
    "llama3-3.8b": {**_LLAMA3, **_shape(3072, 28, 8192)},
    "llama3-8b": {**_LLAMA3, **_shape(4096, 32, 14336)},
    "llama-3.1-8b": {**_LLAMA3, **_SCALED, **_shape(4096, 32, 14336), "rope_scaling_factor": 8.0},
    "llama-3.2-1b": {
        **_LLAMA,
        **_SCALED,
        **_shape(2048, 16, 8192, 32, 8, 64),
        "tied_embeddings": True,
        "rope_scaling_factor": 32.0,
    },
    "llama-3.2-3b": {
        **_LLAMA,
        **_SCALED,
        **_shape(3072, 28, 8192, 24, 8, 128),
        "tied_embeddings": True,
        "rope_scaling_factor": 32.0,
    },
    "qwen3-0.15b": {**_QWEN3, **_shape(512, 20, 1536, 8, 4, 64)},
    "qwen3-0.3b": {**_QWEN3, **_shape(768, 24, 2304, 12, 4, 64)},
    "qwen3-0.6b": {**_QWEN3, **_shape(1024, 28, 3072, 16, 8, 128)},
    "qwen3-1b": {**_QWEN3, **_shape(1536, 28, 4608, 12, 4, 128)},
    "qwen3-1.7b": {**_QWEN3, **_shape(2048, 28, 6144, 16, 8, 128)},
    "qwen3-4b": {**_QWEN3, **_shape(2560, 36, 9728, 32, 8, 128)},
    "qwen3-8b": {**_QWEN3, **_shape(4096, 36, 12288, 32, 8, 128), "tied_embeddings": False},
}


def preset_values(name: str) -> dict[str, Any]:
    """Return the keys that a preset sets.

    Raises:
        ValueError: the preset is unknown; the message names the nearest one.
    """
    if name in PRESETS:
        return PRESETS[name]
    (nearest,) = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    raise ValueError(
        f'preset ("{name}") is not known: did you mean "{nearest}"? All: {", ".join(PRESETS)}'
    )

"""Known model shapes: `model.preset = "..."` in a run file fills the model section, and single keys override it.

Sources. glm-*: arXiv 2410.16215, table 7 (students), with GLM-4's vocabulary of 151,552 ids, which gives the sizes the paper names;
glm-9b: GLM-4-9B's own sizes. The paper does not say the students' rotary base and biases: rotary base 10,000, no biases here.
llama3-*: arXiv 2605.23857, Llama-3.1-style (32 query and 8 key/value heads of width 128 at every size). qwen3-0.15b, -0.3b, -1b: its
Qwen3-style ablation. arXiv 2509.01649 names an 8B teacher and 1B students without their sizes: llama-3.1-8b and llama-3.2-1b are
the nearest published ones. llama-3.*: config.json of Llama 3.1 and 3.2, rotary scaling included. qwen3-0.6b to -8b: config.json of Qwen3.
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
    hidden: int,
    layers: int,
    ffn: int,
    heads: int | None = None,
    groups: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    found = {"hidden_size": hidden, "num_layers": layers, "ffn_hidden_size": ffn}
    optional = {"num_attention_heads": heads, "num_query_groups": groups, "head_dim": width}
    return {**found, **{name: value for name, value in optional.items() if value is not None}}


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
    """The keys that a preset sets. ValueError, naming the nearest, for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    (near,) = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    raise ValueError(
        f'preset ("{name}") is not known: did you mean "{near}"? All: {", ".join(PRESETS)}'
    )

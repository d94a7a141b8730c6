"""Map the tensors of megatron-core to those of a Hugging Face folder.

All families of `families.py` use the same names, those of Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_kd.config import ModelSection


@dataclass(frozen=True)
class TensorMapping:
    """Map one tensor of megatron-core to the Hugging Face tensors that it is made of.

    Attributes:
        megatron_name: name in the checkpoint, without the number of the layer.
        huggingface_names: names in the folder, with {} for the number of the layer.
        kind: "copy": the same tensor. "vocabulary": one row per id, padded in the checkpoint.
            "gate_up": the Hugging Face tensors below each other. "qkv": the Hugging Face tensors
            interleaved; for each key/value head its query heads, the key and the value.
        condition: key of the model section that must be true for the tensor to exist, or with "!"
            in front false; None: it always exists.
    """

    megatron_name: str
    huggingface_names: tuple[str, ...]
    kind: Literal["copy", "vocabulary", "gate_up", "qkv"] = "copy"
    condition: str | None = None

    def exists_in(self, model: ModelSection) -> bool:
        """Return True if such a model has this tensor."""
        if self.condition is None:
            return True
        expected = not self.condition.startswith("!")
        return bool(getattr(model, self.condition.removeprefix("!"))) == expected


_ATTENTION, _MLP = "decoder.layers.self_attention", "decoder.layers.mlp"
_LAYER = "model.layers.{}"
_QKV = tuple(f"{_LAYER}.self_attn.{letter}_proj" for letter in "qkv")

_EMBEDDING = TensorMapping(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"
)
_FINAL_NORM = TensorMapping("decoder.final_layernorm.weight", ("model.norm.weight",))
_OUTPUT = TensorMapping(
    "output_layer.weight", ("lm_head.weight",), "vocabulary", condition="!tied_embeddings"
)
_LAYER_TENSORS = (
    TensorMapping(
        f"{_ATTENTION}.linear_qkv.layer_norm_weight", (f"{_LAYER}.input_layernorm.weight",)
    ),
    TensorMapping(
        f"{_ATTENTION}.linear_qkv.weight", tuple(f"{name}.weight" for name in _QKV), "qkv"
    ),
    TensorMapping(
        f"{_ATTENTION}.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV),
        "qkv",
        condition="qkv_bias",
    ),
    TensorMapping(
        f"{_ATTENTION}.q_layernorm.weight",
        (f"{_LAYER}.self_attn.q_norm.weight",),
        condition="qk_norm",
    ),
    TensorMapping(
        f"{_ATTENTION}.k_layernorm.weight",
        (f"{_LAYER}.self_attn.k_norm.weight",),
        condition="qk_norm",
    ),
    TensorMapping(f"{_ATTENTION}.linear_proj.weight", (f"{_LAYER}.self_attn.o_proj.weight",)),
    TensorMapping(
        f"{_MLP}.linear_fc1.layer_norm_weight", (f"{_LAYER}.post_attention_layernorm.weight",)
    ),
    TensorMapping(
        f"{_MLP}.linear_fc1.weight",
        (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        "gate_up",
    ),
    TensorMapping(f"{_MLP}.linear_fc2.weight", (f"{_LAYER}.mlp.down_proj.weight",)),
)
# Modules of megatron-core that store an empty extra state beside their weight, one per layer.
EXTRA_STATES = (
    f"{_ATTENTION}.linear_qkv",
    f"{_ATTENTION}.linear_proj",
    f"{_MLP}.linear_fc1",
    f"{_MLP}.linear_fc2",
)
# Tables in older exports that are functions of config.json.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def tensor_mappings(model: ModelSection) -> list[tuple[TensorMapping, int | None]]:
    """Return every tensor of the model with its layer, in the order of a forward pass.

    The layer is None for tensors outside the layers.
    """
    layers = [(mapping, layer) for layer in range(model.num_layers) for mapping in _LAYER_TENSORS]
    tensors = [(_EMBEDDING, None), *layers, (_FINAL_NORM, None), (_OUTPUT, None)]
    return [(mapping, layer) for mapping, layer in tensors if mapping.exists_in(model)]


def huggingface_names(mapping: TensorMapping, layer: int | None) -> list[str]:
    """Return the names of the tensors in the Hugging Face folder."""
    return [name.format(layer) for name in mapping.huggingface_names]


def head_dim(model: ModelSection) -> int:
    """Return the width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def huggingface_shapes(
    mapping: TensorMapping, model: ModelSection, vocab_size: int
) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors in the Hugging Face folder, in the order of their names."""
    hidden, width = model.hidden_size, head_dim(model)
    queries = model.num_attention_heads * width
    keys = (model.num_query_groups or model.num_attention_heads) * width
    if mapping.kind == "vocabulary":
        return [(vocab_size, hidden)]
    if mapping.kind == "gate_up":
        return [(model.ffn_hidden_size, hidden)] * 2
    if mapping.kind == "qkv":
        columns = () if mapping.megatron_name.endswith("bias") else (hidden,)
        return [(queries, *columns), (keys, *columns), (keys, *columns)]
    if mapping.megatron_name.endswith("linear_proj.weight"):
        return [(hidden, queries)]
    if mapping.megatron_name.endswith("linear_fc2.weight"):
        return [(hidden, model.ffn_hidden_size)]
    return [(width,) if mapping.condition == "qk_norm" else (hidden,)]

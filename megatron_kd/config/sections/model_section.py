"""Declare the [model] section of a run file."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_kd.config.presets import preset_values
from megatron_kd.config.sections.section import Section


class IndivisibleSize(NamedTuple):
    """Name a size of a model that a parallel layout cannot split evenly.

    Attributes:
        name: key of the model section.
        size: its value.
        axis: "tensor" or "pipeline".
        ranks: size of that axis, virtual pipeline stages included.
    """

    name: str
    size: int
    axis: str
    ranks: int


class ModelSection(Section):
    """Define the shape of the student: a Llama-style decoder.

    It has rotary positions (RoPE), RMSNorm, SwiGLU and grouped-query attention.
    """

    preset: str | None = None
    """Name of a known shape (tools/describe_model.py lists them). It sets all keys of this section
    that are not set otherwise, including the required ones.
    """
    hidden_size: int = Field(gt=0)
    """Width of the residual stream. A multiple of parallel.tensor."""
    num_layers: int = Field(gt=0)
    """Decoder layers. A multiple of parallel.pipeline * parallel.virtual_pipeline."""
    num_attention_heads: int = Field(gt=0)
    """Query heads. A multiple of parallel.tensor."""
    num_query_groups: int | None = Field(default=None, gt=0)
    """Key/value heads (grouped-query attention). Unset: as many as query heads."""
    head_dim: int | None = Field(default=None, gt=0)
    """Width of one attention head, an even number. Unset: hidden_size / num_attention_heads."""
    ffn_hidden_size: int = Field(gt=0)
    """Inner width of the SwiGLU block. A multiple of parallel.tensor."""
    vocab_size: int | None = Field(default=None, gt=1)
    """True vocabulary size, number of ids. Unset: the size of data.tokenizer."""
    vocab_size_multiple: int = Field(default=128, gt=0)
    """The vocabulary is padded to a multiple of this number, a multiple of parallel.tensor. The
    padded size does not depend on the layout, so that checkpoints load in any layout. Padding ids
    take no probability.
    """
    tied_embeddings: bool = False
    """Share the input embedding with the output head."""
    qk_norm: bool = False
    """Apply RMSNorm to queries and keys, per head (Qwen3)."""
    qkv_bias: bool = False
    """Add a bias to the query/key/value projection (Qwen2)."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary position embedding."""
    rope_scaling_factor: float = Field(default=1.0, ge=1)
    """Factor of Llama 3.1's scaling of rotary frequencies (models/rope.py): wavelengths above
    rope_original_length / rope_low_frequency_factor tokens are stretched by it. 1: no scaling.
    """
    rope_low_frequency_factor: float = Field(default=1.0, gt=0)
    """See rope_scaling_factor. Less than rope_high_frequency_factor."""
    rope_high_frequency_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below rope_original_length / rope_high_frequency_factor tokens are not scaled."""
    rope_original_length: int = Field(default=8192, gt=0)
    """Sequence length before the scaling, tokens; see rope_scaling_factor."""
    sliding_window: int | None = Field(default=None, gt=0)
    """Attention window with which the model was trained, tokens (Mistral 7B v0.1). This program
    does not apply a window, so batch.sequence_length must not exceed it. Unset: no limit.
    """
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights. Projections back into the residual stream use init_std
    / sqrt(2 * num_layers).
    """
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability after attention and MLP, in [0, 1)."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of attention weights, in [0, 1)."""
    recompute: Literal["none", "full"] = "none"
    """Activation recomputation in the backward pass. none: keep all activations. full: recompute
    every layer, which saves memory and costs one more forward pass.
    """
    mcore: dict[str, Any] = Field(default_factory=dict)
    """Further fields of megatron-core's TransformerConfig, passed through by name."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """Fill keys that are missing or null with the preset's values."""
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        explicit = {name: value for name, value in values.items() if value is not None}
        return {**preset_values(values["preset"]), **explicit}

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        groups = self.num_query_groups or self.num_attention_heads
        if self.num_attention_heads % groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_query_groups ({groups})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), or set head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f"head_dim ({head_dim}) must be even: rotary embedding rotates pairs of values"
            )
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        if low >= high:
            raise ValueError(
                f"rope_low_frequency_factor ({low}) must be below rope_high_frequency_factor "
                f"({high})"
            )
        return self

    def indivisible_sizes(self, *, tensor: int, stages: int) -> list[IndivisibleSize]:
        """Return the sizes that a layout cannot split evenly.

        Args:
            tensor: tensor-parallel size.
            stages: pipeline stages, virtual ones included.
        """
        groups = self.num_query_groups or self.num_attention_heads
        sizes = [
            IndivisibleSize("hidden_size", self.hidden_size, "tensor", tensor),
            IndivisibleSize("num_attention_heads", self.num_attention_heads, "tensor", tensor),
            IndivisibleSize("num_query_groups", groups, "tensor", tensor),
            IndivisibleSize("ffn_hidden_size", self.ffn_hidden_size, "tensor", tensor),
            IndivisibleSize("vocab_size_multiple", self.vocab_size_multiple, "tensor", tensor),
            IndivisibleSize("num_layers", self.num_layers, "pipeline", stages),
        ]
        return [size for size in sizes if size.size % size.ranks]

    def window_problem(self, sequence_length: int) -> str | None:
        """Return why sequences of this length cannot be used, as a clause; None if they can."""
        if self.sliding_window is None or sequence_length <= self.sliding_window:
            return None
        return (
            f"({sequence_length}) must be at most the model's sliding window "
            f"({self.sliding_window} tokens), which is not applied here"
        )

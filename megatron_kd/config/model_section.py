"""The model section of a run file, and what every section is made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_kd.config.presets import preset_values


class Section(BaseModel):
    """Base of every section: frozen, and a key that is not a field is an error.

    The message of a section's own check starts with the name of the field it is about, so that the section's name fits in front of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    """Shape of the student: a Llama-style decoder (RoPE, RMSNorm, SwiGLU, grouped-query attention)."""

    preset: str | None = Field(
        default=None,
        description="A known shape (listed by tools/describe_model.py): gives all keys of this section that are not set, the required "
        "ones too.",
    )
    hidden_size: int = Field(
        gt=0, description="Width of the residual stream. Multiple of parallel.tensor."
    )
    num_layers: int = Field(
        gt=0,
        description="Decoder layers. Divides by parallel.pipeline * parallel.virtual_pipeline.",
    )
    num_attention_heads: int = Field(gt=0, description="Query heads. Multiple of parallel.tensor.")
    num_query_groups: int | None = Field(
        default=None,
        gt=0,
        description="Key/value heads (grouped-query attention). Unset: as many as query heads.",
    )
    head_dim: int | None = Field(
        default=None,
        gt=0,
        description="Width of one head, even. Unset: hidden_size / num_attention_heads.",
    )
    ffn_hidden_size: int = Field(
        gt=0, description="Inner width of the SwiGLU block. Multiple of parallel.tensor."
    )
    vocab_size: int | None = Field(
        default=None, gt=1, description="True vocabulary size (ids). Unset: that of data.tokenizer."
    )
    vocab_size_multiple: int = Field(
        default=128,
        gt=0,
        description="The vocabulary is padded to a multiple of this (never to one of the layout, so checkpoints move between layouts). "
        "Padding ids take no probability.",
    )
    tied_embeddings: bool = Field(
        default=False, description="Share the input embedding with the output head."
    )
    qk_norm: bool = Field(
        default=False, description="RMSNorm on queries and keys, per head (Qwen3)."
    )
    qkv_bias: bool = Field(
        default=False, description="Bias on the query/key/value projection (Qwen2)."
    )
    norm_eps: float = Field(default=1e-5, gt=0, description="Epsilon of RMSNorm.")
    rope_base: float = Field(
        default=10000.0, gt=1, description="Base of the rotary position embedding."
    )
    rope_scaling_factor: float = Field(
        default=1.0,
        ge=1,
        description="Llama 3.1's scaling of rotary frequencies (models/rope.py): wavelengths beyond rope_original_length / "
        "rope_low_frequency_factor tokens are stretched by this. 1: no scaling.",
    )
    rope_low_frequency_factor: float = Field(
        default=1.0, gt=0, description="Below rope_high_frequency_factor; see rope_scaling_factor."
    )
    rope_high_frequency_factor: float = Field(
        default=4.0,
        gt=0,
        description="Wavelengths below rope_original_length / rope_high_frequency_factor tokens stay as they are.",
    )
    rope_original_length: int = Field(
        default=8192,
        gt=0,
        description="Tokens per sequence before the scaling; see rope_scaling_factor.",
    )
    sliding_window: int | None = Field(
        default=None,
        gt=0,
        description="The model was trained to see only this many tokens back (Mistral 7B v0.1). No window is applied here, so sequences "
        "must not be longer. Unset: all.",
    )
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of initial weights; output projections use init_std / sqrt(2 * num_layers).",
    )
    hidden_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout after attention and MLP, probability in [0, 1).",
    )
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on attention weights, probability in [0, 1)."
    )
    recompute: Literal["none", "full"] = Field(
        default="none",
        description="Activation recomputation in the backward pass: none, or every layer (saves memory, costs a forward).",
    )
    mcore: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of megatron-core's TransformerConfig, passed through by name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """A preset's values under the given ones; a key set to null is the preset's, as one that is left out."""
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
            return given
        return {
            **preset_values(given["preset"]),
            **{name: value for name, value in given.items() if value is not None},
        }

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        groups = self.num_query_groups or self.num_attention_heads
        if self.num_attention_heads % groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_query_groups ({groups})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({self.num_attention_heads}), or set head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(f"head_dim ({head_dim}) must be even: rotary embedding turns pairs")
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        if low >= high:
            raise ValueError(
                f"rope_low_frequency_factor ({low}) must be below rope_high_frequency_factor ({high})"
            )
        return self

    def not_divisible(self, *, tensor: int, stages: int) -> list[tuple[str, int, str, int]]:
        """What these sizes cannot cut evenly: (name, size, "tensor" or "pipeline", that size). stages: virtual ones included."""
        cut = [
            ("hidden_size", self.hidden_size, "tensor", tensor),
            ("num_attention_heads", self.num_attention_heads, "tensor", tensor),
            (
                "num_query_groups",
                self.num_query_groups or self.num_attention_heads,
                "tensor",
                tensor,
            ),
            ("ffn_hidden_size", self.ffn_hidden_size, "tensor", tensor),
            ("vocab_size_multiple", self.vocab_size_multiple, "tensor", tensor),
            ("num_layers", self.num_layers, "pipeline", stages),
        ]
        return [each for each in cut if each[1] % each[3]]

    def window_problem(self, sequence_length: int) -> str | None:
        """Why sequences of this length cannot be used, as a clause; None where they can."""
        if self.sliding_window is None or sequence_length <= self.sliding_window:
            return None
        return f"({sequence_length}) must be at most the model's sliding window ({self.sliding_window} tokens), which is not applied here"

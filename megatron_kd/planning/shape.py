"""A model cut for one rank: its widths, and the bytes of what a microbatch leaves behind in it.

Read off the saved tensors of a layer of megatron-core's local modules on a CPU, where norms and SwiGLU are not fused; on a GPU as fused
(torch's fused RMSNorm or Transformer Engine's, megatron-core's fused SwiGLU), after arXiv 2205.05198, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config import ModelSection
from megatron_kd.parallel.vocab_shards import padded_vocab_size

ELEMENT = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Shape:
    """Widths of one rank and bytes of one microbatch.

    hidden: H whole. queries, keys, ffn, heads: on this rank. tensor: ranks that share a layer. sequence_split: ranks that share the
    sequence outside of it. tokens: of a microbatch. element: bytes of a number. vocabulary_rows: on this rank, padding included.
    """

    hidden: int
    queries: float
    keys: float
    ffn: float
    heads: float
    head_dim: int
    grouped: bool
    qk_norm: bool
    tensor: int
    sequence_split: int
    tokens: int
    sequence_length: int
    element: int
    vocabulary_rows: int
    device: str
    within_documents: bool

    @property
    def layer_input(self) -> float:
        """The residual stream on this rank."""
        return self.element * self.tokens * self.hidden / self.sequence_split

    @property
    def layer(self) -> float:
        """What one layer keeps for its backward: inputs of norms, their outputs, attention, MLP, rotary tables, logsumexps.

        On a CPU a norm keeps its scaled input too, and SwiGLU both halves apart, activated and multiplied. Attention keeps queries and
        keys as turned, values, and its output; values are a view of the whole projection unless grouped heads are repeated (CPU).
        """
        cuda = self.device == "cuda"
        # In bf16 a norm that is not fused keeps its input and its scaled input in fp32.
        norms = (4 if cuda else 6 if self.element == 4 else 10) * self.hidden / self.sequence_split
        projection = self.queries + 2 * self.keys
        attention = (
            2 * self.queries + self.keys + projection
            if cuda or not self.grouped
            else 4 * self.queries
        )
        if self.qk_norm:
            attention += (
                self.queries
                if cuda
                else 2 * self.queries + self.keys + (projection if self.grouped else 0)
            )
        mlp = (3 if cuda else 5) * self.ffn
        numbers = self.tokens * (norms + attention + mlp) + 4 * self.sequence_length * self.head_dim
        if self.within_documents:  # the mask as it is added to the scores
            numbers += self.tokens * self.sequence_length
        return self.element * numbers + 4 * self.tokens * self.heads

    @property
    def layer_backward(self) -> float:
        """Gradients that exist at one time beside what the layers keep: of the residual stream, and of SwiGLU's two factors."""
        return self.layer_input + 2 * self.element * self.tokens * self.ffn

    @property
    def layer_forward(self) -> float:
        """What lives at one time in a forward pass that keeps nothing: residual, normalised input, and the MLP or attention."""
        mlp = (3 if self.device == "cuda" else 5) * self.ffn
        attention = 4 * self.queries + 4 * self.keys
        return 2 * self.layer_input + self.element * self.tokens * max(mlp, attention)

    @property
    def final_norm(self) -> float:
        """Input and output of the norm in front of the head (scaled input too on a CPU)."""
        return (2 if self.device == "cuda" else 3) * self.layer_input

    @property
    def rotary(self) -> float:
        """Angles of a microbatch, fp32, and the mask of its documents."""
        mask = self.tokens * self.sequence_length if self.within_documents else 0
        return 4.0 * self.sequence_length * self.head_dim + mask

    @property
    def gathered(self) -> float:
        """The sequence put together for a product, under sequence parallelism."""
        return float(self.element * self.tokens * self.hidden) if self.sequence_split > 1 else 0.0


def shape_of(
    model: ModelSection,
    vocab_size: int,
    *,
    tensor: int,
    sequence_parallel: bool,
    micro_batch_size: int,
    sequence_length: int,
    precision: str,
    device: str,
    within_documents: bool = False,
) -> Shape:
    """One rank's part of `model` in a microbatch of micro_batch_size sequences."""
    width = model.head_dim or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return Shape(
        hidden=model.hidden_size,
        queries=model.num_attention_heads * width / tensor,
        keys=groups * width / tensor,
        ffn=model.ffn_hidden_size / tensor,
        heads=model.num_attention_heads / tensor,
        head_dim=width,
        grouped=groups < model.num_attention_heads,
        qk_norm=model.qk_norm,
        tensor=tensor,
        sequence_split=tensor if sequence_parallel else 1,
        tokens=micro_batch_size * sequence_length,
        sequence_length=sequence_length,
        element=ELEMENT[precision],
        vocabulary_rows=padded_vocab_size(vocab_size, model.vocab_size_multiple) // tensor,
        device=device,
        within_documents=within_documents,
    )


def microbatches_in_flight(pipeline: int, virtual: int, stage: int, microbatches: int) -> int:
    """Forward passes of model chunks of a stage whose backward is still to come, at most: megatron-core's warm-up and one.

    1F1B: pipeline - stage. Interleaved: 2 (pipeline - stage - 1) + (virtual - 1) pipeline + 1 (arXiv 2104.04473, section 2.2).
    """
    if virtual == 1:
        return min(pipeline - stage, microbatches)
    return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, microbatches * virtual)

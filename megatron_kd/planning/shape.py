"""Describe the part of a model on one rank and the bytes that a microbatch keeps in it.

The sizes were read off the saved tensors of a layer of megatron-core's local modules on a CPU,
where norms and SwiGLU are not fused. On a GPU these are assumed to be fused (torch's fused RMSNorm
or Transformer Engine's, megatron-core's fused SwiGLU), after arXiv 2205.05198, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config import ModelSection
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.planning.parameters import head_width, key_width, query_width

ELEMENT_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class MicrobatchLayout:
    """Describe how a microbatch is laid out over tensor-parallel ranks.

    Attributes:
        tensor: tensor-parallel size.
        sequence_parallel: the sequence is split over the tensor-parallel ranks outside of layers.
        micro_batch_size: sequences of the microbatch.
        sequence_length: tokens per sequence.
        precision: "bf16" or "fp32".
        device: "cuda" or "cpu".
        within_documents: attention is masked at document boundaries.
    """

    tensor: int
    sequence_parallel: bool
    micro_batch_size: int
    sequence_length: int
    precision: str
    device: str
    within_documents: bool = False


@dataclass(frozen=True)
class RankShape:
    """Hold the widths of one rank, from which the bytes of one microbatch follow.

    Attributes:
        hidden: the full hidden size.
        queries: width of the queries on this rank; likewise keys, ffn and heads.
        grouped: several query heads share a key head.
        tensor: ranks that share a layer.
        sequence_split: ranks that share the sequence outside of layers.
        tokens: tokens of a microbatch.
        element_bytes: bytes of one number.
        vocabulary_rows: rows of the vocabulary on this rank, padding included.
        device: "cuda" or "cpu".
        within_documents: attention is masked at document boundaries.
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
    element_bytes: int
    vocabulary_rows: int
    device: str
    within_documents: bool

    @property
    def layer_input(self) -> float:
        """Return the bytes of the residual stream on this rank."""
        return self.element_bytes * self.tokens * self.hidden / self.sequence_split

    @property
    def layer(self) -> float:
        """Return the bytes that one layer keeps for its backward pass.

        These are the inputs and outputs of norms, attention, MLP, rotary tables and logsumexps.
        On a CPU a norm also keeps its scaled input, and SwiGLU keeps both halves separately,
        activated and multiplied. Attention keeps queries and keys after the rotary embedding,
        the values, and its output. The values are a view of the whole projection unless grouped
        heads are repeated, which happens on a CPU.
        """
        cuda = self.device == "cuda"
        # In bf16 an unfused norm keeps its input and its scaled input in fp32.
        norm_copies = 4 if cuda else 6 if self.element_bytes == 4 else 10
        norms = norm_copies * self.hidden / self.sequence_split
        mlp = (3 if cuda else 5) * self.ffn
        numbers = self.tokens * (norms + self._attention_width() + mlp)
        numbers += 4 * self.sequence_length * self.head_dim
        if self.within_documents:  # the mask as it is added to the scores
            numbers += self.tokens * self.sequence_length
        return self.element_bytes * numbers + 4 * self.tokens * self.heads

    def _attention_width(self) -> float:
        """Return the numbers that attention keeps for one token."""
        cuda = self.device == "cuda"
        projection = self.queries + 2 * self.keys
        if cuda or not self.grouped:
            width = 2 * self.queries + self.keys + projection
        else:
            width = 4 * self.queries
        if self.qk_norm and cuda:
            width += self.queries
        elif self.qk_norm:
            width += 2 * self.queries + self.keys + (projection if self.grouped else 0)
        return width

    @property
    def layer_backward(self) -> float:
        """Return the bytes of the gradients that exist at one time in the backward of a layer.

        They come beside what the layers keep: the gradient of the residual stream, and those of
        SwiGLU's two factors.
        """
        return self.layer_input + 2 * self.element_bytes * self.tokens * self.ffn

    @property
    def layer_forward(self) -> float:
        """Return the bytes that exist at one time in a forward pass that keeps nothing.

        These are the residual stream, the normalised input, and the MLP or the attention.
        """
        mlp = (3 if self.device == "cuda" else 5) * self.ffn
        attention = 4 * self.queries + 4 * self.keys
        return 2 * self.layer_input + self.element_bytes * self.tokens * max(mlp, attention)

    @property
    def final_norm(self) -> float:
        """Return the bytes of input and output of the final norm (scaled input too on a CPU)."""
        return (2 if self.device == "cuda" else 3) * self.layer_input

    @property
    def rotary(self) -> float:
        """Return the bytes of a microbatch's rotary angles, fp32, and of its document mask."""
        mask = self.tokens * self.sequence_length if self.within_documents else 0
        return 4.0 * self.sequence_length * self.head_dim + mask

    @property
    def gathered(self) -> float:
        """Return the bytes of the sequence gathered for a product under sequence parallelism."""
        if self.sequence_split == 1:
            return 0.0
        return float(self.element_bytes * self.tokens * self.hidden)


def shape_of(model: ModelSection, vocab_size: int, layout: MicrobatchLayout) -> RankShape:
    """Return one rank's part of `model` for a microbatch.

    Args:
        model: shape of the whole model.
        vocab_size: true vocabulary size, without padding.
        layout: layout of the microbatch.
    """
    tensor = layout.tensor
    padded = padded_vocab_size(vocab_size, model.vocab_size_multiple)
    return RankShape(
        hidden=model.hidden_size,
        queries=query_width(model) / tensor,
        keys=key_width(model) / tensor,
        ffn=model.ffn_hidden_size / tensor,
        heads=model.num_attention_heads / tensor,
        head_dim=head_width(model),
        grouped=key_width(model) < query_width(model),
        qk_norm=model.qk_norm,
        tensor=tensor,
        sequence_split=tensor if layout.sequence_parallel else 1,
        tokens=layout.micro_batch_size * layout.sequence_length,
        sequence_length=layout.sequence_length,
        element_bytes=ELEMENT_BYTES[layout.precision],
        vocabulary_rows=padded // tensor,
        device=layout.device,
        within_documents=layout.within_documents,
    )


def microbatches_in_flight(pipeline: int, virtual: int, stage: int, microbatches: int) -> int:
    """Return the largest number of a stage's forward passes whose backward is still to come.

    That is megatron-core's warm-up and one more. 1F1B: pipeline - stage. Interleaved:
    2 (pipeline - stage - 1) + (virtual - 1) pipeline + 1 (arXiv 2104.04473, section 2.2).

    Args:
        pipeline: pipeline-parallel size.
        virtual: model chunks of each stage.
        stage: index of the stage.
        microbatches: microbatches of a step.
    """
    if virtual == 1:
        return min(pipeline - stage, microbatches)
    warm_up = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline
    return min(warm_up + 1, microbatches * virtual)

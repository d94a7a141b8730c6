"""Build a GPT as the chunks of this rank, with an output layer that returns hidden states."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_kd.config import ModelSection
from megatron_kd.models.rope import scale_rotary
from megatron_kd.models.specs import block_spec
from megatron_kd.parallel.groups import Groups
from megatron_kd.parallel.vocab_shards import padded_vocab_size


class HiddenStatesOutput(ColumnParallelLinear):
    """Hold the output weight of a ColumnParallelLinear, but return the hidden states.

    The loss multiplies by the weight itself, in chunks. Sharding, tied embeddings, checkpoints, the
    buffer of the weight's gradient and the hooks that gather updated weights are those of
    megatron-core.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Return the hidden states [S, B, H] as [B, S, H].

        GPTModel transposes what it takes for logits [S, B, V], so hidden states come out as
        [S, B, H].
        """
        return input_.transpose(0, 1), None


def build_chunks(
    model: ModelSection,
    config: TransformerConfig,
    groups: Groups,
    *,
    vocab_size: int,
    sequence_length: int,
    within_documents: bool = False,
) -> list[GPTModel]:
    """Return this rank's chunks, one per virtual pipeline stage, uninitialised. No collective.

    Args:
        model: shape of the model.
        config: its TransformerConfig, which sets the type of the weights.
        groups: process groups of the layout; the weights are on their platform's device.
        vocab_size: true vocabulary size.
        sequence_length: tokens per sequence.
        within_documents: True if layers take the mask of `Microbatch.attention_mask`.
    """
    virtual_stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual_stages or 1):
        is_last = groups.is_last_stage and stage == (virtual_stages or 1) - 1
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(
                config, groups.platform, within_documents=within_documents
            ),
            vocab_size=padded_vocab_size(vocab_size, model.vocab_size_multiple),
            max_sequence_length=sequence_length,
            pre_process=groups.pipeline_rank == 0 and stage == 0,
            post_process=is_last,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
            pg_collection=groups.collection,
            vp_stage=stage if virtual_stages else None,
        )
        if is_last:
            chunk.output_layer = _hidden_states_output(chunk, config, groups)
        scale_rotary(chunk, model)
        chunks.append(chunk.to(device=groups.platform.device, dtype=config.params_dtype))
    return chunks


def _hidden_states_output(
    chunk: GPTModel, config: TransformerConfig, groups: Groups
) -> HiddenStatesOutput:
    """Return a replacement of the chunk's output layer that keeps its weight."""
    logits_layer = chunk.output_layer
    hidden_states_layer = HiddenStatesOutput(
        config.hidden_size,
        logits_layer.output_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_weight_param_allocation=True,
        tp_group=groups.collection.tp,
    )
    if logits_layer.weight is not None:
        hidden_states_layer.weight = logits_layer.weight
    return hidden_states_layer


def output_weight(chunk: GPTModel) -> Tensor:
    """Return the weight [V/tp, H] that the loss multiplies by.

    It is the embedding's weight if the two are tied and lie on one stage.
    """
    tied = chunk.share_embeddings_and_output_weights
    weight: Tensor = (
        chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    )
    return weight

"""A GPT as the chunks of this rank: built from specs, with an output layer that hands hidden states on to the loss."""

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
    """Holds the output weight like any ColumnParallelLinear, but hands the hidden states on: the loss multiplies by the
    weight itself, in chunks. Sharding, tied embeddings, checkpoints, the weight's gradient buffer and the hooks that gather
    updated weights stay megatron-core's own.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:  # noqa: D102
        # GPTModel turns what it takes for logits from [S, B, V] to [B, S, V]: turned first, hidden states leave as they came.
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
    """This rank's chunks (one, or one per virtual stage), uninitialised, on the platform's device, in the config's type.

    within_documents: layers take the mask of `Microbatch.attention_mask`.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        first = groups.pipeline_rank == 0 and stage == 0
        last = groups.is_last_stage and stage == (virtual or 1) - 1
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(
                config, groups.platform, within_documents=within_documents
            ),
            vocab_size=padded_vocab_size(vocab_size, model.vocab_size_multiple),
            max_sequence_length=sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
            pg_collection=groups.collection,
            vp_stage=stage if virtual else None,
        )
        if last:
            chunk.output_layer = _hidden_states_output(chunk, config, groups)
        scale_rotary(chunk, model)
        chunks.append(chunk.to(device=groups.platform.device, dtype=config.params_dtype))
    return chunks


def _hidden_states_output(
    chunk: GPTModel, config: TransformerConfig, groups: Groups
) -> HiddenStatesOutput:
    old = chunk.output_layer
    new = HiddenStatesOutput(
        config.hidden_size,
        old.output_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_weight_param_allocation=True,
        tp_group=groups.collection.tp,
    )
    if old.weight is not None:
        new.weight = old.weight
    return new


def output_weight(chunk: GPTModel) -> Tensor:
    """[V/tp, H], the weight that the loss multiplies by; the embedding's own where the two are tied on one stage."""
    tied = chunk.share_embeddings_and_output_weights
    weight: Tensor = (
        chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    )
    return weight

"""How many bytes a run takes on each rank: exact for weights, gradients and optimizer state, an estimate for activations.

Of a pipeline the fullest stage counts. Not counted: the framework itself, communication buffers, fragmentation, the output head's
chunk of logits, and the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config.hidden_state_pairs import projections_of
from megatron_kd.config.run_config import RunConfig
from megatron_kd.config.sections import ModelSection
from megatron_kd.parallel.pipeline_stages import stage_of_layer
from megatron_kd.parallel.vocab_shards import padded_vocab_size

_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. stage: pipeline stage. optimizer: fp32 main weights (bf16 training) and Adam's two moments.

    hidden_states: what distill.hidden_states keeps; its projections are among the parameters.
    """

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int
    hidden_states: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.teacher
            + self.hidden_states
        )


def rank_parameters(
    model: ModelSection, vocab_size: int, *, tensor: int, pipeline: int, stage: int
) -> int:
    """Weights that one rank of a pipeline stage holds, padding rows of the vocabulary included. Norms are on every tensor rank."""
    width = model.head_dim or model.hidden_size // model.num_attention_heads
    queries, keys = (
        model.num_attention_heads * width,
        (model.num_query_groups or model.num_attention_heads) * width,
    )
    matrices = (
        model.hidden_size * (2 * queries + 2 * keys) + 3 * model.hidden_size * model.ffn_hidden_size
    )
    biases = queries + 2 * keys if model.qkv_bias else 0
    layer = (
        (matrices + biases) // tensor + 2 * model.hidden_size + (2 * width if model.qk_norm else 0)
    )
    table = padded_vocab_size(vocab_size, model.vocab_size_multiple) // tensor * model.hidden_size
    first, last = stage == 0, stage == pipeline - 1
    # A tied head on another stage than the embedding is a copy of it.
    tables = int(first) + int(last and not (first and model.tied_embeddings))
    return (
        model.num_layers // pipeline * layer + tables * table + (model.hidden_size if last else 0)
    )


def activation_bytes(config: RunConfig, *, stage: int, num_microbatches: int) -> int:
    """What is kept for the backward pass at the fullest moment of 1F1B, in the layers of one stage.

    Per token and layer, with attention that keeps no scores: input and output of two norms (4 H), query and attention output
    (2 Q), key and value (2 K), gate, up and their product (3 F); Q, K and F split over the tensor group, H only under sequence
    parallelism. With full recomputation: each layer's input, and one layer in full. After Korthikanti et al., arXiv 2205.05198.
    """
    model, parallel = config.model, config.parallel
    width = model.head_dim or model.hidden_size // model.num_attention_heads
    queries, keys = (
        model.num_attention_heads * width,
        (model.num_query_groups or model.num_attention_heads) * width,
    )
    split = parallel.tensor if parallel.sequence_parallel else 1
    full = (
        4 * model.hidden_size / split
        + (2 * queries + 2 * keys + 3 * model.ffn_hidden_size) / parallel.tensor
    )
    layers = model.num_layers // parallel.pipeline
    tokens = config.batch.micro_batch_size * config.batch.sequence_length
    in_flight = min(parallel.pipeline - stage, num_microbatches)
    per_token = layers * full * in_flight
    if model.recompute == "full":
        per_token = layers * in_flight * model.hidden_size / split + full
    return int(tokens * per_token * _BYTES[config.train.precision])


def hidden_states_bytes(
    config: RunConfig, teacher: ModelSection, *, stage: int, num_microbatches: int
) -> tuple[int, int]:
    """(entries of the projections on a stage, bytes that its pairs of distill.hidden_states keep).

    Kept: the teacher's states of the whole step for each teacher layer, and a gradient for each student layer and microbatch in flight.
    Not counted: a second copy of the states while they go to another stage, and the fp32 copies of one pair of one microbatch.
    """
    model, parallel, batch = config.model, config.parallel, config.batch
    split = parallel.tensor if parallel.sequence_parallel else 1
    layout = {"pipeline": parallel.pipeline, "virtual": parallel.virtual_pipeline}
    pairs = [
        pair
        for pair in config.distill.hidden_states
        if stage_of_layer(pair.student_layer, model.num_layers, **layout) == stage
    ]
    states = num_microbatches * len({pair.teacher_layer for pair in pairs}) * teacher.hidden_size
    gradients = (
        min(parallel.pipeline - stage, num_microbatches)
        * len({pair.student_layer for pair in pairs})
        * model.hidden_size
    )
    tokens = batch.micro_batch_size * batch.sequence_length // split
    entries = sum(
        model.hidden_size * each.teacher_width for each in projections_of(pairs, model, teacher)
    )
    return entries, tokens * (states + gradients) * _BYTES[config.train.precision]


def run_memory(
    config: RunConfig, vocab_size: int, *, world_size: int, teacher: ModelSection | None = None
) -> list[RankMemory]:
    """One entry per pipeline stage. ConfigError where `world_size` does not fit the layout."""
    parallel, precision = config.parallel, config.train.precision
    data, microbatches = config.data_parallel_size(world_size), config.num_microbatches(world_size)
    states = 2 + (precision == "bf16")
    found = []
    for stage in range(parallel.pipeline):
        place = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "stage": stage}
        count, hidden_states = rank_parameters(config.model, vocab_size, **place), 0
        if teacher is not None:
            projections, hidden_states = hidden_states_bytes(
                config, teacher, stage=stage, num_microbatches=microbatches
            )
            count += projections
        found.append(
            RankMemory(
                stage=stage,
                parameters=count,
                weights=count * _BYTES[precision],
                gradients=count * 4,
                optimizer=4
                * states
                * (-(-count // data) if config.optimizer.distributed else count),
                activations=activation_bytes(config, stage=stage, num_microbatches=microbatches),
                teacher=0
                if teacher is None
                else rank_parameters(teacher, vocab_size, **place) * _BYTES[precision],
                hidden_states=hidden_states,
            )
        )
    return found

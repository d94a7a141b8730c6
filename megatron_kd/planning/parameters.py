"""Count the parameters of a decoder, in total and on one rank."""

from __future__ import annotations

from megatron_kd.config import ModelSection
from megatron_kd.parallel.vocab_shards import padded_vocab_size


def head_width(model: ModelSection) -> int:
    """Return the width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def query_width(model: ModelSection) -> int:
    """Return the width of all query heads together."""
    return model.num_attention_heads * head_width(model)


def key_width(model: ModelSection) -> int:
    """Return the width of all key heads together, which is also that of the values."""
    return (model.num_query_groups or model.num_attention_heads) * head_width(model)


def layer_matrix_entries(model: ModelSection) -> int:
    """Return the entries of one layer's matrices: attention projections and SwiGLU."""
    attention = model.hidden_size * (2 * query_width(model) + 2 * key_width(model))
    return attention + 3 * model.hidden_size * model.ffn_hidden_size


def parameter_count(model: ModelSection, vocab_size: int) -> int:
    """Return the number of weights of the model, embeddings included.

    Args:
        model: shape of the model.
        vocab_size: number of embedding rows; the true vocabulary size leaves padding rows out.
    """
    hidden, layers = model.hidden_size, model.num_layers
    norms = (2 * layers + 1) * hidden
    if model.qk_norm:
        norms += 2 * layers * head_width(model)
    biases = layers * (query_width(model) + 2 * key_width(model)) if model.qkv_bias else 0
    embeddings = vocab_size * hidden * (1 if model.tied_embeddings else 2)
    return layers * layer_matrix_entries(model) + norms + biases + embeddings


def parameter_counts(model: ModelSection, vocab_size: int) -> dict[str, int]:
    """Return the keys total, embeddings and without_embeddings."""
    total = parameter_count(model, vocab_size)
    embeddings = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return {"total": total, "embeddings": embeddings, "without_embeddings": total - embeddings}


def rank_parameters(
    model: ModelSection, vocab_size: int, *, tensor: int, pipeline: int, stage: int
) -> int:
    """Return the number of weights on one rank of a pipeline stage.

    Padding rows of the vocabulary are counted. Norms are on every tensor-parallel rank.

    Args:
        model: shape of the model.
        vocab_size: true vocabulary size, without padding.
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size; it divides the number of layers.
        stage: index of the pipeline stage.
    """
    biases = query_width(model) + 2 * key_width(model) if model.qkv_bias else 0
    sharded = (layer_matrix_entries(model) + biases) // tensor
    norms = 2 * model.hidden_size + (2 * head_width(model) if model.qk_norm else 0)
    table = padded_vocab_size(vocab_size, model.vocab_size_multiple) // tensor * model.hidden_size
    is_first, is_last = stage == 0, stage == pipeline - 1
    # A tied head on another stage than the embedding is a copy of it.
    num_tables = int(is_first) + int(is_last and not (is_first and model.tied_embeddings))
    final_norm = model.hidden_size if is_last else 0
    return model.num_layers // pipeline * (sharded + norms) + num_tables * table + final_norm

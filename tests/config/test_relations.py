"""Refuse values that do not fit together, first within a section, then between sections."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_kd.config import ConfigError, RunConfig

Load = Callable[..., RunConfig]

RELATIONS = {
    "--model.num_query_groups=3": (
        "model.num_attention_heads (4) must be a multiple of num_query_groups (3)"
    ),
    "--model.num_attention_heads=3": (
        "model.hidden_size (64) must be a multiple of num_attention_heads (3), or set head_dim"
    ),
    "--model.head_dim=3": (
        "model.head_dim (3) must be even: rotary embedding rotates pairs of values"
    ),
    "--model.num_attention_heads=64": (
        "model.head_dim (1) must be even: rotary embedding rotates pairs of values"
    ),
    "--teacher.source=online": 'teacher.source = "online" needs teacher.checkpoint',
    "--distill.min_k=65": "distill.min_k (65) must be at most top_k (64)",
    "--distill.num_draws=5 --distill.top_k=8": (
        "distill.num_draws draws at random: leave top_k, top_p and min_k unset, or unset num_draws"
    ),
    "--distill.dense=true --distill.num_draws=5": (
        "distill.dense compares whole distributions: leave top_k, top_p, min_k, truncate, "
        "num_draws and tail unset"
    ),
    "--distill.dense=true --distill.top_k=63": (
        "distill.dense compares whole distributions: leave top_k, top_p, min_k, truncate, "
        "num_draws and tail unset"
    ),
    "--distill.dense=true --distill.tail=bucket": (
        "distill.dense compares whole distributions: leave top_k, top_p, min_k, truncate, "
        "num_draws and tail unset"
    ),
    "--distill.dense=true --distill.head_schedule=recompute": (
        'distill.dense cannot be served by head_schedule = "recompute": the teacher\'s logits '
        "exist once"
    ),
    "--distill.divergence=mse_logits": (
        'distill.divergence = "mse_logits" compares the logits of all ids: it needs the dense '
        "teacher, not a sparse target (dense = true)"
    ),
    "--distill.divergence=reverse_kl": (
        'distill.divergence = "reverse_kl" with tail = "renormalize" is infinite, because the '
        "teacher's probability outside "
        'the kept ids is 0: use tail = "bucket", or the dense teacher (dense = true)'
    ),
    "--distill.divergence=skew_kl --distill.tail=drop": (
        'distill.divergence = "skew_kl" with a sparse target takes tail = "bucket" or '
        '"renormalize", not "drop"'
    ),
    "--distill.divergence=alpha_beta --distill.num_draws=9": (
        'distill.divergence = "alpha_beta" with random samples has a term of its own for every id '
        "outside the kept ones: "
        "keep the top ids, or the dense teacher (dense = true)"
    ),
    "--distill.alpha_warmup_fraction=0.995": (
        "distill.alpha_warmup_fraction (0.995) + alpha_decay_fraction (0.01) must be at most 1"
    ),
    "--data.train_weights=[1,2]": (
        "data.train_weights ([1.0, 2.0]) needs one weight > 0 for each of data.train's 1 entries"
    ),
    "--data.train_weights=[0]": (
        "data.train_weights ([0.0]) needs one weight > 0 for each of data.train's 1 entries"
    ),
    "--optimizer.min_learning_rate=1": (
        "optimizer.min_learning_rate (1.0) must be at most learning_rate (0.001)"
    ),
    "--optimizer.schedule=wsd": 'optimizer.schedule = "wsd" needs optimizer.decay_steps > 0',
    "--parallel.virtual_pipeline=2": "parallel.virtual_pipeline (2) above 1 needs pipeline > 1",
    "--parallel.sequence_parallel=true": "parallel.sequence_parallel needs tensor > 1",
    "--parallel.tensor=2 --model.hidden_size=65 --model.head_dim=2": (
        "model.hidden_size (65) must be a multiple of parallel.tensor (2)"
    ),
    "--parallel.tensor=2 --model.num_attention_heads=3 --model.num_query_groups=3 "
    "--model.head_dim=2": (
        "model.num_attention_heads (3) must be a multiple of parallel.tensor (2)\n"
        "model.num_query_groups (3) must be a multiple of parallel.tensor (2)"
    ),
    "--parallel.tensor=4 --model.num_query_groups=2": (
        "model.num_query_groups (2) must be a multiple of parallel.tensor (4)"
    ),
    "--parallel.tensor=2 --model.ffn_hidden_size=129": (
        "model.ffn_hidden_size (129) must be a multiple of parallel.tensor (2)"
    ),
    "--parallel.tensor=2 --model.vocab_size_multiple=1": (
        "model.vocab_size_multiple (1) must be a multiple of parallel.tensor (2)"
    ),
    "--parallel.pipeline=2 --parallel.virtual_pipeline=4": (
        "model.num_layers (4) must be a multiple of parallel.pipeline * parallel.virtual_pipeline "
        "(8)"
    ),
    "--batch.micro_batch_size=3": (
        "batch.global_batch_size (8) must be a multiple of batch.micro_batch_size (3)"
    ),
    "--parallel.tensor=2 --parallel.sequence_parallel=true --batch.sequence_length=33": (
        "batch.sequence_length (33) must be a multiple of parallel.tensor (sequence_parallel) (2)"
    ),
    "--model.vocab_size=null": (
        "set model.vocab_size or data.tokenizer: one of them must give the vocabulary size"
    ),
    "--teacher.source=online --teacher.checkpoint=t --distill.top_k=513": (
        "distill.top_k (513) must be at most model.vocab_size (512)"
    ),
    "--optimizer.warmup_steps=11": "optimizer.warmup_steps (11) must be at most train.steps (10)",
    "--optimizer.schedule=wsd --optimizer.warmup_steps=5 --optimizer.decay_steps=6": (
        "optimizer.warmup_steps (5) + optimizer.decay_steps (6) must be at most train.steps (10)"
    ),
    "--parallel.overlap_param_gather=true --optimizer.distributed=true": (
        "parallel.overlap_param_gather needs optimizer.distributed and parallel.overlap_grad_reduce"
    ),
    "--parallel.overlap_param_gather=true --parallel.overlap_grad_reduce=true": (
        "parallel.overlap_param_gather needs optimizer.distributed and parallel.overlap_grad_reduce"
    ),
}


@pytest.mark.parametrize("overrides", RELATIONS)
def test_relation(load: Load, overrides: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides.split())
    assert str(caught.value) == RELATIONS[overrides]


@pytest.mark.parametrize(
    "overrides",
    [
        "--batch.sequence_length=33 --parallel.tensor=2",
        "--distill.top_k=513",
        "--model.num_layers=8 --parallel.pipeline=2 --parallel.virtual_pipeline=4",
        "--optimizer.schedule=wsd --optimizer.warmup_steps=5 --optimizer.decay_steps=5",
        "--parallel.overlap_param_gather=true --parallel.overlap_grad_reduce=true "
        "--optimizer.distributed=true",
        "--distill.alpha_warmup_fraction=0.9 --distill.alpha_decay_fraction=0.1",
        "--model.vocab_size=null --data.tokenizer=t.model",
        "--distill.num_draws=5 --distill.top_k=64",
        "--distill.dense=true --distill.divergence=mse_logits",
        "--distill.divergence=reverse_kl --distill.tail=bucket",
        "--distill.divergence=jensen_shannon --distill.num_draws=5",
        "--distill.divergence=alpha_beta --distill.ab_alpha=0.4 --distill.ab_beta=0.6",
    ],
)
def test_values_at_the_edge_of_a_relation_are_taken(load: Load, overrides: str) -> None:
    load(*overrides.split())

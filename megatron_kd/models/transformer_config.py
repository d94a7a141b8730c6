"""Map the sections of a run file to megatron-core's TransformerConfig, field by field."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kd.config import ConfigError, ModelSection, ParallelSection
from megatron_kd.parallel.platform import Platform

# fp8 applies to the matrix products of layers; weights and activations stay bf16.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


def transformer_config(
    model: ModelSection, parallel: ParallelSection, platform: Platform, *, precision: str
) -> TransformerConfig:
    """Return the TransformerConfig of a Llama-style decoder.

    Args:
        model: shape of the model.
        parallel: its layout.
        platform: device and its libraries.
        precision: a key of DTYPES.

    Raises:
        ConfigError: a key of [model.mcore] is no field of TransformerConfig, or is set by the run
            file's own keys.
    """
    settings = {**_shape_fields(model), **_layout_fields(parallel, platform, DTYPES[precision])}
    if model.recompute == "full":
        settings.update(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    if precision == "fp8":
        # Scale each tensor by its present values: the targets of a frozen teacher then do not
        # depend on earlier inputs.
        settings.update(fp8="e4m3", fp8_recipe="tensorwise")
    settings.update(_mcore_fields(model, settings))
    config = TransformerConfig(**settings)
    if config.virtual_pipeline_model_parallel_size is not None and (
        config.batch_p2p_comm or not config.overlap_p2p_comm
    ):
        raise ConfigError(
            "parallel.virtual_pipeline > 1 with batch_p2p_comm gives wrong gradients without an "
            "error: remove overlap_p2p_comm and batch_p2p_comm from [model.mcore]"
        )
    return config


def _shape_fields(model: ModelSection) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.head_dim or model.hidden_size // model.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        # models/initialize.py fills weights by name, so that they do not depend on the layout.
        # perform_initialization = False would also drop the marks of sharded weights, and with
        # them their share of the gradient norm.
        "init_method": _keep_uninitialized,
        "output_layer_init_method": _keep_uninitialized,
        "embedding_init_method": _keep_uninitialized,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }


def _layout_fields(
    parallel: ParallelSection, platform: Platform, dtype: torch.dtype
) -> dict[str, Any]:
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "sequence_parallel": parallel.sequence_parallel,
        # Gradients are divided once, by the global number of tokens. The result does not depend on
        # how a batch is split into microbatches.
        "calculate_per_token_loss": True,
        # Two stages with two chunks each exchange two messages per step with the same peer. In one
        # batch these are swapped, and the gradients are wrong without an error.
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
        # Freeing an activation once its send has been issued is safe in the order of a CUDA stream.
        # gloo still reads the memory: under the interleaved pipeline schedule, which does not wait
        # for sends, the next stage would receive whatever overwrote it.
        "deallocate_pipeline_outputs": platform.is_cuda or virtual is None,
        "bias_activation_fusion": platform.is_cuda,
        "deterministic_mode": platform.deterministic,
    }


def _keep_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight unchanged."""
    return weight


def _mcore_fields(model: ModelSection, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of [model.mcore]; `settings` are those that other keys set."""
    known = {field.name for field in fields(TransformerConfig)}
    for name in model.mcore:
        if name not in known:
            raise ConfigError(
                f"model.mcore.{name} is not a field of megatron-core's TransformerConfig"
            )
        if name in settings and not name.endswith("p2p_comm"):
            raise ConfigError(
                f"model.mcore.{name} is set by other keys of the run file: change those"
            )
    return dict(model.mcore)

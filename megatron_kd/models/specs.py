"""Define the layers of a Llama-style decoder as megatron-core specs.

They use Transformer Engine on GPUs where it is installed, else local modules.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_kd.parallel.platform import Platform


def block_spec(
    config: TransformerConfig, platform: Platform, *, within_documents: bool = False
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the spec of every decoder layer and of the final norm.

    Args:
        config: the model's configuration.
        platform: device and its libraries.
        within_documents: True if attention takes a mask of what each token can see.
    """
    if platform.is_cuda and importlib.util.find_spec("transformer_engine") is not None:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if within_documents:
            spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
        return spec
    layers = config.num_layers // (
        config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    )
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """Mark torch's RMSNorm so that megatron-core sums its gradient under sequence parallelism.

    The local norm of megatron-core lacks this mark and refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPACoreAttention(MegatronModule):
    """Compute causal attention with torch's scaled_dot_product_attention.

    It never holds [S, S] attention weights, on any device.

    Shapes:
        S: sequence length.
        B: micro-batch size.
        h: query heads of this tensor-parallel rank.
        g: query groups of this tensor-parallel rank.
        d: width of a head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism needs Transformer Engine's attention")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Return the attention output [S, B, h * d].

        Args:
            query: [S, B, h, d]. A single query (S = 1) may continue a cached sequence of more
                keys; it sees all of them.
            key: [S, B, g, d].
            value: [S, B, g, d].
            attention_mask: bool [B, 1, S, S], true where a query sees a key (torch's convention,
                the opposite of megatron-core's). None: causal.
        """
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1 and not q.is_cuda:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        dropout = self.dropout if self.training else 0.0
        if dropout:
            # Heads are split over the tensor group, so each rank draws from its own generator.
            with get_cuda_rng_tracker().fork():
                out = self._attend(q, k, v, dropout, attention_mask)
        else:
            out = self._attend(q, k, v, 0.0, attention_mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None
    ) -> Tensor:
        grouped, continued = q.shape[1] != k.shape[1], q.shape[2] != k.shape[2]
        if continued and (q.shape[2] != 1 or mask is not None):
            raise ValueError(
                f"{q.shape[2]} queries cannot continue a cache of {k.shape[2]} keys: one at a "
                "time, without a mask"
            )
        causal = mask is None and not continued
        return scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, dropout_p=dropout, scale=self.scale, enable_gqa=grouped
        )

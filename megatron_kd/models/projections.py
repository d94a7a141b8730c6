"""Learned matrices between the widths of student and teacher layers. They train with the student and are no part of its model:
whoever loads its weights (a teacher, a conversion, another run's start) never meets them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kd.config.hidden_state_pairs import Projection

PROJECTIONS = "hidden_projections"  # of a chunk: a ModuleDict by Projection.name, and what the names of its weights start with


def add_projections(
    chunks: Sequence[GPTModel], projections: Sequence[Projection], config: TransformerConfig
) -> None:
    """Give each chunk the uninitialised projections [Ht, Hs] of its layers, in the weights' type: whole on every tensor-parallel rank.

    Under sequence parallelism a rank sees its slice of the tokens only; the mark makes megatron-core sum the gradients.
    """
    for chunk in chunks:
        layers = {layer.layer_number for layer in chunk.decoder.layers}
        own = [each for each in projections if each.student_layer in layers]
        if not own:
            continue
        device = next(chunk.parameters()).device
        modules = torch.nn.ModuleDict()
        for each in own:
            linear = torch.nn.Linear(
                config.hidden_size,
                each.teacher_width,
                bias=False,
                device=device,
                dtype=config.params_dtype,
            )
            linear.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            modules[each.name] = linear
        setattr(chunk, PROJECTIONS, modules)


def projections_on(chunk: GPTModel) -> dict[str, torch.nn.Module]:
    """The projections of a chunk by name."""
    return dict(getattr(chunk, PROJECTIONS, torch.nn.ModuleDict()).items())

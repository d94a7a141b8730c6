"""Add learned matrices between the widths of student and teacher layers.

They train with the student but are not part of its model: a teacher, a conversion or another run
that loads its weights does not load them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kd.config.hidden_state_pairs import Projection

# Attribute of a chunk, a ModuleDict by Projection.name; also the prefix of its weights' names.
PROJECTIONS = "hidden_projections"


def add_projections(
    chunks: Sequence[GPTModel], projections: Sequence[Projection], config: TransformerConfig
) -> None:
    """Add the uninitialised projections of each chunk's layers to the chunk.

    A weight has shape [teacher width, student width], the type of the model's weights, and is
    replicated over the tensor-parallel ranks.

    Args:
        chunks: the student's chunks on this rank; changed in place.
        projections: all projections of the run.
        config: the student's configuration.
    """
    for chunk in chunks:
        layers = {layer.layer_number for layer in chunk.decoder.layers}
        local = [projection for projection in projections if projection.student_layer in layers]
        if local:
            device = next(chunk.parameters()).device
            modules = {one.name: _linear(one, config, device) for one in local}
            setattr(chunk, PROJECTIONS, torch.nn.ModuleDict(modules))


def _linear(
    projection: Projection, config: TransformerConfig, device: torch.device
) -> torch.nn.Module:
    linear = torch.nn.Linear(
        config.hidden_size,
        projection.teacher_width,
        bias=False,
        device=device,
        dtype=config.params_dtype,
    )
    # Under sequence parallelism a rank has a slice of the tokens only: this mark makes
    # megatron-core sum the gradients over the tensor-parallel group.
    linear.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return linear


def projections_on(chunk: GPTModel) -> dict[str, torch.nn.Module]:
    """Return the projections of a chunk by name."""
    return dict(getattr(chunk, PROJECTIONS, torch.nn.ModuleDict()).items())

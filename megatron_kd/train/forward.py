"""Run the student's forward pass on one microbatch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_kd.data.batches import Microbatch
from megatron_kd.targets import Target


@dataclass(frozen=True)
class StudentInput:
    """Hold what the student learns from in one microbatch.

    Attributes:
        microbatch: the tokens.
        target: the teacher's target; None without one, and off the student's last stage.
        teacher_layers: outputs [S, B, H] of teacher layers that this rank's student layers are
            compared with, by layer.
    """

    microbatch: Microbatch
    target: Target | None = None
    teacher_layers: Mapping[int, Tensor] = field(default_factory=dict)


def run_chunk(chunk: Any, microbatch: Microbatch) -> Tensor:
    """Return the output of a DDP-wrapped chunk of the student for one microbatch."""
    output: Tensor = chunk(
        input_ids=microbatch.tokens,
        position_ids=microbatch.position_ids,
        attention_mask=microbatch.attention_mask(),
    )
    return output

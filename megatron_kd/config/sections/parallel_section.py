"""Declare the [parallel] section of a run file."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_kd.config.sections.section import Section


class ParallelSection(Section):
    """Lay the student out over the ranks.

    The data-parallel size is the number of ranks divided by tensor * pipeline.
    """

    tensor: int = Field(default=1, gt=0)
    """Tensor-parallel size: ranks that share each layer."""
    pipeline: int = Field(default=1, gt=0)
    """Pipeline-parallel size: number of stages."""
    virtual_pipeline: int = Field(default=1, gt=0)
    """Virtual stages per pipeline stage; above 1 selects the interleaved pipeline schedule and
    needs pipeline > 1.
    """
    sequence_parallel: bool = False
    """Split activations outside tensor-parallel regions along the sequence over the tensor-parallel
    group. Needs tensor > 1.
    """
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the forward pass runs. Needs optimizer.distributed and
    overlap_grad_reduce.
    """

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline ({self.virtual_pipeline}) above 1 needs pipeline > 1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1")
        return self

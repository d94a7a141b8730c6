"""The section of a run file about the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.model_section import Section


class TeacherParallelSection(Section):
    """How an online teacher is laid out over the same ranks; the data-parallel size is what remains. Unset: as the student."""

    tensor: int | None = Field(
        default=None, gt=0, description="Tensor-parallel size of the teacher. Unset: the student's."
    )
    pipeline: int | None = Field(
        default=None, gt=0, description="Pipeline stages of the teacher. Unset: the student's."
    )


class TeacherSection(Section):
    """Where the distillation targets come from."""

    source: Literal["none", "online", "cached", "huggingface"] = Field(
        default="none",
        description='"none": plain pretraining. "online": a frozen teacher runs forward in every step. "cached": its targets were stored '
        'by tools/cache_teacher.py, or by itself while it trained ([capture]). "huggingface": as online, a local model folder that '
        "transformers runs.",
    )
    checkpoint: Path | None = Field(
        default=None,
        description="Checkpoint of the teacher: a run directory, its checkpoints folder, or one step-* folder. Needed for online; with "
        "cached, the cache must have been made by it. huggingface: a local folder with config.json and safetensors.",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="huggingface: the teacher's tokenizer, whose vocabulary must be that of data.tokenizer. Unset: the one in its folder.",
    )
    shard_parameters: Literal["auto", "zero3", "none"] = Field(
        default="auto",
        description="huggingface: zero3 spreads the teacher's weights over all ranks (DeepSpeed ZeRO-3); none: whole on each rank; auto: "
        "zero3 where deepspeed is installed and there are ranks to spread over.",
    )
    offload: bool = Field(
        default=False,
        description="online, huggingface with zero3: keep the teacher's weights in CPU memory between uses. Needs a GPU.",
    )
    precision: Literal["bf16", "fp32", "fp8"] | None = Field(
        default=None,
        description="Type of the teacher's weights and activations. fp8 (online, Transformer Engine, GPUs that have it): bf16 weights, "
        "products in fp8 in the layers, the head's in bf16. Unset: train.precision.",
    )
    cache: str | None = Field(
        default=None,
        description="Folder of the cache, or a URL that fsspec knows (s3://...). Needed for cached.",
    )
    on_miss: Literal["error", "online"] = Field(
        default="error",
        description='cached: what to do about a sample that the cache does not hold. "online": run teacher.checkpoint for it.',
    )
    parallel: TeacherParallelSection = Field(
        default=TeacherParallelSection(),
        description="online: a layout of the teacher's own, over the same ranks.",
    )
    micro_batch_size: int | None = Field(
        default=None,
        gt=0,
        description="online: sequences in one forward pass of the teacher. Unset: batch.micro_batch_size.",
    )
    overlap: Literal["auto", "none", "drain"] = Field(
        default="auto",
        description="online: when the teacher runs. none: before the student's step. drain: for the next step, while the student's "
        "pipeline drains, with its stages on the ranks in the order in which they fall idle. auto: drain where a model of both pipelines' "
        "bubbles (planning/placement.py) finds the step a tenth shorter. The targets are the same to the bit.",
    )

    @property
    def has_own_layout(self) -> bool:
        """Whether anything about how the teacher runs differs, or may differ, from how the student does."""
        return (self.parallel.tensor, self.parallel.pipeline, self.micro_batch_size) != (
            None,
            None,
            None,
        )

    @model_validator(mode="after")
    def _check(self) -> TeacherSection:
        if self.has_own_layout and self.source != "online" and self.on_miss != "online":
            raise ValueError(
                f'teacher.parallel and teacher.micro_batch_size are for an online teacher, not for source = "{self.source}"'
            )
        if self.overlap == "drain" and self.source != "online":
            raise ValueError(f'overlap = "drain" is for source = "online", not "{self.source}"')
        if (
            self.precision is not None
            and self.source != "huggingface"
            and self.source != "online"
            and self.on_miss != "online"
        ):
            raise ValueError(
                f'teacher.precision is for a teacher that runs in the job, not for source = "{self.source}"'
            )
        if self.precision == "fp8" and self.source == "huggingface":
            raise ValueError(
                'precision = "fp8" is for source = "online": convert the teacher (tools/convert_checkpoint.py)'
            )
        if self.source in ("online", "huggingface") and self.checkpoint is None:
            raise ValueError(f'source = "{self.source}" needs teacher.checkpoint')
        if self.source == "cached" and self.cache is None:
            raise ValueError('source = "cached" needs teacher.cache')
        if self.source == "cached" and self.on_miss == "online" and self.checkpoint is None:
            raise ValueError('on_miss = "online" needs teacher.checkpoint')
        return self

"""Declare the [teacher] section of a run file and the teacher sources that it can name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from megatron_kd.config.sections.section import Section


@dataclass(frozen=True)
class SourceTraits:
    """Declare what a teacher source does, for everything outside megatron_kd/teacher.

    Attributes:
        description: help text that follows the name.
        runs_in_job: a teacher model runs forward in every step, beside the student.
        uses_megatron: that model is one of this program, which can have a layout of its own,
            run during the student's drain, and show the outputs of its layers.
        reads_cache: targets come from the folder teacher.cache.
    """

    description: str
    runs_in_job: bool = False
    uses_megatron: bool = False
    reads_cache: bool = False


# A new source is declared here; its code is the module of the same name in megatron_kd/teacher.
TEACHER_SOURCES = {
    "none": SourceTraits("plain pretraining"),
    "online": SourceTraits(
        "a frozen teacher runs forward in every step", runs_in_job=True, uses_megatron=True
    ),
    "cached": SourceTraits(
        "targets were stored by tools/cache_teacher.py, or by the teacher itself while it trained "
        "([capture])",
        reads_cache=True,
    ),
    "huggingface": SourceTraits(
        "as online, a local model folder that transformers runs", runs_in_job=True
    ),
}

# Pydantic and --help read the allowed values from a Literal, which a type checker cannot compute.
if TYPE_CHECKING:
    TeacherSourceName = str
else:
    TeacherSourceName = Literal[tuple(TEACHER_SOURCES)]


class TeacherParallelSection(Section):
    """Lay an online teacher out over the same ranks; the data-parallel size is what remains."""

    tensor: int | None = Field(default=None, gt=0)
    """Tensor-parallel size of the teacher. Unset: the student's."""
    pipeline: int | None = Field(default=None, gt=0)
    """Pipeline stages of the teacher. Unset: the student's."""


class TeacherSection(Section):
    """Choose where the distillation targets come from."""

    source: TeacherSourceName = Field(
        default="none",
        description="; ".join(
            f"{name}: {traits.description}" for name, traits in TEACHER_SOURCES.items()
        )
        + ".",
    )
    checkpoint: Path | None = None
    """Checkpoint of the teacher: a run directory, its checkpoints folder, or one step-* folder.
    Needed for online; with cached, the cache must have been made by it. huggingface: a local folder
    with config.json and safetensors.
    """
    tokenizer: Path | None = None
    """huggingface: the teacher's tokenizer, whose vocabulary must be that of data.tokenizer. Unset:
    the one in its folder.
    """
    shard_parameters: Literal["auto", "zero3", "none"] = "auto"
    """huggingface: zero3 spreads the teacher's weights over all ranks (DeepSpeed ZeRO-3); none:
    whole on each rank; auto: zero3 where deepspeed is installed and there are ranks to spread over.
    """
    offload: bool = False
    """online, huggingface with zero3: keep the teacher's weights in CPU memory between uses. Needs
    a GPU.
    """
    precision: Literal["bf16", "fp32", "fp8"] | None = None
    """Type of the teacher's weights and activations. fp8 (online, Transformer Engine, GPUs that
    have it): bf16 weights, products in fp8 in the layers, the head's in bf16. Unset:
    train.precision.
    """
    cache: str | None = None
    """Folder of the cache, or a URL that fsspec knows (s3://...). Needed for cached."""
    on_miss: Literal["error", "online"] = "error"
    """cached: what to do about a sample that the cache does not hold. "online": run
    teacher.checkpoint for it.
    """
    parallel: TeacherParallelSection = TeacherParallelSection()
    """online: separate parallel layout of the teacher, over the same ranks."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """online: sequences in one forward pass of the teacher. Unset: batch.micro_batch_size."""
    overlap: Literal["auto", "none", "drain"] = "auto"
    """online: when the teacher runs. none: before the student's step. drain: for the next step,
    while the student's pipeline drains, with its stages on the ranks in the order in which they
    become idle. auto: drain where a model of both pipelines' bubbles (planning/placement.py) finds
    the step a tenth shorter. The targets are the same to the bit.
    """

    @property
    def enabled(self) -> bool:
        """Return True if the run distils from a teacher."""
        return self.source != "none"

    @property
    def runs_in_job(self) -> bool:
        """Return True if a teacher model runs forward in every step."""
        return TEACHER_SOURCES[self.source].runs_in_job

    @property
    def uses_megatron(self) -> bool:
        """Return True if a model of this program runs forward in every step."""
        return TEACHER_SOURCES[self.source].uses_megatron

    @property
    def reads_cache(self) -> bool:
        """Return True if targets come from teacher.cache."""
        return TEACHER_SOURCES[self.source].reads_cache

    @property
    def falls_back(self) -> bool:
        """Return True if teacher.checkpoint runs for samples that the cache does not hold."""
        return self.reads_cache and self.on_miss == "online"

    @property
    def has_separate_layout(self) -> bool:
        """Return True if the teacher may run in another layout than the student."""
        return (self.parallel.tensor, self.parallel.pipeline, self.micro_batch_size) != (
            None,
            None,
            None,
        )

    @model_validator(mode="after")
    def _check(self) -> TeacherSection:
        self._check_runtime_keys()
        if self.runs_in_job and self.checkpoint is None:
            raise ValueError(f'source = "{self.source}" needs teacher.checkpoint')
        if self.reads_cache and self.cache is None:
            raise ValueError(f'source = "{self.source}" needs teacher.cache')
        if self.falls_back and self.checkpoint is None:
            raise ValueError('on_miss = "online" needs teacher.checkpoint')
        return self

    def _check_runtime_keys(self) -> None:
        """Raise ValueError for keys of a running teacher that this source cannot honour."""
        fallback = self.on_miss == "online"
        if self.has_separate_layout and not self.uses_megatron and not fallback:
            raise ValueError(
                "teacher.parallel and teacher.micro_batch_size are for an online teacher, not for "
                f'source = "{self.source}"'
            )
        if self.overlap == "drain" and not self.uses_megatron:
            raise ValueError(f'overlap = "drain" is for source = "online", not "{self.source}"')
        if self.precision is not None and not self.runs_in_job and not fallback:
            raise ValueError(
                "teacher.precision is for a teacher that runs in the job, not for source = "
                f'"{self.source}"'
            )
        if self.precision == "fp8" and self.runs_in_job and not self.uses_megatron:
            raise ValueError(
                'precision = "fp8" is for source = "online": convert the teacher '
                "(tools/convert_checkpoint.py)"
            )

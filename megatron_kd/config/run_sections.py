"""Hold the sections of a run file and the sizes that follow from them."""

from __future__ import annotations

from pydantic import Field

from megatron_kd.config import sections
from megatron_kd.config.errors import ConfigError


class RunSections(sections.Section):
    """Hold one section per table of a run file, each checked by itself."""

    model: sections.ModelSection = Field(description="Shape of the student.")
    teacher: sections.TeacherSection = Field(
        default_factory=sections.TeacherSection, description="Source of the distillation targets."
    )
    distill: sections.DistillSection = Field(
        default_factory=sections.DistillSection, description="The distillation loss."
    )
    capture: sections.CaptureSection = Field(
        default_factory=sections.CaptureSection,
        description="Storing this run's own targets while it trains, for other students.",
    )
    data: sections.DataSection = Field(description="Token datasets and tokenizer.")
    batch: sections.BatchSection = Field(description="Sizes of one step.")
    optimizer: sections.OptimizerSection = Field(description="Adam and the learning-rate schedule.")
    parallel: sections.ParallelSection = Field(
        default_factory=sections.ParallelSection,
        description="Layout of the student over the ranks.",
    )
    train: sections.TrainSection = Field(description="The training loop.")
    checkpoint: sections.CheckpointSection = Field(
        default_factory=sections.CheckpointSection,
        description="Saving, resuming and initialization.",
    )
    telemetry: sections.TelemetrySection = Field(
        default_factory=sections.TelemetrySection, description="Measurements and their output."
    )
    run: sections.RunSection = Field(description="Directory of the run.")

    @property
    def target_bytes_per_token(self) -> int:
        """Return the memory of one token and its sparse target, bytes.

        An entry takes 8 bytes (id and log-probability); log_tail and entropy take 4 each, and the
        token 8.
        """
        return 8 * (self.distill.num_draws or self.distill.top_k) + 16

    def data_parallel_size(self, world_size: int) -> int:
        """Return the data-parallel size on `world_size` ranks.

        Raises:
            ConfigError: the ranks or the batch cannot be divided evenly.
        """
        parallel, batch = self.parallel, self.batch
        model_ranks = parallel.tensor * parallel.pipeline
        if world_size % model_ranks:
            raise ConfigError(
                f"{world_size} processes cannot be split into parallel.tensor * parallel.pipeline "
                f"= {model_ranks}: start a multiple of {model_ranks} processes"
            )
        size = world_size // model_ranks
        sequences = batch.micro_batch_size * size
        if batch.global_batch_size % sequences:
            raise ConfigError(
                f"batch.global_batch_size ({batch.global_batch_size}) must be a multiple of "
                f"batch.micro_batch_size * data-parallel size = {batch.micro_batch_size} * {size} "
                f"= {sequences}"
            )
        num_microbatches = batch.global_batch_size // sequences
        if parallel.virtual_pipeline > 1 and num_microbatches % parallel.pipeline:
            raise ConfigError(
                f"the interleaved pipeline schedule needs the microbatches per step "
                f"({num_microbatches}) to be a multiple of parallel.pipeline "
                f"({parallel.pipeline}): change batch.global_batch_size or batch.micro_batch_size"
            )
        return size

    def num_microbatches(self, world_size: int) -> int:
        """Return the forward passes of one data-parallel rank in one step."""
        sequences = self.batch.micro_batch_size * self.data_parallel_size(world_size)
        return self.batch.global_batch_size // sequences

    def teacher_layout(self, world_size: int) -> tuple[int, int, int]:
        """Return tensor-parallel size, pipeline-parallel size and micro-batch size of the teacher.

        Raises:
            ConfigError: the ranks or the batch cannot be divided evenly.
        """
        tensor = self.teacher.parallel.tensor or self.parallel.tensor
        pipeline = self.teacher.parallel.pipeline or self.parallel.pipeline
        micro_batch_size = self.teacher.micro_batch_size or self.batch.micro_batch_size
        data, remainder = divmod(world_size, tensor * pipeline)
        if remainder:
            raise ConfigError(
                f"{world_size} processes cannot be split into teacher.parallel.tensor * "
                f"teacher.parallel.pipeline = {tensor} * {pipeline}"
            )
        sequences = micro_batch_size * data
        if self.batch.global_batch_size % sequences:
            raise ConfigError(
                f"batch.global_batch_size ({self.batch.global_batch_size}) must be a multiple of "
                "the teacher's micro-batch size * its data-parallel size = "
                f"{micro_batch_size} * {data} = {sequences}: change teacher.micro_batch_size or "
                "teacher.parallel"
            )
        return tensor, pipeline, micro_batch_size

    def teacher_problem(self, teacher: sections.ModelSection, world_size: int) -> str | None:
        """Return which size of the teacher its layout cannot split, as a clause, else None.

        Raises:
            ConfigError: the teacher's layout does not fit `world_size`.
        """
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        if self.teacher.has_separate_layout:
            tensor, pipeline, _ = self.teacher_layout(world_size)
        for name, size, axis, ranks in teacher.indivisible_sizes(tensor=tensor, stages=pipeline):
            return (
                f"{name} = {size}, which {ranks} {axis}-parallel ranks cannot share: set "
                f"teacher.parallel.{axis} to a divisor of {size}"
            )
        return None

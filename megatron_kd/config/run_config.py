"""RunConfig: the complete, frozen description of one run, and the relations between its sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_kd.config.capture_section import CaptureSection
from megatron_kd.config.hidden_state_pairs import pair_problems
from megatron_kd.config.schedules import LEARNING_RATE_SCHEDULES
from megatron_kd.config.sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    DistillSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    Section,
    TeacherSection,
    TelemetrySection,
    TrainSection,
)


class ConfigError(ValueError):
    """A run file, override or input that cannot work; the message says what is wrong and what to do."""


class RunConfig(Section):
    """One run: complete, frozen, and written into run.directory/config.toml."""

    model: ModelSection = Field(description="Shape of the student.")
    teacher: TeacherSection = Field(
        default_factory=TeacherSection, description="Where distillation targets come from."
    )
    distill: DistillSection = Field(
        default_factory=DistillSection, description="The distillation loss."
    )
    capture: CaptureSection = Field(
        default_factory=CaptureSection,
        description="Storing this run's own targets while it trains, for other students.",
    )
    data: DataSection = Field(description="Token datasets and tokenizer.")
    batch: BatchSection = Field(description="Sizes of one step.")
    optimizer: OptimizerSection = Field(description="Adam and the learning-rate schedule.")
    parallel: ParallelSection = Field(
        default_factory=ParallelSection, description="Layout over the ranks."
    )
    train: TrainSection = Field(description="The loop.")
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="Saving and starting."
    )
    telemetry: TelemetrySection = Field(
        default_factory=TelemetrySection, description="What is measured and written."
    )
    run: RunSection = Field(description="Where the run lives.")

    @model_validator(mode="after")
    def _check_relations(self) -> RunConfig:
        """Checks that need no world size, file or device. One line per problem."""
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        model, parallel, batch, opt, train = (
            self.model,
            self.parallel,
            self.batch,
            self.optimizer,
            self.train,
        )
        tensor, chunks = parallel.tensor, parallel.pipeline * parallel.virtual_pipeline
        by_name = {
            "tensor": "parallel.tensor",
            "pipeline": "parallel.pipeline * parallel.virtual_pipeline",
        }
        sizes = [
            (f"model.{name}", size, by_name[by], divisor)
            for name, size, by, divisor in model.not_divisible(tensor=tensor, stages=chunks)
        ]
        sizes.append(
            (
                "batch.global_batch_size",
                batch.global_batch_size,
                "batch.micro_batch_size",
                batch.micro_batch_size,
            )
        )
        if parallel.sequence_parallel:
            sizes.append(
                (
                    "batch.sequence_length",
                    batch.sequence_length,
                    "parallel.tensor (sequence_parallel)",
                    tensor,
                )
            )
        found = [
            f"{name} ({size}) must be a multiple of {by} ({divisor})"
            for name, size, by, divisor in sizes
            if size % divisor
        ]
        window = model.window_problem(batch.sequence_length)
        if window is not None:
            found.append(f"batch.sequence_length {window}")
        if model.vocab_size is None and self.data.tokenizer is None:
            found.append(
                "set model.vocab_size or data.tokenizer: one of them must give the vocabulary size"
            )
        selects = self.teacher.enabled or self.capture.directory is not None
        chooses = selects and self.distill.num_draws is None and not self.distill.dense
        if chooses and model.vocab_size is not None and self.distill.top_k > model.vocab_size:
            found.append(
                f"distill.top_k ({self.distill.top_k}) must be at most model.vocab_size ({model.vocab_size})"
            )
        if self.distill.dense and self.teacher.reads_cache:
            found.append(
                'distill.dense compares whole distributions, which a cache does not hold: set teacher.source = "online"'
            )
        if self.distill.dense and self.teacher.has_separate_layout:
            found.append(
                "distill.dense needs the teacher in the student's layout: unset teacher.parallel and teacher.micro_batch_size"
            )
        if (self.distill.dense or self.distill.hidden_states) and self.teacher.overlap == "drain":
            found.append(
                'distill.dense and distill.hidden_states need the teacher right before its student: set teacher.overlap to "auto" or "none"'
            )
        if opt.warmup_steps > train.steps:
            found.append(
                f"optimizer.warmup_steps ({opt.warmup_steps}) must be at most train.steps ({train.steps})"
            )
        uses_decay_steps = LEARNING_RATE_SCHEDULES[opt.schedule].uses_decay_steps
        if uses_decay_steps and opt.warmup_steps + opt.decay_steps > train.steps:
            found.append(
                f"optimizer.warmup_steps ({opt.warmup_steps}) + optimizer.decay_steps ({opt.decay_steps}) "
                f"must be at most train.steps ({train.steps})"
            )
        if parallel.overlap_param_gather and not (opt.distributed and parallel.overlap_grad_reduce):
            found.append(
                "parallel.overlap_param_gather needs optimizer.distributed and parallel.overlap_grad_reduce"
            )
        return found + self._hidden_states_problems() + self._capture_problems()

    def _hidden_states_problems(self) -> list[str]:
        pairs = self.distill.hidden_states
        if not pairs:
            return []
        found = pair_problems(pairs, self.model)
        if not self.teacher.uses_megatron:
            found.append(
                "distill.hidden_states compares layers with those of a live teacher of this "
                f'program, not of teacher.source = "{self.teacher.source}": '
                'set teacher.source = "online", or remove distill.hidden_states'
            )
        if self.teacher.has_separate_layout:
            found.append(
                "distill.hidden_states needs the teacher in the student's layout: unset teacher.parallel and teacher.micro_batch_size"
            )
        if self.capture.directory is not None:
            found.append(
                "capture.directory stores a teacher's targets, not its layers: unset it, or remove distill.hidden_states"
            )
        return found

    def _capture_problems(self) -> list[str]:
        capture, distill, batch = self.capture, self.distill, self.batch
        if capture.directory is None:
            return []
        found = []
        if self.checkpoint.asynchronous:
            found.append(
                "capture.directory shows samples together with a complete checkpoint: set checkpoint.asynchronous = false"
            )
        if capture.first_step >= self.train.steps:
            found.append(
                f"capture.first_step ({capture.first_step}) must be less than train.steps ({self.train.steps})"
            )
        if distill.dense:
            found.append(
                "capture.directory stores sparse targets: unset distill.dense, or unset capture.directory"
            )
        mebibytes = -(
            -batch.micro_batch_size * batch.sequence_length * self.target_bytes_per_token >> 20
        )
        if mebibytes > capture.queue_mib:
            found.append(
                f"capture.queue_mib ({capture.queue_mib}) must hold a microbatch's targets: set it to {mebibytes} or more"
            )
        return found

    @property
    def target_bytes_per_token(self) -> int:
        """Of a sparse target in memory, with its token: ids and log-probabilities of 4 bytes, log_tail, entropy, token."""
        return 8 * (self.distill.num_draws or self.distill.top_k) + 16

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel size on `world_size` ranks; ConfigError where the sizes do not divide."""
        model_ranks = self.parallel.tensor * self.parallel.pipeline
        if world_size % model_ranks:
            raise ConfigError(
                f"{world_size} processes cannot be split into parallel.tensor * parallel.pipeline = {model_ranks}: "
                f"start a multiple of {model_ranks} processes"
            )
        size = world_size // model_ranks
        per_round = self.batch.micro_batch_size * size
        if self.batch.global_batch_size % per_round:
            raise ConfigError(
                f"batch.global_batch_size ({self.batch.global_batch_size}) must be a multiple of batch.micro_batch_size "
                f"* data-parallel size = {self.batch.micro_batch_size} * {size} = {per_round}"
            )
        microbatches = self.batch.global_batch_size // per_round
        if self.parallel.virtual_pipeline > 1 and microbatches % self.parallel.pipeline:
            raise ConfigError(
                f"the interleaved schedule needs the microbatches per step ({microbatches}) to be a multiple of "
                f"parallel.pipeline ({self.parallel.pipeline}): change batch.global_batch_size or batch.micro_batch_size"
            )
        return size

    def teacher_layout(self, world_size: int) -> tuple[int, int, int]:
        """(tensor, pipeline, micro-batch size) of an online teacher; ConfigError where they do not divide."""
        own = self.teacher.parallel
        tensor, pipeline = (
            own.tensor or self.parallel.tensor,
            own.pipeline or self.parallel.pipeline,
        )
        micro_batch_size = self.teacher.micro_batch_size or self.batch.micro_batch_size
        if world_size % (tensor * pipeline):
            raise ConfigError(
                f"{world_size} processes cannot be split into teacher.parallel.tensor * teacher.parallel.pipeline = {tensor} * {pipeline}"
            )
        per_round = micro_batch_size * (world_size // (tensor * pipeline))
        if self.batch.global_batch_size % per_round:
            raise ConfigError(
                f"batch.global_batch_size ({self.batch.global_batch_size}) must be a multiple of the teacher's micro-batch size * its "
                f"data-parallel size = {micro_batch_size} * {world_size // (tensor * pipeline)} = {per_round}: change "
                "teacher.micro_batch_size or teacher.parallel"
            )
        return tensor, pipeline, micro_batch_size

    def teacher_problem(self, teacher: ModelSection, world_size: int) -> str | None:
        """Which size of the teacher its ranks cannot share, and what to do, as a clause; None where all can be.

        ConfigError where its layout does not fit `world_size`.
        """
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        if self.teacher.has_separate_layout:
            tensor, pipeline, _ = self.teacher_layout(world_size)
        for name, size, by, ranks in teacher.not_divisible(tensor=tensor, stages=pipeline):
            return f"{name} = {size}, which {ranks} {by}-parallel ranks cannot share: set teacher.parallel.{by} to a divisor of {size}"
        return None

    def num_microbatches(self, world_size: int) -> int:
        """Forward passes of one data-parallel rank in one step."""
        return self.batch.global_batch_size // (
            self.batch.micro_batch_size * self.data_parallel_size(world_size)
        )

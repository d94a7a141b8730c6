"""From a RunConfig to a Run: the checks first, then groups, models, optimizer, teacher and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron_kd import __version__
from megatron_kd.checkpoint.saver import Saver
from megatron_kd.checkpoint.sharded_state import load_training_state, load_weights
from megatron_kd.checkpoint.store import CheckpointInfo
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.config.sections.divergence_section import divergence_parameters
from megatron_kd.data.batches import Attach, BatchSource, Microbatch
from megatron_kd.data.dataset import DatasetRequest, TokenDataset, build_dataset
from megatron_kd.head.logit_rows import compile_rows
from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import Divergence
from megatron_kd.losses.objective import Objective
from megatron_kd.losses.spec import LossSpec
from megatron_kd.models.student import Student
from megatron_kd.parallel.groups import Groups, start_groups
from megatron_kd.parallel.platform import start_platform
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.targets.dense import Target, same_vocabulary_ranges
from megatron_kd.teacher.ahead import AheadTeacher
from megatron_kd.teacher.build import attach_of, build_teacher
from megatron_kd.teacher.cached import CachedTeacher, check_coverage
from megatron_kd.teacher.source import TeacherSource
from megatron_kd.train.capture import Capture, build_capture
from megatron_kd.train.guards import RankTimes
from megatron_kd.train.hidden_state_loss import HiddenStates, build_hidden_states
from megatron_kd.train.optimizer import Optimizer
from megatron_kd.train.routing import CutOf, cut_of, token_rules
from megatron_kd.train.run_progress import RunProgress
from megatron_kd.train.schedules import alpha_at, learning_rate_at
from megatron_kd.train.startup.input_checks import Inputs, check_inputs, checkpoints_folder
from megatron_kd.train.startup.resume import attach_settings, choose_checkpoint


@dataclass(frozen=True)
class Run:
    """One run, ready to step. `progress` is the only part that changes from the outside."""

    config: RunConfig
    inputs: Inputs
    groups: Groups
    student: Student
    optimizer: Optimizer
    teacher: TeacherSource
    objective: Objective
    train_data: BatchSource
    valid_data: dict[str, BatchSource]
    progress: RunProgress
    capture: Capture
    hidden_states: HiddenStates
    times: RankTimes
    saver: Saver
    cut: CutOf

    @property
    def alpha(self) -> float:
        """Weight of the distillation loss in the coming step; 0 without a teacher."""
        return (
            alpha_at(self.progress.step, self.config.train.steps, self.config.distill)
            if self.config.teacher.enabled
            else 0.0
        )

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming step."""
        return learning_rate_at(self.progress.step, self.config.train.steps, self.config.optimizer)

    def objective_now(
        self, microbatches: Sequence[Microbatch], targets: Sequence[Target | None]
    ) -> Objective:
        """The objective of the coming step. Collective over the data-parallel group where routing is by the batch."""
        return replace(
            self.objective,
            spec=replace(self.objective.spec, alpha=self.alpha),
            entropy_threshold=self.cut(microbatches, targets),
        )

    def save(self) -> None:
        """Write a checkpoint of the present step, and show what was captured up to it; see Saver. Collective over the world."""
        progress, config = self.progress, self.config
        info = CheckpointInfo(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            nonfinite_steps=progress.nonfinite_steps,
            model=config.model.model_dump(mode="json"),
            vocab_size=self.inputs.vocab_size,
            tokenizer=self.inputs.digest,
            precision=config.train.precision,
            distributed_optimizer=config.optimizer.distributed,
            version=__version__,
            hidden_projections=[list(each) for each in self.inputs.projections],
            settings=dict(self.inputs.settings),
        )
        self.student.gather_weights()
        self.capture.stage()
        self.saver.save(info, self.student.models, self.optimizer)
        self.capture.publish()


def build_run(config: RunConfig, *, rendezvous: str | None = None) -> Run:
    """Check, join the world, build and load. Collective over the world after the checks."""
    _, world_size, local_rank = world_from_environment()
    inputs = check_inputs(config, world_size=world_size)
    _check_dense(config, inputs)
    platform = start_platform(
        config.train.device, local_rank, deterministic=config.train.deterministic
    )
    compile_rows(config.train.compile_head)
    groups = start_groups(
        platform,
        config.parallel,
        timeout_seconds=config.train.timeout_seconds,
        rendezvous=rendezvous,
    )
    inputs = attach_settings(config, choose_checkpoint(config, inputs))
    student = Student(config, groups, vocab_size=inputs.vocab_size, projections=inputs.projections)
    if inputs.initial is not None:
        load_weights(inputs.initial, student.models, what="checkpoint.initialize_from")
    optimizer = Optimizer(config, student)
    progress = RunProgress()
    if inputs.resume is not None:
        folder, info = inputs.resume
        load_training_state(folder, student.models, optimizer, what="run.directory")
        progress = RunProgress(
            info.step, info.consumed_samples, info.consumed_tokens, info.nonfinite_steps
        )
    objective = _objective(config, inputs, groups)
    teacher = build_teacher(config, inputs, groups)
    hidden_states = build_hidden_states(config, student, teacher, groups)
    source = partial(batch_source, config, inputs, groups)
    samples = config.train.steps * config.batch.global_batch_size
    train_data = source(
        "data.train",
        config.data.train,
        samples,
        weights=config.data.train_weights,
        attach=attach_of(teacher, held_out=False),
    )
    wanted = config.train.evaluate_batches * config.batch.global_batch_size
    known = attach_of(teacher, held_out=True)
    valid_data = {
        name: source(f"data.valid.{name}", [prefix], wanted, repeat=False, attach=known)
        for name, prefix in config.data.valid.items()
    }
    if isinstance(teacher, CachedTeacher) and teacher.fallback is None:
        check_coverage(teacher.reader, train_data.dataset, progress.consumed_samples)
    times = RankTimes(groups)
    student.on_drained.append(times.drained)
    if isinstance(teacher, AheadTeacher):
        student.on_drained.append(partial(_look_ahead, config, teacher, train_data, progress))
    capture = build_capture(config, inputs, groups, step=progress.step)
    saver = Saver(
        checkpoints_folder(config),
        config.checkpoint,
        device=platform.device,
        watchdog=groups.watchdog,
    )
    student_side = (config, inputs, groups, student, optimizer)
    cut = cut_of(config.distill, groups)
    return Run(
        *student_side,
        teacher,
        objective,
        train_data,
        valid_data,
        progress,
        capture,
        hidden_states,
        times,
        saver,
        cut,
    )


def _look_ahead(
    config: RunConfig, teacher: AheadTeacher, train_data: BatchSource, progress: RunProgress
) -> None:
    """The teacher's work of the next step; the last step has none."""
    if progress.step + 1 < config.train.steps:
        teacher.look_ahead(
            train_data.microbatches(progress.consumed_samples + config.batch.global_batch_size)
        )


def _objective(config: RunConfig, inputs: Inputs, groups: Groups) -> Objective:
    distill = config.distill
    spec = LossSpec(
        distill.alpha,
        distill.temperature,
        distill.temperature_squared,
        distill.loss_tail,
        distill.z_loss,
        distill.weights,
        teacher_only=distill.temperature_on == "teacher",
        divergence=Divergence(distill.divergence, **divergence_parameters(distill)),
    )
    options = HeadOptions(
        inputs.vocab_size,
        groups.tp,
        config.parallel.sequence_parallel,
        distill.head_schedule,
        distill.chunk_tokens,
    )
    return Objective(
        spec,
        options,
        rules=token_rules(distill, inputs.vocab_size),
        tail_to_label=distill.tail == "label",
        token_metrics=True,
    )


def _check_dense(config: RunConfig, inputs: Inputs) -> None:
    """ConfigError where teacher and student pad their vocabularies so that a rank would hold other ids of the one than of the other."""
    if not config.distill.dense or inputs.teacher is None:
        return
    theirs, tensor = inputs.teacher[1].model_section().vocab_size_multiple, config.parallel.tensor
    own_rows, their_rows = (
        padded_vocab_size(inputs.vocab_size, multiple) // tensor
        for multiple in (config.model.vocab_size_multiple, theirs)
    )
    if not same_vocabulary_ranges(own_rows, their_rows, inputs.vocab_size):
        raise ConfigError(
            f"distill.dense with parallel.tensor = {tensor} needs teacher and student to pad the vocabulary alike: set "
            f"model.vocab_size_multiple ({config.model.vocab_size_multiple}) to the teacher's {theirs}"
        )


def token_dataset(
    config: RunConfig,
    inputs: Inputs,
    name: str,
    prefixes: Sequence[str],
    num_samples: int,
    *,
    weights: Sequence[float] | None = None,
    repeat: bool = True,
) -> TokenDataset:
    """The samples of one data set of a run file, in the run's order; see `build_dataset`. Collective over the world."""
    request = DatasetRequest(
        prefixes=prefixes,
        weights=weights,
        num_samples=num_samples,
        sequence_length=config.batch.sequence_length,
        seed=config.train.seed,
        index_cache=config.data.index_cache or config.run.directory / "index_cache",
        end_of_document=inputs.tokenizer.end_of_document if inputs.tokenizer else None,
        vocab_size=inputs.vocab_size,
        mask_end_of_document=config.data.mask_end_of_document,
        within_documents=config.data.document_attention == "within",
        name=name,
        repeat=repeat,
    )
    return build_dataset(request)


def batch_source(
    config: RunConfig,
    inputs: Inputs,
    groups: Groups,
    name: str,
    prefixes: Sequence[str],
    num_samples: int,
    *,
    weights: Sequence[float] | None = None,
    repeat: bool = True,
    attach: Attach | None = None,
) -> BatchSource:
    """Microbatches of one data set for this rank. Collective over the world."""
    dataset = token_dataset(
        config, inputs, name, prefixes, num_samples, weights=weights, repeat=repeat
    )
    return BatchSource(
        dataset,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
        vocab_size=inputs.vocab_size,
        device=groups.platform.device,
        pad_last=not repeat,
        attach=attach,
    )

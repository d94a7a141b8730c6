"""Build a Run from a RunConfig: checks first, then groups, models, teacher and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_kd import __version__
from megatron_kd.checkpoint.saver import Saver
from megatron_kd.checkpoint.sharded_state import load_training_state, load_weights
from megatron_kd.checkpoint.store import CheckpointInfo
from megatron_kd.config import RunConfig
from megatron_kd.config.sections.divergence_section import divergence_parameters
from megatron_kd.data.batches import BatchSource, Microbatch
from megatron_kd.head.logit_rows import compile_rows
from megatron_kd.head.options import HeadOptions
from megatron_kd.losses import Divergence
from megatron_kd.losses.objective import Objective
from megatron_kd.losses.spec import LossSpec
from megatron_kd.models.student import Student
from megatron_kd.parallel.groups import Groups, start_groups
from megatron_kd.parallel.platform import start_platform
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.targets import Target
from megatron_kd.teacher.source import teacher_source
from megatron_kd.teacher.teacher import Teacher
from megatron_kd.train.capture import Capture, build_capture
from megatron_kd.train.datasets import build_train_data, build_valid_data
from megatron_kd.train.guards import RankTimes
from megatron_kd.train.hidden_states.hidden_state_loss import HiddenStates, build_hidden_states
from megatron_kd.train.optimizer import Optimizer
from megatron_kd.train.routing import RoutingThreshold, token_rules
from megatron_kd.train.run_progress import RunProgress
from megatron_kd.train.schedule_values import alpha_at, learning_rate_at
from megatron_kd.train.startup.input_checks import Inputs, check_inputs, checkpoints_folder
from megatron_kd.train.startup.resume import attach_settings, choose_checkpoint


@dataclass(frozen=True)
class Run:
    """Hold one run, ready to step; only `progress` changes from outside."""

    config: RunConfig
    inputs: Inputs
    groups: Groups
    student: Student
    optimizer: Optimizer
    teacher: Teacher
    objective: Objective
    train_data: BatchSource
    valid_data: dict[str, BatchSource]
    progress: RunProgress
    capture: Capture
    hidden_states: HiddenStates
    times: RankTimes
    saver: Saver
    routing_threshold: RoutingThreshold

    @property
    def alpha(self) -> float:
        """Return the weight of the distillation loss in the coming step; 0 without a teacher."""
        if not self.config.teacher.enabled:
            return 0.0
        return alpha_at(self.progress.step, self.config.train.steps, self.config.distill)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the coming step."""
        return learning_rate_at(self.progress.step, self.config.train.steps, self.config.optimizer)

    def objective_of_step(
        self, microbatches: Sequence[Microbatch], targets: Sequence[Target | None]
    ) -> Objective:
        """Return the objective of the coming step.

        Args:
            microbatches: of the step.
            targets: of the microbatches.

        Collectives:
            Over the data-parallel group, if routing is by the batch.
        """
        return replace(
            self.objective,
            spec=replace(self.objective.spec, alpha=self.alpha),
            entropy_threshold=self.routing_threshold.of_step(microbatches, targets),
        )

    def save(self) -> None:
        """Write a checkpoint of the present step, and show what was captured up to it.

        Collective over the world. See Saver.
        """
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
            hidden_projections=[list(projection) for projection in self.inputs.projections],
            settings=dict(self.inputs.settings),
        )
        self.student.gather_weights()
        self.capture.stage()
        self.saver.save(info, self.student.models, self.optimizer)
        self.capture.publish()


def build_run(config: RunConfig, *, rendezvous: str | None = None) -> Run:
    """Check, join the world, build and load.

    Args:
        config: the run.
        rendezvous: how ranks meet, as in `start_groups`; None: as torchrun says.

    Collectives:
        Over the world, after the checks.
    """
    inputs, groups = _join_world(config, rendezvous)
    student, optimizer, progress = _build_student(config, inputs, groups)
    teacher = teacher_source(config).build(inputs.teacher, groups)
    hidden_states = build_hidden_states(config, student, teacher, groups)
    train_data = build_train_data(config, inputs, groups)
    valid_data = build_valid_data(config, inputs, groups)
    teacher.check_data(train_data.dataset, progress.consumed_samples)
    times = RankTimes(groups)
    student.on_drained += [times.drained, teacher.on_drained]
    return Run(
        config=config,
        inputs=inputs,
        groups=groups,
        student=student,
        optimizer=optimizer,
        teacher=teacher,
        objective=_objective(config, inputs, groups),
        train_data=train_data,
        valid_data=valid_data,
        progress=progress,
        capture=build_capture(config, inputs, groups, step=progress.step),
        hidden_states=hidden_states,
        times=times,
        saver=_build_saver(config, groups),
        routing_threshold=RoutingThreshold(config.distill.routing, groups),
    )


def _join_world(config: RunConfig, rendezvous: str | None) -> tuple[Inputs, Groups]:
    """Check the inputs, start the groups, and choose the checkpoint to resume together."""
    _, world_size, local_rank = world_from_environment()
    inputs = check_inputs(config, world_size=world_size)
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
    return attach_settings(config, choose_checkpoint(config, inputs)), groups


def _build_student(
    config: RunConfig, inputs: Inputs, groups: Groups
) -> tuple[Student, Optimizer, RunProgress]:
    """Build student and optimizer, and load what the run starts from."""
    student = Student(config, groups, vocab_size=inputs.vocab_size, projections=inputs.projections)
    if inputs.initial is not None:
        load_weights(inputs.initial, student.models, setting="checkpoint.initialize_from")
    optimizer = Optimizer(config, student)
    if inputs.resume is None:
        return student, optimizer, RunProgress()
    folder, info = inputs.resume
    load_training_state(folder, student.models, optimizer, setting="run.directory")
    progress = RunProgress(
        info.step, info.consumed_samples, info.consumed_tokens, info.nonfinite_steps
    )
    return student, optimizer, progress


def _build_saver(config: RunConfig, groups: Groups) -> Saver:
    return Saver(
        checkpoints_folder(config),
        config.checkpoint,
        device=groups.platform.device,
        watchdog=groups.watchdog,
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

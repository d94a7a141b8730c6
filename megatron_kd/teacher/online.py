"""Distil from a frozen teacher of this program that runs forward in every step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ModelSection, RunConfig
from megatron_kd.planning.flops import flops_per_token
from megatron_kd.planning.placement import PipelineWork, Placement, best_placement
from megatron_kd.storage.sampled_digests import sampled_folder_digest
from megatron_kd.teacher.source import (
    TeacherInputs,
    TeacherSource,
    check_checkpoint,
    check_layout,
    read_checkpoint_model,
)

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups
    from megatron_kd.teacher.teacher import Teacher

# Placement "auto" ignores gains below this share of a step. Where the model predicted 5 and 9 %
# (two ranks on gloo, tools/benchmarks), -3 and 4 % were measured.
MINIMUM_GAIN = 0.1


class Source(TeacherSource):
    """Source of an online teacher."""

    def read_model(self) -> ModelSection | None:
        """See TeacherSource."""
        return read_checkpoint_model(self.config.teacher.checkpoint)

    def check_inputs(
        self, vocab_size: int, tokenizer_digest: str | None, world_size: int
    ) -> TeacherInputs:
        """See TeacherSource."""
        inputs = check_checkpoint(self.config, vocab_size, tokenizer_digest)
        check_layout(self.config, inputs, world_size)
        return inputs

    def run_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return a digest of sampled blocks of the checkpoint."""
        assert inputs.folder is not None
        return {"teacher.checkpoint": sampled_folder_digest(inputs.folder)}

    def weights_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return the digest of the checkpoint."""
        from megatron_kd.checkpoint.store import checkpoint_digest

        assert inputs.folder is not None
        return {"teacher.checkpoint": checkpoint_digest(inputs.folder)}

    def weights_digest(self, inputs: TeacherInputs) -> str | None:
        """See TeacherSource."""
        from megatron_kd.teacher.runtime.online_teacher import digest_on_rank_zero

        assert inputs.folder is not None
        return digest_on_rank_zero(inputs.folder)

    def build(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """See TeacherSource."""
        from megatron_kd.parallel.groups import can_reverse_stages
        from megatron_kd.teacher.runtime.drain import DrainTeacher
        from megatron_kd.teacher.runtime.online_teacher import check_same_padding
        from megatron_kd.teacher.runtime.separate_layout import build_in_layout

        check_same_padding(self.config, inputs)
        placement = self.placement(inputs, groups.world_size, can_reverse=can_reverse_stages())
        teacher = build_in_layout(
            self.config, inputs, groups, reverse=placement.reverse, equal_counts=True
        )
        return DrainTeacher(teacher, groups.platform.device) if placement.prefetch else teacher

    def build_for_extraction(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """See TeacherSource."""
        from megatron_kd.teacher.runtime.online_teacher import build_online_teacher

        return build_online_teacher(self.config, inputs, groups)

    def placement(self, inputs: TeacherInputs, world_size: int, *, can_reverse: bool) -> Placement:
        """Return when the teacher runs, from teacher.overlap; the same on every rank.

        Args:
            inputs: the checked teacher.
            world_size: ranks of the job.
            can_reverse: torch can put the teacher's first stage on the last ranks.
        """
        config = self.config
        if (
            config.teacher.overlap == "none"
            or config.distill.dense
            or config.distill.hidden_states
            or inputs.model is None
        ):
            return Placement()
        return best_placement(
            _student_work(config, inputs.vocab_size, world_size),
            _teacher_work(config, inputs.model, inputs.vocab_size, world_size),
            same_layout=not config.teacher.has_separate_layout,
            can_reverse=can_reverse,
            gain=-math.inf if config.teacher.overlap == "drain" else MINIMUM_GAIN,
        )


def _student_work(config: RunConfig, vocab_size: int, world_size: int) -> PipelineWork:
    """Return the student's forward and backward work in FLOPs of one stage and microbatch."""
    length, parallel = config.batch.sequence_length, config.parallel
    flops = flops_per_token(config.model, vocab_size, length, forward_only=True)
    forward = flops * length * config.batch.micro_batch_size / (parallel.tensor * parallel.pipeline)
    backward_ratio = 3 if config.model.recompute == "full" else 2
    return PipelineWork(
        world_size,
        parallel.tensor,
        parallel.pipeline,
        config.num_microbatches(world_size),
        forward,
        backward_ratio * forward,
        parallel.virtual_pipeline,
    )


def _teacher_work(
    config: RunConfig, model: ModelSection, vocab_size: int, world_size: int
) -> PipelineWork:
    """Return the teacher's forward work in FLOPs of one stage and microbatch."""
    tensor, pipeline, micro_batch_size = config.teacher_layout(world_size)
    length = config.batch.sequence_length
    flops = flops_per_token(model, vocab_size, length, forward_only=True)
    count = config.batch.global_batch_size * tensor * pipeline // (micro_batch_size * world_size)
    forward = flops * length * micro_batch_size / (tensor * pipeline)
    return PipelineWork(world_size, tensor, pipeline, count, forward)

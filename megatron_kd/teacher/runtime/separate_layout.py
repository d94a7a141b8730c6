"""Run a live teacher in another layout than the student's, over the same ranks.

A student of a billion weights runs best without tensor parallelism; its teacher of seventy billion
may need eight ranks per layer. Samples travel to the teacher and sparse targets back, which is
little: 4 bytes per token one way, and 8 bytes per entry and 8 per token the other. Sending the
tokens, instead of reading them twice, guarantees that both models see the same samples, whether
they are training data, validation data, or samples that a cache does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.config import ParallelSection, RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.parallel.collectives import all_gather, exchange
from megatron_kd.parallel.groups import Groups, start_separate_layout
from megatron_kd.targets import Target
from megatron_kd.teacher.runtime.message_packing import (
    KEY_WORDS,
    TargetLayout,
    agree_on_layout,
    pack_targets,
    unpack_targets,
)
from megatron_kd.teacher.runtime.online_teacher import OnlineTeacher, build_online_teacher
from megatron_kd.teacher.runtime.split import Split
from megatron_kd.teacher.source import TeacherInputs
from megatron_kd.teacher.teacher import Teacher


class SeparateLayoutTeacher(Teacher):
    """Exchange samples and targets between the student's ranks and an `OnlineTeacher`.

    Two all-to-alls over the world per step; each rank receives only what it needs. Every rank calls
    `targets` together.

    Args:
        model: the teacher, on its own groups.
        student: the student's groups.
        micro_batch_size: sequences in one forward pass of the teacher.
        equal_counts: every replica of the student always asks for equally many samples. Otherwise
            they exchange their counts, with one more all-gather.
    """

    def __init__(
        self,
        model: OnlineTeacher,
        student: Groups,
        *,
        micro_batch_size: int,
        equal_counts: bool = True,
    ) -> None:
        self.model, self.student, self.groups = model, student, model.groups
        self.micro_batch_size, self.equal_counts = micro_batch_size, equal_counts
        self.sequence_length = model.sequence_length
        self._layout: TargetLayout | None = None

    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """See Teacher. Collective over the world."""
        split = self._split(microbatches)
        if not split.total:
            return [None] * len(microbatches)
        watchdog = self.student.watchdog
        watchdog.enter_phase("finding the teacher's samples")
        samples = self._fetch(split, microbatches)
        watchdog.enter_phase("running the teacher")
        targets = self.model.targets(self._microbatches(samples))
        if self._layout is None:
            self._layout = agree_on_layout(targets, self.student)
        watchdog.enter_phase("packing targets")
        packed = pack_targets(targets, samples, self._layout)
        return self._deliver(split, packed, self._layout, microbatches)

    def local_work(self, microbatches: Sequence[Microbatch]) -> tuple[Teacher, list[Microbatch]]:
        """See Teacher. Collective over the world."""
        samples = self._fetch(self._split(microbatches), microbatches)
        return self.model, self._microbatches(samples)

    def _split(self, microbatches: Sequence[Microbatch]) -> Split:
        student = self.student
        count = sum(len(microbatch.tokens) for microbatch in microbatches)
        if self.equal_counts or student.world_size == 1:
            return Split((count,) * student.data_size, self.groups.data_size)
        local = torch.tensor([count], device=student.platform.device)
        counts = all_gather(local, dist.group.WORLD).flatten().tolist()
        by_replica = (
            counts[student.rank_of(replica, 0, 0)] for replica in range(student.data_size)
        )
        return Split(tuple(by_replica), self.groups.data_size)

    def _fetch(self, split: Split, microbatches: Sequence[Microbatch]) -> Tensor:
        """Return int32 [N, S + 4]: marked tokens and keys of the samples of this teacher replica.

        One all-to-all over the world.
        """
        student = self.student
        width = self.sequence_length + KEY_WORDS
        local = _samples_of(microbatches, width, student)
        first = split.of_student(student.data_rank).start
        sends, sizes = {}, {}
        for part in split.ranges():
            for receiver in self.groups.replica(part.teacher):
                # Any rank of the replica has its samples, also the receiver itself.
                sender = student.load_balanced_rank(part.student, receiver)
                if sender == student.rank:
                    sends[receiver] = local[part.start - first : part.stop - first]
                if receiver == student.rank:
                    sizes[sender] = (part.stop - part.start) * width
        student.watchdog.enter_phase("waiting for samples of other ranks")
        received = exchange(sends, sizes, like=local)
        if not sizes:
            return local[:0]
        # A replica of the student sends from one rank, and they come in the order of the samples.
        return torch.cat([received[sender] for sender in sizes]).view(-1, width)

    def _microbatches(self, samples: Tensor) -> list[Microbatch]:
        """Return samples in the teacher's microbatches; its last sample fills up the last one."""
        missing = -len(samples) % self.micro_batch_size
        if missing:
            samples = torch.cat([samples, samples[-1:].expand(missing, -1)])
        parts = samples.split(self.micro_batch_size) if len(samples) else ()
        return [self._microbatch(part) for part in parts]

    def _microbatch(self, samples: Tensor) -> Microbatch:
        marked_tokens = samples[:, : self.sequence_length].long()
        keys = samples[:, self.sequence_length :]
        return Microbatch.of(
            marked_tokens,
            marked_tokens.new_full(marked_tokens.shape, -100),
            marked_tokens.float() * 0,
            torch.full((len(samples),), -1, device=samples.device),
            within_documents=self.model.within_documents,
            keys=keys.clone(memory_format=torch.contiguous_format).view(torch.int64),
        )

    def _deliver(
        self,
        split: Split,
        packed: Tensor,
        layout: TargetLayout,
        microbatches: Sequence[Microbatch],
    ) -> list[Target | None]:
        """Send targets to the last stages of the replicas that train on their samples.

        Args:
            split: of the step.
            packed: int32 [N, S * W + 4], the targets of this teacher replica.
            layout: what a target consists of.
            microbatches: the student's.

        Collectives:
            One all-to-all over the world, one all-gather over the student's tensor group.
        """
        student = self.student
        bounds = self._slice_bounds()
        sends, sizes = self._target_routes(split, packed, layout, bounds)
        student.watchdog.enter_phase("waiting for targets of other ranks")
        received = exchange(sends, sizes, like=packed)
        if not student.is_last_stage or not microbatches:
            return [None] * len(microbatches)
        samples = torch.cat([received[sender] for sender in sizes]).view(
            split.counts[student.data_rank], -1
        )
        _check_keys(samples[:, -KEY_WORDS:], microbatches)
        numbers = _gather_positions(samples[:, :-KEY_WORDS], bounds, student, layout)
        return unpack_targets(
            numbers, layout, [len(microbatch.tokens) for microbatch in microbatches]
        )

    def _slice_bounds(self) -> list[int]:
        """Return the first position of each tensor-parallel rank's slice, and the last bound."""
        size = self.student.tensor_size
        return [rank * self.sequence_length // size for rank in range(size + 1)]

    def _target_routes(
        self, split: Split, packed: Tensor, layout: TargetLayout, bounds: Sequence[int]
    ) -> tuple[dict[int, Tensor], dict[int, int]]:
        """Return what this rank sends to other ranks, and how many numbers it gets from which.

        A tensor-parallel group receives each target once, a slice of the positions on each rank.
        """
        student, teacher = self.student, self.groups
        first = split.of_teacher(teacher.data_rank).start
        sends, sizes = {}, {}
        for part in split.ranges():
            for tensor in range(student.tensor_size):
                sender = teacher.rank_of(
                    part.teacher, teacher.pipeline_size - 1, tensor % teacher.tensor_size
                )
                receiver = student.rank_of(part.student, student.pipeline_size - 1, tensor)
                start, stop = (bound * layout.width for bound in bounds[tensor : tensor + 2])
                if sender == student.rank:
                    samples = packed[part.start - first : part.stop - first]
                    sends[receiver] = torch.cat(
                        [samples[:, start:stop], samples[:, -KEY_WORDS:]], 1
                    )
                if receiver == student.rank:
                    sizes[sender] = (part.stop - part.start) * (stop - start + KEY_WORDS)
        return sends, sizes


def _samples_of(microbatches: Sequence[Microbatch], width: int, student: Groups) -> Tensor:
    """Return int32 [N, width]: the marked tokens and the key of each sample of microbatches."""
    if not microbatches:
        return torch.zeros(0, width, dtype=torch.int32, device=student.platform.device)
    return torch.cat(
        [
            torch.cat([batch.marked_tokens.int(), batch.sample_keys.view(torch.int32)], 1)
            for batch in microbatches
        ]
    )


def _gather_positions(
    slices: Tensor, bounds: Sequence[int], student: Groups, layout: TargetLayout
) -> Tensor:
    """Return [n, S, W] from this rank's slice of the positions, [n, s * W].

    Collectives:
        One all-gather over the student's tensor group.
    """
    if student.tensor_size == 1:
        return slices.reshape(len(slices), -1, layout.width)
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    filled = slices.new_zeros(len(slices), max(lengths) * layout.width)
    filled[:, : slices.shape[1]] = slices
    gathered = all_gather(filled, student.tp).view(
        student.tensor_size, len(slices), -1, layout.width
    )
    parts = [part[:, :length] for part, length in zip(gathered, lengths, strict=True)]
    return torch.cat(parts, 1)


def _check_keys(keys: Tensor, microbatches: Sequence[Microbatch]) -> None:
    """Raise RuntimeError if targets came back for other samples than those of the microbatches.

    They would teach the wrong thing silently. On a GPU the check does not wait for the result.
    """
    expected = torch.cat([microbatch.sample_keys for microbatch in microbatches])
    equal = (keys == expected.view(torch.int32).to(keys.device)).all()
    if equal.is_cuda:
        torch._assert_async(equal)
    elif not equal:
        raise RuntimeError(
            "the teacher's targets came back for other samples than the student asked for"
        )


def build_in_layout(
    config: RunConfig,
    inputs: TeacherInputs,
    groups: Groups,
    *,
    reverse: bool,
    equal_counts: bool,
) -> Teacher:
    """Build the teacher of teacher.checkpoint in the layout that the run file gives it.

    Args:
        config: the run.
        inputs: its checked teacher.
        groups: the student's groups.
        reverse: put the teacher's first pipeline stage on the last ranks.
        equal_counts: see SeparateLayoutTeacher.

    Collectives:
        Over the world.
    """
    if not config.teacher.has_separate_layout and not reverse:
        layers = {pair.teacher_layer for pair in config.distill.hidden_states}
        return build_online_teacher(config, inputs, groups, layers=layers)
    tensor, pipeline, micro_batch_size = config.teacher_layout(groups.world_size)
    teacher_groups = start_separate_layout(
        groups,
        tensor=tensor,
        pipeline=pipeline,
        timeout_seconds=config.train.timeout_seconds,
        reversed_stages=reverse,
    )
    sequence_parallel = config.parallel.sequence_parallel and not config.teacher.has_separate_layout
    layout = ParallelSection(tensor=tensor, pipeline=pipeline, sequence_parallel=sequence_parallel)
    model = build_online_teacher(
        config.model_copy(update={"parallel": layout}), inputs, teacher_groups
    )
    return SeparateLayoutTeacher(
        model, groups, micro_batch_size=micro_batch_size, equal_counts=equal_counts
    )

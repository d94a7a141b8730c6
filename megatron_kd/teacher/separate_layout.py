"""A live teacher in a layout of its own over the student's ranks: samples go to it, sparse targets come back.

A student of a billion weights runs best without tensor parallelism, its teacher of seventy may need eight ranks a layer. Only what
is small travels between the two: 4 bytes a token there, and 8 bytes an entry and 8 a token back. (Tokens could be read from the data
set a second time instead; sent, they are those that the student trains on, whatever they come from: training, validation, or what a
cache does not hold.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.batches import Microbatch
from megatron_kd.parallel.collectives import all_gather, exchange
from megatron_kd.parallel.groups import Groups
from megatron_kd.targets import Target
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.online import OnlineTeacher
from megatron_kd.teacher.split import Split

KEY_WORDS = 4  # a sample's 128-bit name as int32


class Form(NamedTuple):
    """What a target consists of; the same on every rank."""

    slots: int
    has_tail: bool
    has_entropy: bool
    sampled: bool
    temperature: float

    @property
    def width(self) -> int:
        """Numbers of four bytes for a token."""
        return 2 * self.slots + self.has_tail + self.has_entropy


class OwnLayoutTeacher:
    """TeacherSource: an `OnlineTeacher` on groups of its own, fed and read by the student's ranks.

    Two all-to-alls over the world a step; each rank gets what it needs and nothing else. Every rank calls `targets` together.

    Args:
        teacher: on its own groups.
        student: the student's groups.
        micro_batch_size: sequences in one forward pass of the teacher.
        even: every replica of the student always asks for as many samples; else they tell each other how many, one all-gather more.
    """

    def __init__(
        self, teacher: OnlineTeacher, student: Groups, *, micro_batch_size: int, even: bool = True
    ) -> None:
        self.teacher, self.student, self.own = teacher, student, teacher.groups
        self.micro_batch_size, self.even = micro_batch_size, even
        self.sequence_length = teacher.sequence_length
        self._form: Form | None = None

    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """See TeacherSource. Collective over the world."""
        split = self._split(microbatches)
        if not split.total:
            return [None] * len(microbatches)
        watchdog = self.student.watchdog
        watchdog.enter_phase("finding the teacher's samples")
        rows = self._fetch(split, microbatches)
        watchdog.enter_phase("running the teacher")
        found = self.teacher.targets(self._microbatches(rows))
        if self._form is None:
            self._form = _agree(found, self.student)
        watchdog.enter_phase("packing targets")
        own = _pack(found, rows, self._form, self.sequence_length)
        return self._deliver(split, own, self._form, microbatches)

    def share(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """What this rank's replica of the teacher works on of the student's microbatches, as its own. Collective over the world."""
        return self._microbatches(self._fetch(self._split(microbatches), microbatches))

    def _split(self, microbatches: Sequence[Microbatch]) -> Split:
        count = sum(len(each.tokens) for each in microbatches)
        if self.even or self.student.world_size == 1:
            return Split((count,) * self.student.data_size, self.own.data_size)
        counts = (
            all_gather(torch.tensor([count], device=self.student.platform.device), dist.group.WORLD)
            .flatten()
            .tolist()
        )
        return Split(
            tuple(
                counts[self.student.rank_of(data, 0, 0)] for data in range(self.student.data_size)
            ),
            self.own.data_size,
        )

    def _fetch(self, split: Split, microbatches: Sequence[Microbatch]) -> Tensor:
        """[N, S + 4] int32, the samples that this replica of the teacher works on: tokens and names."""
        student, own = self.student, self.own
        width = self.sequence_length + KEY_WORDS
        mine = [
            torch.cat([each.named.int(), each.sample_keys.view(torch.int32)], 1)
            for each in microbatches
        ]
        rows = (
            torch.cat(mine)
            if mine
            else torch.zeros(0, width, dtype=torch.int32, device=student.platform.device)
        )
        first = split.owned(student.data_rank).start
        sends, sizes = {}, {}
        for part in split.ranges():
            for receiver in own.replica(part.worker):
                sender = student.load_balanced_rank(
                    part.owner, receiver
                )  # any rank of the replica has its samples, also the receiver itself
                if sender == student.rank:
                    sends[receiver] = rows[part.start - first : part.stop - first]
                if receiver == student.rank:
                    sizes[sender] = (part.stop - part.start) * width
        self.student.watchdog.enter_phase("waiting for samples of other ranks")
        received = exchange(sends, sizes, like=rows)
        # A replica of the student sends from one rank, and they come in the order of the samples.
        return (
            torch.cat([received[sender] for sender in sizes]).view(-1, width) if sizes else rows[:0]
        )

    def _microbatches(self, rows: Tensor) -> list[Microbatch]:
        """The teacher's own microbatches; a last one that is not full is filled up with its last sample."""
        missing = -len(rows) % self.micro_batch_size
        full = torch.cat([rows, rows[-1:].expand(missing, -1)]) if missing else rows
        found = []
        for part in full.split(self.micro_batch_size) if len(full) else ():
            named = part[:, : self.sequence_length].long()
            keys = (
                part[:, self.sequence_length :]
                .clone(memory_format=torch.contiguous_format)
                .view(torch.int64)
            )
            ids = torch.full((len(named),), -1, device=named.device)
            within = self.teacher.within_documents
            found.append(
                Microbatch.of(
                    named,
                    named.new_full(named.shape, -100),
                    named.float() * 0,
                    ids,
                    within_documents=within,
                    keys=keys,
                )
            )
        return found

    def _deliver(
        self, split: Split, packed: Tensor, form: Form, microbatches: Sequence[Microbatch]
    ) -> list[Target | None]:
        """Targets to the last stage of the replicas whose samples they are. packed: [N, S * W + 4], of this teacher's replica."""
        student, own = self.student, self.own
        first = split.worked(own.data_rank).start
        bounds = [
            rank * self.sequence_length // student.tensor_size
            for rank in range(student.tensor_size + 1)
        ]
        sends, sizes = {}, {}
        for part in split.ranges():
            # A tensor-parallel group gets each target once, a slice of the positions on each rank, and puts it together itself.
            for tensor in range(student.tensor_size):
                sender = own.rank_of(part.worker, own.pipeline_size - 1, tensor % own.tensor_size)
                receiver = student.rank_of(part.owner, student.pipeline_size - 1, tensor)
                start, stop = (bound * form.width for bound in bounds[tensor : tensor + 2])
                if sender == student.rank:
                    rows = packed[part.start - first : part.stop - first]
                    sends[receiver] = torch.cat([rows[:, start:stop], rows[:, -KEY_WORDS:]], 1)
                if receiver == student.rank:
                    sizes[sender] = (part.stop - part.start) * (stop - start + KEY_WORDS)
        self.student.watchdog.enter_phase("waiting for targets of other ranks")
        received = exchange(sends, sizes, like=packed)
        if not student.is_last_stage or not microbatches:
            return [None] * len(microbatches)
        rows = torch.cat([received[sender] for sender in sizes]).view(
            split.counts[student.data_rank], -1
        )
        _check_names(rows[:, -KEY_WORDS:], microbatches)
        return _unpack(_whole(rows[:, :-KEY_WORDS], bounds, student, form), form, microbatches)


def _agree(found: Sequence[Target | None], groups: Groups) -> Form:
    """Every rank learns what the teacher's last stage made. One all-reduce over the world."""
    known = [0.0] * 5
    for target in found:
        if isinstance(target, SparseTarget):
            tail, entropy = target.log_tail is not None, target.entropy is not None
            known = [
                target.indices.shape[-1],
                float(tail),
                float(entropy),
                float(target.sampled),
                target.temperature,
            ]
    told = torch.tensor(known, dtype=torch.float64, device=groups.platform.device)
    if groups.world_size > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    slots, has_tail, has_entropy, sampled, temperature = told.tolist()
    return Form(int(slots), bool(has_tail), bool(has_entropy), bool(sampled), temperature)


def _pack(found: Sequence[Target | None], rows: Tensor, form: Form, sequence_length: int) -> Tensor:
    """[N, S * W + 4] int32: of each sample its numbers, position by position, and its name; nothing off the teacher's last stage."""
    made = [target for target in found if isinstance(target, SparseTarget)]
    if not made:
        return rows[:0]
    parts = []
    for target in made:
        columns = [target.indices.int(), target.logprobs.float().view(torch.int32)]
        columns += [
            each.float().unsqueeze(-1).view(torch.int32)
            for each in (target.log_tail, target.entropy)
            if each is not None
        ]
        parts.append(torch.cat(columns, -1).transpose(0, 1))
    numbers = torch.cat(parts)[: len(rows)].reshape(len(rows), sequence_length * form.width)
    return torch.cat([numbers, rows[:, sequence_length:]], 1)


def _whole(rows: Tensor, bounds: Sequence[int], student: Groups, form: Form) -> Tensor:
    """[n, S, W] from this rank's slice of the positions [n, s * W]. One all-gather over the student's tensor group."""
    if student.tensor_size == 1:
        return rows.reshape(len(rows), -1, form.width)
    slices = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    filled = rows.new_zeros(len(rows), max(slices) * form.width)
    filled[:, : rows.shape[1]] = rows
    gathered = all_gather(filled, student.tp).view(student.tensor_size, len(rows), -1, form.width)
    return torch.cat([part[:, :size] for part, size in zip(gathered, slices, strict=True)], 1)


def _unpack(numbers: Tensor, form: Form, microbatches: Sequence[Microbatch]) -> list[Target | None]:
    """[n, S, W] -> a target [S, B, K] for each microbatch."""
    found: list[Target | None] = []
    for part in numbers.split([len(each.tokens) for each in microbatches]):
        columns = part.transpose(0, 1).contiguous()
        rest = columns[..., 2 * form.slots :].contiguous().view(torch.float32)
        found.append(
            SparseTarget(
                columns[..., : form.slots].contiguous(),
                columns[..., form.slots : 2 * form.slots].contiguous().view(torch.float32),
                rest[..., 0].contiguous() if form.has_tail else None,
                rest[..., -1].contiguous() if form.has_entropy else None,
                form.temperature,
                form.sampled,
            )
        )
    return found


def _check_names(names: Tensor, microbatches: Sequence[Microbatch]) -> None:
    """Targets of other samples than those asked for would teach silently the wrong thing. On a GPU nobody waits for the answer."""
    wanted = torch.cat([each.sample_keys for each in microbatches]).view(torch.int32)
    same = (names == wanted.to(names.device)).all()
    if same.is_cuda:
        torch._assert_async(same)
    elif not same:
        raise RuntimeError(
            "the teacher's targets came back for other samples than the student asked for"
        )

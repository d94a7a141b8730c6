"""Hold everything that the cost model needs to know about a run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config import ModelSection, RunConfig
from megatron_kd.planning.shape import MicrobatchLayout, RankShape, shape_of


@dataclass(frozen=True)
class PlannedRun:
    """Hold a run file's values, the true vocabulary size, and the shape of the teacher.

    Attributes:
        config: the run file.
        vocab_size: true vocabulary size, without padding.
        teacher: shape of the teacher; None where there is none or its shape is not known.
        device: "cuda" or "cpu".
    """

    config: RunConfig
    vocab_size: int
    teacher: ModelSection | None = None
    device: str = "cuda"

    @property
    def student_shape(self) -> RankShape:
        """Return one rank's part of the student."""
        parallel = self.config.parallel
        return self._shape(
            self.config.model,
            parallel.tensor,
            self.config.batch.micro_batch_size,
            sequence_parallel=parallel.sequence_parallel,
        )

    def teacher_shape(self, world_size: int) -> RankShape:
        """Return one rank's part of the teacher."""
        assert self.teacher is not None
        tensor, _, micro_batch_size = self.config.teacher_layout(world_size)
        sequence_parallel = (
            self.config.parallel.sequence_parallel and not self.config.teacher.has_separate_layout
        )
        return self._shape(
            self.teacher, tensor, micro_batch_size, sequence_parallel=sequence_parallel
        )

    def _shape(
        self, model: ModelSection, tensor: int, micro_batch_size: int, *, sequence_parallel: bool
    ) -> RankShape:
        layout = MicrobatchLayout(
            tensor=tensor,
            sequence_parallel=sequence_parallel,
            micro_batch_size=micro_batch_size,
            sequence_length=self.config.batch.sequence_length,
            precision=self.config.train.precision,
            device=self.device,
            within_documents=self.config.data.document_attention == "within",
        )
        return shape_of(model, self.vocab_size, layout)

    @property
    def target_entries(self) -> int:
        """Return the number of entries of a sparse target."""
        return self.config.distill.num_draws or self.config.distill.top_k

    @property
    def has_live_teacher(self) -> bool:
        """Return True if a teacher of known shape runs forward in every step."""
        return self.config.teacher.runs_in_job and self.teacher is not None

"""Define the interface of a running teacher, which the training step calls."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_kd.data.batches import Microbatch
    from megatron_kd.data.dataset import TokenDataset
    from megatron_kd.targets import Target


class TeacherLayers:
    """Give access to the outputs of a teacher's layers, counted from 1 over the whole model."""

    num_layers: int
    layers_on_rank: set[int]
    dtype: torch.dtype

    def microbatch_shape(self, micro_batch_size: int) -> tuple[int, int, int]:
        """Return the shape [S, B, H] of one layer's output on this rank."""
        raise NotImplementedError

    def take_outputs(self) -> list[dict[int, Tensor]]:
        """Return and forget the layer outputs of the last `targets`: a dict per microbatch.

        Each maps the layers on this rank to their outputs [S, B, H]; under sequence parallelism S
        is the rank's slice.
        """
        raise NotImplementedError


class Teacher:
    """Base class of running teachers."""

    # Set by teachers that show the outputs of their layers.
    layers: TeacherLayers | None = None

    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """Return one target per microbatch, the same on every tensor-parallel rank.

        Sparse targets are [S, B, K]. Ranks that do not hold the student's last stage get None.

        Args:
            microbatches: of one step, on the device.
            step: number of the training step that reads the microbatches, which finds what
                `prefetch` prepared; None for held-out data, of which a cache may lack samples.

        Collectives:
            May be collective over the teacher's groups; every rank calls it once per step.
        """
        raise NotImplementedError

    def prefetch(self, upcoming: Future[list[Microbatch]] | None, *, step: int) -> None:
        """Prepare the targets of a coming step, as far as the teacher can do that early.

        Args:
            upcoming: the step's microbatches in CPU memory, once they are read; None after the
                last step.
            step: number of the training step.
        """

    def wait_for_prefetch(self, step: int) -> None:
        """Wait until the targets of a step are read from disk, if they were prefetched from it."""

    def on_drained(self) -> None:
        """Use the time in which the student's pipeline drains. Collective as `targets` is."""

    def check_data(self, dataset: TokenDataset, first_sample: int) -> None:
        """Check that the teacher has targets for a run's data from a sample on. No collective.

        Raises:
            ConfigError: targets are missing.
        """

    def local_work(self, microbatches: Sequence[Microbatch]) -> tuple[Teacher, list[Microbatch]]:
        """Return the model that runs on this rank, and its share of the microbatches.

        Collectives:
            May be collective over the world.
        """
        return self, list(microbatches)

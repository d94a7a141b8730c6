"""Build the process groups of a run.

This is the only reader of megatron-core's `parallel_state`. All other code is handed a `Groups`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_kd.config import ParallelSection
from megatron_kd.parallel.platform import Platform
from megatron_kd.parallel.watchdog import Watchdog
from megatron_kd.parallel.world import world_from_environment


@dataclass(frozen=True)
class Groups:
    """Hold this rank's position in a parallel layout, and its process groups.

    Attributes:
        platform: Device and backend.
        world_size: Ranks of the world.
        rank: This rank of the world.
        tensor_rank: Rank in the tensor-parallel group.
        tensor_size: Tensor-parallel size.
        pipeline_rank: Pipeline stage.
        pipeline_size: Pipeline-parallel size.
        data_rank: Data-parallel replica.
        data_size: Data-parallel size.
        virtual_pipeline: Model chunks per stage.
        collection: megatron-core's groups.
        watchdog: Reports to the other ranks which phase this one is in.
        reversed_stages: True if the first pipeline stage is on the last ranks.
    """

    platform: Platform
    world_size: int
    rank: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    virtual_pipeline: int
    collection: ProcessGroupCollection
    watchdog: Watchdog
    reversed_stages: bool = False

    @property
    def tp(self) -> dist.ProcessGroup | None:
        """Return the tensor-parallel group, None if it has one rank and needs no collective."""
        return self.collection.tp if self.tensor_size > 1 else None

    @property
    def is_last_stage(self) -> bool:
        """Return True if this rank holds the output head."""
        return self.pipeline_rank == self.pipeline_size - 1

    def rank_of(self, data: int, pipeline: int, tensor: int) -> int:
        """Return the rank at a position of the layout.

        Ranks count through tensor first, then data, then pipeline.

        Args:
            data: Data-parallel replica.
            pipeline: Pipeline stage.
            tensor: Rank in the tensor-parallel group.
        """
        stage = self.pipeline_size - 1 - pipeline if self.reversed_stages else pipeline
        return tensor + self.tensor_size * (data + self.data_size * stage)

    def replica(self, data: int) -> list[int]:
        """Return all ranks of a data-parallel replica."""
        return [
            self.rank_of(data, pipeline, tensor)
            for pipeline in range(self.pipeline_size)
            for tensor in range(self.tensor_size)
        ]

    def load_balanced_rank(self, data: int, rank: int) -> int:
        """Return `rank` if it is in the replica `data`, else spread requests over its ranks."""
        ranks = self.replica(data)
        return rank if rank in ranks else ranks[rank % len(ranks)]

    @property
    def reports_loss(self) -> bool:
        """Return True on one rank per data-parallel replica.

        The loss is the same on all tensor-parallel ranks of the last stage.
        """
        return self.is_last_stage and self.tensor_rank == 0


def start_groups(
    platform: Platform,
    parallel: ParallelSection,
    *,
    timeout_seconds: float,
    rendezvous: str | None = None,
) -> Groups:
    """Join the world and build every group. Collective over the world.

    Sizes must have been checked (`RunConfig.data_parallel_size`).

    Args:
        platform: Device and backend.
        parallel: Sizes of the layout.
        timeout_seconds: Longest wait of a collective.
        rendezvous: Where the ranks meet, such as "file:///..."; None for torchrun's variables.
    """
    rank, world_size, _ = world_from_environment()
    if not dist.is_initialized():
        _join_world(platform, rendezvous, timeout=timedelta(seconds=timeout_seconds))
    _forget_model_groups()
    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        create_gloo_process_groups=False,
    )
    store = dist.distributed_c10d._get_default_store()
    groups = Groups(
        platform=platform,
        world_size=world_size,
        rank=rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        virtual_pipeline=virtual,
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        watchdog=Watchdog(store, rank=rank, world_size=world_size, limit_seconds=timeout_seconds),
    )
    seed_step(0, 0, groups)  # building layers needs the generators to exist
    return groups


def _join_world(platform: Platform, rendezvous: str | None, *, timeout: timedelta) -> None:
    rank, world_size, _ = world_from_environment()
    if rendezvous is None and world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            platform.backend, store=store, rank=0, world_size=1, timeout=timeout
        )
        return
    dist.init_process_group(
        platform.backend,
        init_method=rendezvous or "env://",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def can_reverse_stages() -> bool:
    """Return True if this torch keeps the order of a group's ranks (since 2.13).

    `reversed_stages` needs it.
    """
    return "sort_ranks" in inspect.signature(dist.new_group).parameters


def start_separate_layout(
    student: Groups,
    *,
    tensor: int,
    pipeline: int,
    timeout_seconds: float,
    reversed_stages: bool = False,
) -> Groups:
    """Build a separate parallel layout over the same ranks. Collective over the world.

    It serves a model that is handed its groups. Ranks are numbered as in `start_groups`.

    Args:
        student: Layout of the student.
        tensor: Tensor-parallel size. tensor * pipeline must divide the world size.
        pipeline: Pipeline-parallel size.
        timeout_seconds: Longest wait of a collective.
        reversed_stages: True to place the first pipeline stage on the last ranks.
    """
    data = student.world_size // (tensor * pipeline)
    grid = HyperCommGrid([tensor, 1, data, pipeline], ["tp", "cp", "dp", "pp"])
    collection = _create_collection(
        grid, timeout=timedelta(seconds=timeout_seconds), reversed_stages=reversed_stages
    )
    return Groups(
        platform=student.platform,
        world_size=student.world_size,
        rank=student.rank,
        tensor_rank=dist.get_rank(collection.tp),
        tensor_size=tensor,
        pipeline_rank=dist.get_rank(collection.pp),
        pipeline_size=pipeline,
        data_rank=dist.get_rank(collection.dp),
        data_size=data,
        virtual_pipeline=1,
        collection=collection,
        watchdog=student.watchdog,
        reversed_stages=reversed_stages,
    )


def _create_collection(
    grid: HyperCommGrid, *, timeout: timedelta, reversed_stages: bool
) -> ProcessGroupCollection:
    dimensions = {
        "tp": "tp",
        "cp": "cp",
        "dp": "dp",
        "pp": "pp",
        "dp_cp": ["cp", "dp"],
        "mp": ["tp", "pp"],
    }
    collection = ProcessGroupCollection(
        **{name: grid.create_pg(dims, timeout=timeout) for name, dims in dimensions.items()}
    )
    pipelines = grid.get_rank_enum("pp")
    if reversed_stages:
        reversed_groups = [
            dist.new_group(ranks[::-1], timeout=timeout, sort_ranks=False) for ranks in pipelines
        ]
        collection.pp = next(group for group in reversed_groups if dist.get_rank(group) >= 0)
    # The last stage of a model with tied embeddings holds the weights of the first stage too.
    end_ranks = [sorted({ranks[0], ranks[-1]}) for ranks in pipelines]
    end_groups = [dist.new_group(ranks, timeout=timeout) for ranks in end_ranks]
    collection.embd = None
    for ranks, group in zip(end_ranks, end_groups, strict=True):
        if dist.get_rank() in ranks:
            collection.embd = group
    collection.pos_embd = None
    return collection


def _forget_model_groups() -> None:
    # megatron-core knows one layout at a time. A second run in this process replaces it.
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def stop_groups() -> None:
    """Leave the world.

    Call it on every rank, also after an error, so that no peer waits for this one.
    """
    _forget_model_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Seed dropout for one step as a function of (seed, step, rank).

    So a resumed run needs no saved generator state.

    Args:
        seed: Seed of the run.
        step: Finished updates.
        groups: This rank's position in the layout.
    """
    mixed = (
        (seed * 1_000_003 + step * 7_919) % (2**31 - 2**20)
        + 131 * groups.data_rank
        + 17 * groups.pipeline_rank
    )
    torch.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed, tp_rank=groups.tensor_rank, ep_rank=0, etp_rank=0)

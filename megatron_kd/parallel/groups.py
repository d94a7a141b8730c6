"""Process groups of a run. The only reader of megatron-core's `parallel_state`: everybody else is handed a Groups."""

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
    """This rank's place in the layout. `tp` is None for tensor-parallel size 1, so single-rank code costs no collective.

    watchdog: tells the other ranks where this one stands. reversed_stages: the first pipeline stage is on the last ranks.
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
        """The tensor-parallel group, None where it has one rank."""
        return self.collection.tp if self.tensor_size > 1 else None

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head."""
        return self.pipeline_rank == self.pipeline_size - 1

    def rank_of(self, data: int, pipeline: int, tensor: int) -> int:
        """The rank at this place of the layout: tensor counts fastest, then data, then pipeline."""
        place = self.pipeline_size - 1 - pipeline if self.reversed_stages else pipeline
        return tensor + self.tensor_size * (data + self.data_size * place)

    def replica(self, data: int) -> list[int]:
        """All ranks of a data-parallel replica."""
        return [
            self.rank_of(data, pipeline, tensor)
            for pipeline in range(self.pipeline_size)
            for tensor in range(self.tensor_size)
        ]

    def load_balanced_rank(self, data: int, rank: int) -> int:
        """`rank` itself where it is one of the replica's, else one of them, so that many askers share the answering."""
        ranks = self.replica(data)
        return rank if rank in ranks else ranks[rank % len(ranks)]

    @property
    def reports_loss(self) -> bool:
        """One rank per data-parallel replica: the loss is the same on all tensor-parallel ranks of the last stage."""
        return self.is_last_stage and self.tensor_rank == 0


def start_groups(
    platform: Platform,
    parallel: ParallelSection,
    *,
    timeout_seconds: float,
    rendezvous: str | None = None,
) -> Groups:
    """Join the world (torchrun's environment, or `rendezvous` such as "file:///...") and build every group.

    Collective over the whole world. Sizes must have been checked (`RunConfig.data_parallel_size`).
    """
    rank, world_size, _ = world_from_environment()
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        if rendezvous is None and world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(
                platform.backend, store=store, rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(
                platform.backend,
                init_method=rendezvous or "env://",
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
    _forget_model_groups()
    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        create_gloo_process_groups=False,
    )
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
        watchdog=Watchdog(
            dist.distributed_c10d._get_default_store(),
            rank=rank,
            world_size=world_size,
            limit_seconds=timeout_seconds,
        ),
    )
    seed_step(0, 0, groups)  # building layers needs the generators to exist
    return groups


def can_reverse_stages() -> bool:
    """Whether this torch keeps the order of a group's ranks, which `reversed_stages` needs (since 2.13)."""
    return "sort_ranks" in inspect.signature(dist.new_group).parameters


def start_separate_layout(
    first: Groups,
    *,
    tensor: int,
    pipeline: int,
    timeout_seconds: float,
    reversed_stages: bool = False,
) -> Groups:
    """Another layout over the ranks of `first`, beside it: for a model whose groups are handed to it. Collective over the world.

    Sizes must divide the world. Ranks are numbered as in `start_groups`: tensor fastest, then data, then pipeline.
    """
    data = first.world_size // (tensor * pipeline)
    grid = HyperCommGrid([tensor, 1, data, pipeline], ["tp", "cp", "dp", "pp"])
    timeout = timedelta(seconds=timeout_seconds)
    named = {
        "tp": "tp",
        "cp": "cp",
        "dp": "dp",
        "pp": "pp",
        "dp_cp": ["cp", "dp"],
        "mp": ["tp", "pp"],
    }
    collection = ProcessGroupCollection(
        **{name: grid.create_pg(dims, timeout=timeout) for name, dims in named.items()}
    )
    if reversed_stages:
        pipelines = [
            dist.new_group(ranks[::-1], timeout=timeout, sort_ranks=False)
            for ranks in grid.get_rank_enum("pp")
        ]
        collection.pp = next(group for group in pipelines if dist.get_rank(group) >= 0)
    # The last stage of a tied model holds the first one's weights too.
    ends = [sorted({ranks[0], ranks[-1]}) for ranks in grid.get_rank_enum("pp")]
    members = [dist.new_group(ranks, timeout=timeout) for ranks in ends]
    mine = [group for ranks, group in zip(ends, members, strict=True) if first.rank in ranks]
    collection.embd = mine[0] if mine else None
    collection.pos_embd = None
    return Groups(
        platform=first.platform,
        world_size=first.world_size,
        rank=first.rank,
        tensor_rank=dist.get_rank(collection.tp),
        tensor_size=tensor,
        pipeline_rank=dist.get_rank(collection.pp),
        pipeline_size=pipeline,
        data_rank=dist.get_rank(collection.dp),
        data_size=data,
        virtual_pipeline=1,
        collection=collection,
        watchdog=first.watchdog,
        reversed_stages=reversed_stages,
    )


def _forget_model_groups() -> None:
    """megatron-core knows one layout at a time; a second run in this process takes its place."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def stop_groups() -> None:
    """Leave the world. Call on every rank, also after an error, so that no peer waits for this one."""
    _forget_model_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Seed dropout for one step as a function of (seed, step, rank) alone: resuming needs no saved generator."""
    mixed = (
        (seed * 1_000_003 + step * 7_919) % (2**31 - 2**20)
        + 131 * groups.data_rank
        + 17 * groups.pipeline_rank
    )
    torch.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed, tp_rank=groups.tensor_rank, ep_rank=0, etp_rank=0)

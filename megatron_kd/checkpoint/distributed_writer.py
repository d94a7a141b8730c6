"""Write megatron-core's distributed checkpoint in a thread of the rank that has the data.

Digests are computed on the way. megatron-core's own writer starts a manager process and forks a
writer for every file, even for a synchronous save: that costs five seconds, hangs in scripts
without a `__main__` guard or on machines without psutil, and gives no digests.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_kd.checkpoint.files import BACKEND, COMMON, DigestingFiles
from megatron_kd.checkpoint.manifest import FileRecord, wait_for_folder

PhaseReporter = Callable[[str], None]


class StateWriter(FileSystemWriterAsync):
    """Write one rank's part of a state.

    `write` needs no other rank and no megatron-core, so a thread may call it.

    Args:
        folder: of the checkpoint.
        copy: copy every tensor to CPU memory, so that training may continue meanwhile. Else each
            tensor is read when its turn comes, and one at a time is in memory twice.
    """

    def __init__(self, folder: Path, *, copy: bool) -> None:
        super().__init__(str(folder), thread_count=1)
        self.folder, self.fs, self._copy = folder, DigestingFiles(), copy
        self._name, self._items = "", list[tuple[WriteItem, Tensor | io.BytesIO]]()
        self._bytes: dict[str, bytes] = {}

    @property
    def records(self) -> dict[str, FileRecord]:
        """Return the record of every file that this rank has written."""
        return self.fs.written

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged: the folder exists already."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Resolve the data of a plan; the planning calls this last."""
        self._name = f"{plan.storage_data.prefix}0.distcp"
        resolved = [(item, planner.resolve_data(item)) for item in plan.items]
        self._items = [(item, _copied(data) if self._copy else data) for item, data in resolved]

    def add_common(self, common: dict[str, Any]) -> None:
        """Serialize the unsharded part of the state, for one rank to write."""
        content = io.BytesIO()
        torch.save(common, content)
        self._bytes = {COMMON: content.getvalue(), "metadata.json": json.dumps(BACKEND).encode()}

    def write(self, report_phase: PhaseReporter) -> list[WriteResult]:
        """Write this rank's files and make them durable; `report_phase` receives their names."""
        results: list[WriteResult] = []
        wait_for_folder(self.folder)
        for name, content in self._bytes.items():
            report_phase(f"writing {name}")
            with self.fs.create_stream(self.folder / name, "xb") as stream:
                stream.write(content)
        if self._items:
            report_phase(f"writing {self._name}")
            with self.fs.create_stream(self.folder / self._name, "xb") as stream:
                for item, data in self._items:
                    data = _detach(data)
                    results.append(
                        _write_item(
                            self.transforms,
                            stream,
                            data,
                            item,
                            self._name,
                            SerializationFormat.TORCH_SAVE,
                        )
                    )
        self._items = []
        return results


def plan_save(
    state: dict[str, Any], folder: Path, *, copy: bool
) -> tuple[StateWriter, Metadata | None]:
    """Plan which rank writes what of a sharded state.

    Args:
        state: megatron-core's sharded state.
        folder: of the checkpoint.
        copy: see `StateWriter`.

    Returns:
        This rank's writer, and on rank 0 the table of contents.

    Collectives:
        Over the world.
    """
    sharded, common = save_preprocess(state)
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = StateWriter(folder, copy=copy)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    (_, metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(renamed, False), writer, None, 0, planner=planner
    )
    if dist.get_rank() == 0:
        writer.add_common(common)
    return writer, metadata


def _copied(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    return data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data


def _detach(data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
    """Return the data on the CPU, without the rest of a buffer that it is a view of.

    torch.save would write the rest too.
    """
    if not isinstance(data, Tensor):
        return data
    data = data.detach().cpu()
    return (
        data.clone()
        if data.untyped_storage().nbytes() != data.numel() * data.element_size()
        else data
    )

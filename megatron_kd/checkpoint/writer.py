"""megatron-core's distributed checkpoint, written by the process that saves."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class InProcessSave(TorchDistSaveShardedStrategy):
    """The same files without helper processes.

    megatron-core's own writer starts a manager process and forks a writer for every file, even for a synchronous save: five
    seconds, and a hang in scripts without a `__main__` guard or machines without psutil.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:  # noqa: D102
        # Set before the writer asks for it, so that no manager process is started for a queue within one process.
        filesystem_async._results_queue = queue.Queue()
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)

        def write() -> None:
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            results: dict[int, Any] = {}
            problem: Exception | None = None
            done: queue.Queue[Any]
            pending: queue.Queue[int]
            for index, bucket in enumerate(writer.preload_tensors(writer.write_buckets, False)):
                done, pending = queue.Queue(), queue.Queue()
                pending.put(index)
                writer.write_preloaded_data(transforms, index, bucket, done, pending, True)
                _, written = done.get()
                if isinstance(written, Exception):
                    problem = written
                    break
                results[index] = written
            writer.results_queue.put(problem or results)

        return AsyncRequest(write if writer.write_buckets else None, (), request.finalize_fns)

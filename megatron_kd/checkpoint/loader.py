"""Read megatron-core's distributed checkpoint without running code that it contains.

torch and megatron-core would unpickle `.metadata` and every entry that is not a tensor. Here the
table of contents is read with the unpickler of `tensors.py`, everything else with torch's own for
weights only, whatever the environment says about it.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_kd.checkpoint.files import COMMON
from megatron_kd.checkpoint.tensors import read_metadata


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(
            value, map_location="cpu", weights_only=True
        )


class ShardedLoadStrategy(TorchDistLoadShardedStrategy):
    """Load sharded tensors with a reader and a planner that unpickle nothing.

    Args:
        setting: the run-file key that an error names.
    """

    def __init__(self, *, setting: str) -> None:
        super().__init__()
        self._what = setting

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        """Fill a sharded state.

        Raises:
            ConfigError: the table of contents contains anything else.

        Collectives:
            Over the world.
        """
        tensors = [
            tensor
            for tensor in nested_values(sharded_state_dict)
            if isinstance(tensor, ShardedTensor)
        ]
        requested, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        filled = cast(dict[str, Any], mcore_to_pyt_state_dict(requested, True))
        planner = _Planner(
            shapes_validation_sharded_tensors=[
                tensor for tensor in tensors if not tensor.allow_shape_mismatch
            ],
            allow_shape_mismatch_sharded_tensors={
                tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
            },
        )
        folder = Path(checkpoint_dir)
        reader = _Reader(folder, read_metadata(folder, setting=self._what))
        with warnings.catch_warnings():
            # The newer function gathers the keys of all ranks again, and requires equal ones.
            warnings.simplefilter("ignore", FutureWarning)
            dcp.state_dict_loader.load_state_dict(filled, reader, planner=planner)
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in filled.items()}
        restored = _replace_sharded_keys_with_state_dict_keys(loaded, flat, renamed)
        _restore_dict_types(restored, sharded_state_dict)
        return restored


class CommonLoadStrategy(TorchCommonLoadStrategy):
    """Load the unsharded part of a state, which may hold plain values only."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Return the part of the state that is not sharded."""
        path = Path(checkpoint_dir) / COMMON
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointingException(f"{path} does not exist") from error

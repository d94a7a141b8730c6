"""Read and write single tensors of a distributed checkpoint, without a model or megatron-core.

No process group is needed either. Weights are converted one tensor at a time, so a model of any
size passes through the memory of its largest tensor. The format (torch's distributed checkpoint: a
pickled `.metadata` and `.distcp` files) is read with an unpickler that knows only the classes such
a file needs: a checkpoint from elsewhere cannot run code here.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_kd.checkpoint.files import BACKEND, COMMON, DigestingFiles
from megatron_kd.checkpoint.manifest import FileRecord, write_file
from megatron_kd.config import ConfigError

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": (
        "Size",
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    # The class of the folder's name, as older and newer Pythons spell it.
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}


# Plain names in the checkpoint's own folder.
_DATA_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.distcp")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _member(kind: Any, name: Any) -> Any:
    """Return a member of an enumeration.

    Metadata written by Python 3.11.0 to 3.11.3 uses `getattr` for that.
    """
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which no checkpoint needs")


def read_metadata(folder: Path, *, setting: str) -> Metadata:
    """Return the table of contents of a distributed checkpoint.

    Raises:
        ConfigError: naming `what`, where there is none, or where it asks for anything else.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it holds something else")
        for location in metadata.storage_data.values():
            if not _DATA_FILE.fullmatch(location.relative_path) or location.transform_descriptors:
                raise pickle.UnpicklingError(
                    f"it asks for the file {location.relative_path!r}, "
                    "which is not one of a checkpoint's"
                )
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: {folder} holds no megatron-core distributed checkpoint "
            "(no .metadata file in it)"
        ) from None
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
    ) as error:
        raise ConfigError(
            f"{setting}: {path} cannot be read as the metadata of a checkpoint ({error}): "
            "use another copy"
        ) from error
    return metadata


@dataclass(frozen=True)
class TensorInfo:
    """Hold the whole shape and the type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorReader:
    """Read slices of a checkpoint's tensors, however they were sharded when written.

    Args:
        folder: of the checkpoint.
        setting: name of the checkpoint in error messages.

    Attributes:
        tensors: the stored tensors, by name.

    Raises:
        ConfigError: files are missing or damaged; also raised by `read`.
    """

    def __init__(self, folder: Path, *, setting: str) -> None:
        self.folder, self._what = folder, setting
        self._metadata = read_metadata(folder, setting=setting)
        self._stored = {
            name: stored
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self.tensors = {
            name: TensorInfo(tuple(stored.size), stored.properties.dtype)
            for name, stored in self._stored.items()
        }
        self._reader = FileSystemReader(str(folder))
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a slice of tensor `name` in its stored type, on the CPU.

        Args:
            name: of the tensor.
            offset: first index in each dimension.
            shape: of the slice.
        """
        stored = self._stored[name]
        target = torch.empty(tuple(shape), dtype=stored.properties.dtype)
        items, filled = [], 0
        for number, chunk in enumerate(stored.chunks):
            item = _overlap(name, number, chunk, offset, shape)
            if item is not None:
                items.append(item)
                filled += item.lengths.numel()
        if filled != target.numel():
            raise ConfigError(
                f"{self._what}: {self.folder} does not hold the whole of {name}: use another copy"
            )
        try:
            planner: Any = _TargetPlanner(target)
            self._reader.read_data(LoadPlan(items), planner)
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
            AssertionError,
        ) as error:
            raise ConfigError(
                f"{self._what}: {name} cannot be read from {self.folder} "
                f"({type(error).__name__}: {str(error).splitlines()[0][:120]}): use another copy"
            ) from error
        return target


def _overlap(
    name: str, number: int, chunk: ChunkStorageMetadata, offset: Sequence[int], shape: Sequence[int]
) -> ReadItem | None:
    """Return the part of a stored chunk that a slice needs, or None."""
    starts = [max(a, b) for a, b in zip(chunk.offsets, offset, strict=True)]
    ends = [
        min(a + n, b + m)
        for a, n, b, m in zip(chunk.offsets, chunk.sizes, offset, shape, strict=True)
    ]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        return None
    index = MetadataIndex(name, chunk.offsets, number)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=torch.Size(start - first for start, first in zip(starts, offset, strict=True)),
        storage_index=index,
        storage_offsets=torch.Size(
            start - first for start, first in zip(starts, chunk.offsets, strict=True)
        ),
        lengths=torch.Size(end - start for start, end in zip(starts, ends, strict=True)),
    )


class _TargetPlanner:
    """Answer the requests of `FileSystemReader.read_data` for one target tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        return self.target[
            tuple(
                slice(first, first + size)
                for first, size in zip(item.dest_offsets, item.lengths, strict=True)
            )
        ]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the resolved tensor is a view of the target."""


@dataclass(frozen=True)
class TensorSlice:
    """Describe one slice of a tensor to be written.

    Attributes:
        name: of the tensor.
        full_shape: shape of the tensor.
        offset: first index of the slice in each dimension.
        shape: of the slice.
        dtype: stored type.
        load: returns the slice, [shape] of any float type; called when its turn comes.
    """

    name: str
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_slices(
    folder: Path, slices: Iterable[TensorSlice], *, objects: Iterable[str] = ()
) -> dict[str, FileRecord]:
    """Write a distributed checkpoint that megatron-core loads in any layout.

    One slice at a time is in memory.

    Args:
        folder: of the checkpoint.
        slices: all tensors.
        objects: names of the entries without content that megatron-core's layers expect
            (`..._extra_state/shard_0_4`).

    Returns:
        Records of the written files, by name.
    """
    planner = _LazyPlanner(list(slices), list(objects))
    writer = FileSystemWriter(str(folder), sync_files=False)
    writer.fs = files = DigestingFiles()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized.*"
        )
        try:
            dcp.state_dict_saver.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            # One process has one failure, and that names the cause.
            (failure, _), *_others = error.failures.values()
            raise failure from error
    common = io.BytesIO()
    torch.save({}, common)
    contents = {COMMON: common.getvalue(), "metadata.json": json.dumps(BACKEND).encode()}
    return {
        **files.written,
        **{name: write_file(folder, name, content) for name, content in contents.items()},
    }


class _LazyPlanner(SavePlanner):
    def __init__(self, slices: list[TensorSlice], objects: list[str]) -> None:
        self.slices = {
            (tensor_slice.name, tensor_slice.offset): tensor_slice for tensor_slice in slices
        }
        self.objects = objects

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Do nothing: the constructor received everything."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
            for name in self.objects
        ]
        return SavePlan(
            items + [_write_item(tensor_slice) for tensor_slice in self.slices.values()]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        assert all(
            isinstance(stored, TensorStorageMetadata | BytesStorageMetadata)
            for stored in metadata.state_dict_metadata.values()
        )
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            # megatron-core stores one object per shard.
            torch.save([None], content)
            return content
        index = write_item.index
        assert index.offset is not None
        tensor_slice = self.slices[index.fqn, tuple(index.offset)]
        tensor = tensor_slice.load().to(tensor_slice.dtype).contiguous()
        if tuple(tensor.shape) != tensor_slice.shape:
            raise ConfigError(
                f"{tensor_slice.name} has shape {list(tensor.shape)}, expected "
                f"{list(tensor_slice.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ConfigError(
                f"{tensor_slice.name}, from {list(tensor_slice.offset)} on, holds numbers that "
                f"are not finite in {tensor_slice.dtype}: use another copy"
            )
        return tensor


def _write_item(tensor_slice: TensorSlice) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(tensor_slice.name, torch.Size(tensor_slice.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(
                torch.Size(tensor_slice.offset), torch.Size(tensor_slice.shape)
            ),
            properties=TensorProperties(dtype=tensor_slice.dtype),
            size=torch.Size(tensor_slice.full_shape),
        ),
    )

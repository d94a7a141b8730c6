"""Single tensors in and out of a distributed checkpoint, without a model, a process group or megatron-core.

Weights are converted one tensor at a time, so a model of any size passes through the memory of its largest tensor. The format
(torch's distributed checkpoint: a pickled `.metadata` and `.distcp` files) is read with an unpickler that knows only the
classes such a file needs: a checkpoint from elsewhere cannot run code here.
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
    # The folder's own name, as older and newer Pythons spell its class.
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
    """What `getattr` stands for in metadata written by Python 3.11.0 to 3.11.3: a member of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which no checkpoint needs")


def read_metadata(folder: Path, *, what: str) -> Metadata:
    """The table of contents of a distributed checkpoint. ConfigError naming `what` where there is none, or one that is not just that."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it holds something else")
        for place in metadata.storage_data.values():
            if not _DATA_FILE.fullmatch(place.relative_path) or place.transform_descriptors:
                raise pickle.UnpicklingError(
                    f"it asks for the file {place.relative_path!r}, which is not one of a checkpoint's"
                )
    except FileNotFoundError:
        raise ConfigError(
            f"{what}: {folder} holds no megatron-core distributed checkpoint (no .metadata file in it)"
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
            f"{what}: {path} cannot be read as the metadata of a checkpoint ({error}): use another copy"
        ) from error
    return metadata


@dataclass(frozen=True)
class TensorInfo:
    """Whole shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorReader:
    """Slices of the tensors of a checkpoint, however it was sharded when it was written.

    tensors: what is stored, by name. ConfigError from the constructor and from `read` where files are missing or damaged.
    """

    def __init__(self, folder: Path, *, what: str) -> None:
        self.folder, self._what = folder, what
        self._metadata = read_metadata(folder, what=what)
        self._stored = {
            name: found
            for name, found in self._metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self.tensors = {
            name: TensorInfo(tuple(found.size), found.properties.dtype)
            for name, found in self._stored.items()
        }
        self._reader = FileSystemReader(str(folder))
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """[shape] of tensor `name` from `offset` on, in its stored type, on the CPU."""
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
            self._reader.read_data(LoadPlan(items), _Fill(target))  # type: ignore[arg-type]
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
                f"{self._what}: {name} cannot be read from {self.folder} ({type(error).__name__}: {str(error).splitlines()[0][:120]}): "
                "use another copy"
            ) from error
        return target


def _overlap(
    name: str, number: int, chunk: ChunkStorageMetadata, offset: Sequence[int], shape: Sequence[int]
) -> ReadItem | None:
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
        dest_offsets=torch.Size(start - at for start, at in zip(starts, offset, strict=True)),
        storage_index=index,
        storage_offsets=torch.Size(
            start - at for start, at in zip(starts, chunk.offsets, strict=True)
        ),
        lengths=torch.Size(end - start for start, end in zip(starts, ends, strict=True)),
    )


class _Fill:
    """What `FileSystemReader.read_data` asks of a planner, for one target tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        return self.target[
            tuple(
                slice(at, at + size)
                for at, size in zip(item.dest_offsets, item.lengths, strict=True)
            )
        ]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """The slice is a view: nothing to hand back."""


@dataclass(frozen=True)
class TensorSlice:
    """One slice of a tensor to be written: [shape] at `offset` of the tensor's `whole` shape; `load` is called when its turn comes."""

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_slices(
    folder: Path, pieces: Iterable[TensorSlice], *, objects: Iterable[str] = ()
) -> dict[str, FileRecord]:
    """Write a distributed checkpoint that megatron-core loads in any layout, holding one piece in memory at a time; returns its files.

    objects: names of the entries without content that megatron-core's layers want to find (`..._extra_state/shard_0_4`).
    """
    planner = _LazyPlanner(list(pieces), list(objects))
    writer = FileSystemWriter(str(folder), sync_files=False)
    writer.fs = files = DigestingFiles()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized.*"
        )
        try:
            dcp.state_dict_saver.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            # One process, one failure: what the caller can do about it is in the failure itself.
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
    def __init__(self, pieces: list[TensorSlice], objects: list[str]) -> None:
        self.pieces = {(piece.name, piece.offset): piece for piece in pieces}
        self.objects = objects

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Everything was given at construction."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
            for name in self.objects
        ]
        return SavePlan(items + [_write_item(piece) for piece in self.pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        assert all(
            isinstance(found, TensorStorageMetadata | BytesStorageMetadata)
            for found in metadata.state_dict_metadata.values()
        )
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            # One object per shard, as megatron-core stores them.
            torch.save([None], content)
            return content
        index = write_item.index
        assert index.offset is not None
        piece = self.pieces[index.fqn, tuple(index.offset)]
        tensor = piece.load().to(piece.dtype).contiguous()
        if tuple(tensor.shape) != piece.shape:
            raise ConfigError(
                f"{piece.name} has shape {list(tensor.shape)}, expected {list(piece.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ConfigError(
                f"{piece.name}, from {list(piece.offset)} on, holds numbers that are not finite in {piece.dtype}: use another copy"
            )
        return tensor


def _write_item(piece: TensorSlice) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.name, torch.Size(piece.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)),
            properties=TensorProperties(dtype=piece.dtype),
            size=torch.Size(piece.whole),
        ),
    )

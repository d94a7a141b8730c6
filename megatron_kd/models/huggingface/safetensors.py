"""Read and write folders of safetensors files, one tensor at a time.

Pickled weights (.bin, .pt) are never opened: reading one can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import sync_path
from megatron_kd.storage.json_files import read_json

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Describe one tensor of a folder.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        dtype: its type; None for types that weights here do not have (8-bit, integers).
        type_name: its type as safetensors names it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    type_name: str


class SafetensorsFolder:
    """Read the weights of a model folder.

    Args:
        folder: the model folder.
        setting: beginning of error messages.

    Attributes:
        tensors: the tensors of its files, by name.

    Raises:
        ConfigError: the folder is missing, incomplete, ambiguous or damaged.
    """

    def __init__(self, folder: Path, *, setting: str) -> None:
        self.folder, self._what = folder, setting
        if not folder.is_dir():
            raise ConfigError(
                f"{setting}: {folder} is not a folder (models are read from local folders only)"
            )
        self.tensors: dict[str, StoredTensor] = {}
        index = self._read_index()
        for file in self._files(index):
            self._list(file)
        for name, file_name in index.items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.file.name != file_name:
                raise ConfigError(
                    f"{setting}: {INDEX} says that {file_name} holds {name}, but it does not: "
                    "complete the download"
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in its stored type.

        The file is closed again, so that no more than this tensor stays in memory.
        """
        try:
            with safe_open(self.tensors[name].file, framework="pt") as stream:
                tensor: Tensor = stream.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(self.tensors[name].file, error) from error
        return tensor

    def _read_index(self) -> dict[str, str]:
        """Return tensor name -> file name of the index; empty without an index."""
        index = self.folder / INDEX
        if not index.exists():
            return {}
        weights = read_json(index, setting=self._what).get("weight_map")
        if not isinstance(weights, dict) or any(
            not isinstance(name, str) or Path(name).name != name for name in weights.values()
        ):
            raise ConfigError(
                f"{self._what}: {index} has no weight_map from tensors to files beside it: use "
                "another copy"
            )
        return weights

    def _files(self, index: Mapping[str, str]) -> list[Path]:
        """Return the files that hold the weights."""
        single_file = self.folder / SINGLE_FILE
        if index and SINGLE_FILE not in index.values() and single_file.is_file():
            # transformers would read the single file, but the index names other files: it is
            # unknown which weights are meant.
            raise ConfigError(
                f"{self._what}: {self.folder} holds both {SINGLE_FILE} and an {INDEX} of other "
                "files: remove the one that is old"
            )
        if index:
            files = [self.folder / name for name in sorted(set(index.values()))]
        elif single_file.is_file():
            # Other files beside it hold the model in another form, such as Mistral's
            # consolidated.safetensors.
            files = [single_file]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{self._what}: {', '.join(missing)} named in {INDEX} is missing in "
                f"{self.folder}: complete the download"
            )
        if not files:
            raise ConfigError(f"{self._what}: {self.folder} {self._no_safetensors()}")
        return files

    def _no_safetensors(self) -> str:
        patterns = ("*.bin", "*.pt", "*.pth")
        pickled = sorted(path.name for one in patterns for path in self.folder.glob(one))
        if not pickled:
            return "holds no .safetensors file"
        return (
            f"holds only pickled weights ({pickled[0]}), which are never opened because reading a "
            "pickle can run code: get the safetensors version of the model"
        )

    def _list(self, file: Path) -> None:
        """Add the tensors of a file to `tensors`."""
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():
                    if name in self.tensors:
                        raise ConfigError(
                            f"{self._what}: {name} is in {self.tensors[name].file.name} and in "
                            f"{file.name}: remove one of them"
                        )
                    entry = stream.get_slice(name)
                    type_name = entry.get_dtype()
                    self.tensors[name] = StoredTensor(
                        file, tuple(entry.get_shape()), _DTYPES.get(type_name), type_name
                    )
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: Path, error: Exception) -> ConfigError:
        reason = str(error).splitlines()[0][:160]
        return ConfigError(
            f"{self._what}: {file} is truncated or damaged ({reason}): use another copy"
        )


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int
) -> None:
    """Write tensors to `folder`, holding one file's tensors in memory.

    Several files are named model-*.safetensors and have an index; a single file has none.

    Args:
        folder: an existing folder.
        tensors: names and tensors.
        shard_bytes: largest size of a file, unless one tensor alone is larger.
    """
    files: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        total += sum(map(_size, shard.values()))
        save_file(shard, path, metadata={"format": "pt"})
        sync_path(path)
        files.append((path, list(shard)))
    if len(files) == 1:
        files[0][0].rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after the other."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + _size(tensor) > shard_bytes:
            yield shard
            # A new dictionary would keep the old one alive through the caller's loop variable.
            shard.clear()
            size = 0
        shard[name] = tensor.contiguous()
        size += _size(tensor)
    yield shard


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

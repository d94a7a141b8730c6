"""A folder of safetensors files: which tensors it holds, one of them at a time, and the writing of such a folder.

Pickled weights (.bin, .pt) are never opened: reading one can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the folder; dtype None: a type that weights here do not have (8-bit, integers)."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    type_name: str


class SafetensorsFolder:
    """The weights of a model folder. tensors: what its files hold, by name. ConfigError naming `what` for anything unusable."""

    def __init__(self, folder: Path, *, what: str) -> None:
        self.folder, self._what = folder, what
        if not folder.is_dir():
            raise ConfigError(
                f"{what}: {folder} is not a folder (models are read from local folders only)"
            )
        self.tensors: dict[str, StoredTensor] = {}
        promised = self._promised()
        for file in self._files(promised):
            self._list(file)
        for name, file_name in promised.items():
            found = self.tensors.get(name)
            if found is None or found.file.name != file_name:
                raise ConfigError(
                    f"{what}: {INDEX} says that {file_name} holds {name}, but it does not: complete the download"
                )

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in its stored type. The file is open only meanwhile, so that no more than this stays in memory."""
        try:
            with safe_open(self.tensors[name].file, framework="pt") as stream:
                tensor: Tensor = stream.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(self.tensors[name].file, error) from error
        return tensor

    def _promised(self) -> dict[str, str]:
        """Tensor name -> file name, as the index says; empty without an index."""
        index = self.folder / INDEX
        if not index.exists():
            return {}
        content = read_json(index, what=self._what)
        weights = content.get("weight_map")
        if not isinstance(weights, dict) or any(
            not isinstance(name, str) or Path(name).name != name for name in weights.values()
        ):
            raise ConfigError(
                f"{self._what}: {index} has no weight_map from tensors to files beside it: use another copy"
            )
        return weights

    def _files(self, promised: Mapping[str, str]) -> list[Path]:
        if promised and WHOLE not in promised.values() and (self.folder / WHOLE).is_file():
            # transformers would read the one, an index means the other: nobody can tell which weights are meant.
            raise ConfigError(
                f"{self._what}: {self.folder} holds both {WHOLE} and an {INDEX} of other files: remove the one that is old"
            )
        if promised:
            files = [self.folder / name for name in sorted(set(promised.values()))]
        else:
            # A whole model in one file has this name; what lies beside it is another form of it (Mistral's consolidated.safetensors).
            whole = self.folder / WHOLE
            files = [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{self._what}: {', '.join(missing)} named in {INDEX} is missing in {self.folder}: complete the download"
            )
        if not files:
            pickled = sorted(
                path.name
                for pattern in ("*.bin", "*.pt", "*.pth")
                for path in self.folder.glob(pattern)
            )
            if pickled:
                raise ConfigError(
                    f"{self._what}: {self.folder} holds only pickled weights ({pickled[0]}), which are never opened because reading a "
                    "pickle can run code: get the safetensors version of the model"
                )
            raise ConfigError(f"{self._what}: {self.folder} holds no .safetensors file")
        return files

    def _list(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():
                    if name in self.tensors:
                        raise ConfigError(
                            f"{self._what}: {name} is in {self.tensors[name].file.name} and in {file.name}: remove one of them"
                        )
                    entry = stream.get_slice(name)
                    kind = entry.get_dtype()
                    self.tensors[name] = StoredTensor(
                        file, tuple(entry.get_shape()), _DTYPES.get(kind), kind
                    )
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: Path, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self._what}: {file} is truncated or damaged ({str(error).splitlines()[0][:160]}): use another copy"
        )


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int
) -> None:
    """Write model-*.safetensors and their index into `folder`, holding one shard in memory. A single shard needs no index."""
    shard: dict[str, Tensor] = {}
    files: list[tuple[Path, list[str]]] = []
    size = total = 0

    def close() -> None:
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        sync_path(path)
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if shard and size + count > shard_bytes:
            close()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + count, total + count
    close()
    names = [
        f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))
    ]
    if len(files) == 1:
        files[0][0].rename(folder / WHOLE)
        return
    weight_map: dict[str, str] = {}
    for (path, held), name in zip(files, names, strict=True):
        path.rename(folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

"""Keep index arrays in a cache folder that all ranks and runs share.

Global rank 0 writes a folder under another name and renames it when it is complete. Content decides
its name, so that runs that start together write the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import sync_path


def global_rank() -> int:
    """Return this process's rank in the world; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def cache_key(kind: str, *values: object) -> str:
    """Return a folder name that depends on `values`, which JSON can represent."""
    return f"{kind}-{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]}"


def complete_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Make sure that `folder` exists with all its content.

    Args:
        folder: the folder that all ranks read.
        write: fills the folder that it is given; only rank 0 calls it.

    Raises:
        ConfigError: rank 0 cannot write the folder, or another rank does not see it.
    """
    if folder.is_dir():
        return
    if global_rank() != 0:
        raise ConfigError(
            f"rank {global_rank()} does not see {folder}, which rank 0 wrote: "
            "set data.index_cache to a folder shared by all nodes"
        )
    # A process id alone is not unique: containers reuse it, beside the remains of a killed run and
    # the files of other machines.
    temporary = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            # A concurrent run was faster; its folder has the same content.
            if not folder.is_dir():
                raise
        sync_path(folder.parent)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder} ({error}): "
            "set data.index_cache to a writable folder with free space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_arrays(folder: Path, num_arrays: int) -> None:
    """Open every array of a folder once without pickles, which megatron-core would execute.

    Raises:
        ConfigError: an array is damaged or missing.
    """
    try:
        arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"the index cache {folder} is damaged ({error}): delete this folder and start again"
        ) from error
    if len(arrays) != num_arrays:
        raise ConfigError(
            f"the index cache {folder} has {len(arrays)} arrays in place of {num_arrays}: "
            "delete this folder and start again"
        )

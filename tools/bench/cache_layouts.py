"""Encode and decode teacher targets in this project's records and in other layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from megatron_kd.cache.decode import decode_many
from megatron_kd.cache.encode import encode
from megatron_kd.targets import SampleSelection, Selection, SparseTarget

# Bytes of a record beside its payload: key, length, checksum, Arrow's offset.
_RECORD_OVERHEAD = 28


@dataclass(frozen=True)
class StorageLayout:
    """Define how one sample's target [S, K] becomes bytes, and how several are read back.

    Attributes:
        overhead: Bytes of a sample beside its payload.
    """

    name: str
    encode: Callable[[SparseTarget], bytes]
    decode: Callable[[Sequence[bytes]], list[SparseTarget]]
    overhead: int = 0


def storage_layouts(selection: Selection) -> list[StorageLayout]:
    """Return the layouts that the targets of a selection are stored in."""
    num_draws = selection.num_draws if isinstance(selection, SampleSelection) else None
    layouts = [
        StorageLayout(
            "records",
            lambda target: encode(target, num_draws=num_draws),
            _decode_records,
            _RECORD_OVERHEAD,
        )
    ]
    if num_draws is None:
        layouts.append(
            StorageLayout(
                "records, fp32",
                lambda target: encode(target, value_encoding="fp32"),
                _decode_records,
                _RECORD_OVERHEAD,
            )
        )
    for name, arrays in (("megatron", Arrays(np.float16, 16)), ("arrays", Arrays(np.float32, 32))):
        layouts.append(StorageLayout(name, arrays.encode, arrays.decode))
    return layouts


def _decode_records(records: Sequence[bytes]) -> list[SparseTarget]:
    targets = decode_many(records)
    return [targets.map(lambda tensor, n=number: tensor[n]) for number in range(len(records))]


class Arrays:
    """Store rectangular arrays under zstd.

    Args:
        values: Type of the log-probabilities.
        bits: Ids as 32 bits, or as 16 bits and a byte for what is above.
    """

    def __init__(self, values: type, bits: int) -> None:
        self._values, self._bits = values, bits
        self._codec = pa.Codec("zstd", compression_level=3)

    def encode(self, target: SparseTarget) -> bytes:
        """Return shape, size and compressed arrays, as wide as the widest token."""
        width = int((target.indices >= 0).sum(1).max())
        ids = target.indices[:, :width].numpy()
        logprobs = target.logprobs[:, :width].numpy().astype(self._values)
        if self._bits == 32:
            arrays = [ids, logprobs]
        else:
            arrays = [ids.astype(np.uint16), (ids >> 16).astype(np.int8), logprobs]
        data = b"".join(array.tobytes() for array in arrays)
        header = np.array([*ids.shape, len(data)], np.int32).tobytes()
        return header + bytes(self._codec.compress(data, asbytes=True))

    def decode(self, records: Sequence[bytes]) -> list[SparseTarget]:
        """Return the targets of several samples."""
        return [self._decode_one(record) for record in records]

    def _decode_one(self, data: bytes) -> SparseTarget:
        tokens, width, size = np.frombuffer(data[:12], np.int32)
        plain = self._codec.decompress(data[12:], int(size), asbytes=True)
        count = int(tokens) * int(width)
        id_type, id_bytes = (np.int32, 4) if self._bits == 32 else (np.uint16, 3)
        ids = np.frombuffer(plain, id_type, count).astype(np.int32)
        if self._bits == 16:
            ids |= np.frombuffer(plain, np.int8, count, 2 * count).astype(np.int32) << 16
        logprobs = np.frombuffer(plain, self._values, count, id_bytes * count).astype(np.float32)
        return SparseTarget(
            torch.from_numpy(ids.reshape(tokens, width)),
            torch.from_numpy(logprobs.reshape(tokens, width)),
        )


def fidelity(originals: list[SparseTarget], read: list[SparseTarget]) -> dict[str, float | bool]:
    """Compare targets with what was read from storage, on their kept ids.

    Returns:
        Mean and largest KL of all tokens, in nats; the largest error of a log-probability; and
        True if the ids are equal.
    """
    divergences, errors, equal = [], [], True
    for original, stored in zip(originals, read, strict=True):
        (ids, values), (stored_ids, stored_values) = _by_id(original), _by_id(stored)
        width = min(ids.shape[1], stored_ids.shape[1])
        equal &= torch.equal(ids[:, :width], stored_ids[:, :width])
        equal &= int((ids >= 0).sum()) == int((stored_ids >= 0).sum())
        used = (ids >= 0)[:, :width]
        values, stored_values = values[:, :width].double(), stored_values[:, :width].double()
        difference = torch.where(used, values.log_softmax(1) - stored_values.log_softmax(1), 0.0)
        divergences.append((values.softmax(1) * difference).sum(1))
        errors.append(torch.where(used, values - stored_values, 0.0).abs().amax(1))
    divergence, error = torch.cat(divergences), torch.cat(errors)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "error_max": float(error.max()),
        "ids_equal": equal,
    }


def _by_id(target: SparseTarget) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and log-probabilities [S, K] in the order of ids, unused slots last."""
    keys = torch.where(target.indices >= 0, target.indices, torch.iinfo(torch.int32).max)
    order = keys.argsort(dim=1, stable=True)
    return target.indices.gather(1, order), target.logprobs.gather(1, order)

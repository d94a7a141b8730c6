"""Documents chosen by a score, written as a new token file, unchanged and in their order."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import TokenIndex, packed_length, read_index, read_roles

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# What a new file says of itself as the one that it comes from; sums over documents are counted anew or left out.
_CARRIED = ("tokenizer_digest", "vocab_size", "end_of_document", "append_eod")
_RUN_TOKENS = 1 << 22


@dataclass(frozen=True)
class Rule:
    """What is kept; one of the three is set. fraction: of the scored documents, the highest. threshold: scores at least that high.
    tokens: the highest-scored documents until the next would exceed so many tokens."""

    fraction: float | None = None
    threshold: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = [
            name for name in ("fraction", "threshold", "tokens") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ConfigError(
                "say what to keep with one of --keep-fraction, --threshold and --keep-tokens"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"--keep-fraction ({self.fraction}) must be in (0, 1]")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"--keep-tokens ({self.tokens}) must be at least 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold ({self.threshold}) must be a number")


def read_documents(prefix: str | Path) -> tuple[TokenIndex, dict[str, Any]]:
    """The index and the description of plain text, one sequence a document. ConfigError where it is something else."""
    path = Path(f"{prefix}.json")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        description["tokenizer_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read, so the tokenizer of {prefix} is not known ({error}): make {prefix} again"
        ) from error
    if packed_length(prefix) is not None or read_roles(prefix) is not None:
        raise ConfigError(
            f"{prefix} holds packed conversations: only plain text can be chosen from"
        )
    index = read_index(prefix)
    if (np.diff(index.documents) > 1).any():
        raise ConfigError(
            f"{prefix} has documents of several sequences: make it again with tools/preprocess_data.py"
        )
    return index, description


def choose(
    scores: NDArray[np.float64], lengths: NDArray[np.int64], rule: Rule
) -> NDArray[np.int64]:
    """Documents that the rule keeps, rising. scores [D]: NaN where a document cannot be scored, which is never kept. lengths [D]: tokens.

    Of equal scores the earlier document goes first. ConfigError where nothing is kept.
    """
    order = np.lexsort((np.arange(len(scores)), -scores))  # NaN last
    order = order[: int(np.count_nonzero(~np.isnan(scores)))]
    if rule.fraction is not None:
        order = order[: round(rule.fraction * len(order))]
    elif rule.threshold is not None:
        order = order[scores[order] >= rule.threshold]
    elif rule.tokens is not None:
        order = order[: int(np.searchsorted(np.cumsum(lengths[order]), rule.tokens, side="right"))]
    if not len(order):
        raise ConfigError(
            f"no document is kept by {rule}: {len(scores)} were scored, between {_range(scores)}"
        )
    return np.sort(order)


def _range(scores: NDArray[np.float64]) -> str:
    known = scores[~np.isnan(scores)]
    return (
        f"{known.min():.4f} and {known.max():.4f}"
        if len(known)
        else "none and none: they are too short"
    )


def write_chosen(
    prefix: str | Path,
    output: Path,
    chosen: NDArray[np.int64],
    description: dict[str, Any],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write documents `chosen` [N] (rising) of `prefix` as `output`.bin, .idx and .json, complete or absent; returns what .json says."""
    index = read_index(prefix)
    # Sequences and documents differ by empty documents, which have a mark and no sequence.
    lengths, offsets = (
        index.lengths[chosen].astype(np.int64),
        index.offsets[chosen] // index.dtype.itemsize,
    )
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    with TokenFileWriter(output, index.dtype) as writer:
        start = 0
        while start < len(chosen):  # runs of neighbours are copied at once
            stop, size = start + 1, int(lengths[start])
            while (
                stop < len(chosen)
                and chosen[stop] == chosen[stop - 1] + 1
                and size + lengths[stop] <= _RUN_TOKENS
            ):
                size += int(lengths[stop])
                stop += 1
            writer.add(
                tokens[offsets[start] : offsets[start] + size], lengths[start:stop].astype(np.int32)
            )
            start = stop
        carried = {key: description[key] for key in _CARRIED if key in description}
        return writer.commit(**carried, selected_from=os.path.abspath(prefix), **about)


def summary(
    scores: NDArray[np.float64], lengths: NDArray[np.int64], chosen: NDArray[np.int64]
) -> dict[str, Any]:
    """Quantiles of the scores, over documents, of all and of what is kept; how much is kept; the lowest score kept."""
    known = scores[~np.isnan(scores)]

    def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
        return {
            f"{100 * at:g}%": float(value)
            for at, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
        }

    return {
        "documents": len(scores),
        "tokens": int(lengths.sum()),
        "not_scored": int(np.isnan(scores).sum()),
        "kept_documents": len(chosen),
        "kept_tokens": int(lengths[chosen].sum()),
        "lowest_kept": float(scores[chosen].min()),
        "quantiles": quantiles(known),
        "kept_quantiles": quantiles(scores[chosen]),
    }

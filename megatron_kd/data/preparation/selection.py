"""Choose documents by a score and write them, unchanged and in order, as a new token file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import TokenIndex, packed_length, read_index, read_roles
from megatron_kd.storage.atomic_files import write_atomically

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# Keys of the description that also hold for a selection. Sums over documents are counted again.
_INHERITED_KEYS = ("tokenizer_digest", "vocab_size", "end_of_document", "append_eod")
_MAX_COPIED_TOKENS = 1 << 22


@dataclass(frozen=True)
class SelectionRule:
    """State which documents are kept. Exactly one attribute is set.

    Attributes:
        fraction: keep this fraction of the scored documents, the highest.
        threshold: keep documents with at least this score.
        tokens: keep the highest documents up to this many tokens.
    """

    fraction: float | None = None
    threshold: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.settings) != 1:
            raise ConfigError(
                "say what to keep with one of --keep-fraction, --threshold and --keep-tokens"
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"--keep-fraction ({self.fraction}) must be in (0, 1]")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"--keep-tokens ({self.tokens}) must be at least 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold ({self.threshold}) must be a number")

    @property
    def settings(self) -> dict[str, float]:
        """The attribute that is set, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_documents(prefix: str | Path) -> tuple[TokenIndex, dict[str, Any]]:
    """Return the index and the description of plain text with one sequence per document.

    Raises:
        ConfigError: the token file is not of this form, or its tokenizer is unknown.
    """
    path = Path(f"{prefix}.json")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        description["tokenizer_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read, so the tokenizer of {prefix} is not known ({error}): "
            f"make {prefix} again"
        ) from error
    if packed_length(prefix) is not None or read_roles(prefix) is not None:
        raise ConfigError(
            f"{prefix} holds packed conversations: only plain text can be chosen from"
        )
    index = read_index(prefix)
    if (np.diff(index.documents) > 1).any():
        raise ConfigError(
            f"{prefix} has documents of several sequences: "
            "make it again with tools/preprocess_data.py"
        )
    return index, description


def choose(
    scores: NDArray[np.float64], lengths: NDArray[np.int64], rule: SelectionRule
) -> NDArray[np.int64]:
    """Choose the documents that a rule keeps. Of equal scores the earlier document goes first.

    Args:
        scores: [D]; NaN if a document cannot be scored, which is never kept.
        lengths: [D], tokens of each document.
        rule: what to keep.

    Returns:
        [N], numbers of the documents, ascending.

    Raises:
        ConfigError: no document is kept.
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
    finite = scores[~np.isnan(scores)]
    if not len(finite):
        return "none and none: they are too short"
    return f"{finite.min():.4f} and {finite.max():.4f}"


def check_selection_output(output: Path) -> None:
    """Refuse an output that exists.

    The remains of an output that was not finished (files without an index, beside a report) may be
    replaced.

    Raises:
        ConfigError: the output exists.
    """
    endings = [ending for ending in (".idx", ".bin", ".json") if Path(f"{output}{ending}").exists()]
    is_unfinished = ".idx" not in endings and Path(f"{output}.selection.json").exists()
    if endings and not is_unfinished:
        raise ConfigError(f"{output}{endings[0]} is there already: choose another --output")


def write_selection(
    prefix: Path,
    output: Path,
    scores: NDArray[np.float64],
    rule: SelectionRule,
    models: dict[str, str],
) -> dict[str, Any]:
    """Write the documents that a rule keeps, and `output`.selection.json.

    Args:
        prefix: token file that was scored.
        output: token file to make.
        scores: [D], score of each document.
        rule: what to keep.
        models: path of each model that gave the scores, by role.

    Returns:
        The content of `output`.selection.json.

    Raises:
        ConfigError: no document is kept.
    """
    index, description = read_documents(prefix)
    lengths = index.lengths.astype(np.int64)
    chosen = choose(scores, lengths, rule)
    report = {
        "data": str(prefix.absolute()),
        **models,
        "rule": rule.settings,
        **_summary(scores, lengths, chosen),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    content = (json.dumps(report, indent=2) + "\n").encode()
    write_atomically(Path(f"{output}.selection.json"), content)
    inherited = {key: description[key] for key in _INHERITED_KEYS if key in description}
    with TokenFileWriter(output, index.dtype) as writer:
        _copy_documents(prefix, index, chosen, writer)
        writer.commit(**inherited, selected_from=os.path.abspath(prefix), selection=rule.settings)
    return report


def _copy_documents(
    prefix: Path, index: TokenIndex, chosen: NDArray[np.int64], writer: TokenFileWriter
) -> None:
    """Copy documents `chosen` [N] (ascending); adjacent ones are copied at once."""
    lengths = index.lengths[chosen].astype(np.int64)
    offsets = index.offsets[chosen] // index.dtype.itemsize
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    start = 0
    while start < len(chosen):
        stop, size = start + 1, int(lengths[start])
        while (
            stop < len(chosen)
            and chosen[stop] == chosen[stop - 1] + 1
            and size + lengths[stop] <= _MAX_COPIED_TOKENS
        ):
            size += int(lengths[stop])
            stop += 1
        block = tokens[offsets[start] : offsets[start] + size]
        writer.add(block, lengths[start:stop].astype(np.int32))
        start = stop


def _summary(
    scores: NDArray[np.float64], lengths: NDArray[np.int64], chosen: NDArray[np.int64]
) -> dict[str, Any]:
    """Return quantiles over documents of all scores and of those kept, and how much is kept."""
    return {
        "documents": len(scores),
        "tokens": int(lengths.sum()),
        "not_scored": int(np.isnan(scores).sum()),
        "kept_documents": len(chosen),
        "kept_tokens": int(lengths[chosen].sum()),
        "lowest_kept": float(scores[chosen].min()),
        "quantiles": _quantiles(scores[~np.isnan(scores)]),
        "kept_quantiles": _quantiles(scores[chosen]),
    }


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {
        f"{100 * quantile:g}%": float(value)
        for quantile, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    }

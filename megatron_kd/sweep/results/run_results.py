"""Read the metrics of single runs and summarize them, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.sweep.results.tables import align

Values = NDArray[np.float64]


class ReportError(Exception):
    """Report an input or output that cannot be used, in one sentence for the user."""


@dataclass(frozen=True)
class ValidationCurve:
    """Hold the validation losses of one split.

    Attributes:
        tokens: Consumed tokens, [n].
        ce: Cross-entropy, [n], in nats per token.
        last: The last line of the metrics file.
    """

    tokens: Values
    ce: Values
    last: dict[str, Any]


@dataclass(frozen=True)
class RunCurves:
    """Hold the curves of one run, with NaN where the metrics file has null.

    Attributes:
        tokens: Consumed tokens at each training line, [n].
        ce: Training cross-entropy, [n], in nats per token.
        rate: Tokens per second, [n].
        splits: Validation losses by split.
    """

    label: str
    tokens: Values
    ce: Values
    rate: Values
    splits: dict[str, ValidationCurve]


def read_lines(directory: Path) -> list[dict[str, Any]]:
    """Read directory/metrics.jsonl and check every line.

    Raises:
        ReportError: The file or a line cannot be read; it names both.
    """
    path = directory / "metrics.jsonl"
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist: {directory} is not a run directory, "
            "or the run has not started."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}.") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text, parse_constant=lambda _: None)
        except ValueError:
            hint = (
                "torn, as a killed run leaves it; resuming the run repairs it"
                if number == len(texts)
                else "the file is damaged"
            )
            raise ReportError(f"{path} line {number} is not JSON: {hint}.") from None
        problem = _line_problem(line)
        if problem:
            raise ReportError(f"{path} line {number} {problem}.")
        lines.append(line)
    if not lines:
        raise ReportError(f"{path} is empty: the run has not written a row yet.")
    return lines


def _line_problem(line: Any) -> str | None:
    """Return what keeps a line from being used. Losses and rates may be null, counters may not."""
    if not isinstance(line, dict):
        return "is not a JSON object"
    is_validation = "split" in line
    counters = ("step",) if is_validation else ("step", "tokens")
    values = ("ce_loss",) if is_validation else ("ce_loss", "tokens_per_second")
    for name in (*counters, *values):
        if name not in line:
            return f"has no {name}"
        may_be_null = name in values
        if not isinstance(line[name], int | float) and not (may_be_null and line[name] is None):
            return f"has {name} = {line[name]!r}, which is not a number"
    return None


def read_run(directory: Path, label: str) -> RunCurves:
    """Read the curves of a run.

    Validation lines have a step; their tokens are interpolated from the training lines.

    Raises:
        ReportError: The metrics cannot be read, or have no training line.
    """
    lines = read_lines(directory)
    training = [line for line in lines if "split" not in line]
    if not training:
        raise ReportError(
            f"{directory / 'metrics.jsonl'} has validation rows only, no training row."
        )
    steps, tokens = _values(training, "step"), _values(training, "tokens")
    splits = {}
    for name in dict.fromkeys(str(line["split"]) for line in lines if "split" in line):
        validation = sorted(
            (line for line in lines if "split" in line and str(line["split"]) == name),
            key=lambda line: line["step"],
        )
        consumed = np.interp(
            _values(validation, "step"), np.append(0.0, steps), np.append(0.0, tokens)
        )
        splits[name] = ValidationCurve(consumed, _values(validation, "ce_loss"), validation[-1])
    return RunCurves(
        label, tokens, _values(training, "ce_loss"), _values(training, "tokens_per_second"), splits
    )


def _values(lines: Sequence[dict[str, Any]], name: str) -> Values:
    return np.array(
        [math.nan if line[name] is None else line[name] for line in lines], dtype=np.float64
    )


def summarize(run: RunCurves) -> dict[str, Any]:
    """Return the numbers of one run for JSON: losses in nats per token, None if not finite."""
    validation = {}
    for name, split in run.splits.items():
        ce = split.last["ce_loss"]
        perplexity = math.exp(ce) if ce is not None and ce < 700 else None
        validation[name] = {
            "step": split.last["step"],
            "ce_loss": ce,
            "perplexity": perplexity,
            "kd_loss": split.last.get("kd_loss"),
        }
    rates = run.rate[np.isfinite(run.rate)]
    return {
        "run": run.label,
        "validation": validation,
        "tokens": int(run.tokens.max()),
        "median_tokens_per_second": float(np.median(rates)) if rates.size else None,
    }


def format_runs(summaries: Sequence[dict[str, Any]], *, markdown: bool) -> str:
    """Format a table with a line for each run and two columns for each validation split."""
    splits = list(dict.fromkeys(name for summary in summaries for name in summary["validation"]))
    header = [
        "run",
        *(f"{name} {column}" for name in splits for column in ("CE (nats)", "perplexity")),
        "tokens",
        "median tokens/s",
    ]
    return align([header, *(_line(summary, splits) for summary in summaries)], markdown=markdown)


def _line(summary: dict[str, Any], splits: Sequence[str]) -> list[str]:
    cells = [summary["run"]]
    for name in splits:
        numbers = summary["validation"].get(name)
        if numbers is None:
            cells += ["-", "-"]
        else:
            cells += [_number(numbers["ce_loss"], ".4f"), _number(numbers["perplexity"], ",.2f")]
    rate = _number(summary["median_tokens_per_second"], ",.0f")
    return [*cells, f"{summary['tokens']:,}", rate]


def _number(value: float | None, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)

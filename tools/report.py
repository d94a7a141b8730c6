"""Compare runs, or show sweeps: tables, pictures, and for sweeps one page that needs nothing else.

    python tools/report.py RUN_DIR [RUN_DIR ...] [--labels a b c] --output out.png [--json out.json] [--markdown]
    python tools/report.py SWEEP_DIR [SWEEP_DIR ...] [--html out.html] [--pictures FOLDER] [--json out.json] [--markdown]

Runs: final validation losses, speed, and the loss curves, from each metrics.jsonl. Sweeps (folders of tools/sweep.py, with a sweep.json):
for each cell mean and standard deviation over seeds, the difference to the baseline with the same seeds, and the paper's figure; what lacks
seeds is told. Imports neither torch nor megatron-core, so it runs on a login node.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.sweep.results import as_json, read_result, table
from megatron_kd.sweep.sweep_record import SWEEP_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = NDArray[np.float64]

# Okabe and Ito's colours: distinct for colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P")


class ReportError(Exception):
    """An input or output that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Validation:
    """Validation losses of one split: consumed tokens [n], cross-entropy [n] in nats per token, and the last row."""

    tokens: Series
    ce: Series
    last: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: fp64 series over its training rows [n] (NaN where the row says null), and its validation splits."""

    label: str
    tokens: Series
    ce: Series
    rate: Series
    splits: dict[str, Validation]


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of directory/metrics.jsonl; ReportError names the file and line that cannot be read."""
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist: {directory} is not a run directory, or the run has not started."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            hint = (
                "torn, as a killed run leaves it; resuming the run repairs it"
                if number == len(lines)
                else "the file is damaged"
            )
            raise ReportError(f"{path} line {number} is not JSON: {hint}.") from None
        problem = _row_problem(row)
        if problem:
            raise ReportError(f"{path} line {number} {problem}.")
        rows.append(row)
    if not rows:
        raise ReportError(f"{path} is empty: the run has not written a row yet.")
    return rows


def _row_problem(row: Any) -> str | None:
    """What keeps a row from being used; losses and rates may be null (not finite), counters may not."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    counters, values = (
        (("step",), ("ce_loss",))
        if "split" in row
        else (("step", "tokens"), ("ce_loss", "tokens_per_second"))
    )
    for name in (*counters, *values):
        if name not in row:
            return f"has no {name}"
        if not isinstance(row[name], (int, float)) and (name in counters or row[name] is not None):
            return f"has {name} = {row[name]!r}, which is not a number"
    return None


def read_run(directory: Path, label: str) -> Run:
    """Sort a run's rows into series. Validation rows carry a step; their tokens follow from the training rows."""
    rows = read_rows(directory)
    training = [row for row in rows if "split" not in row]
    if not training:
        raise ReportError(
            f"{directory / 'metrics.jsonl'} has validation rows only, no training row."
        )
    steps, tokens = _series(training, "step"), _series(training, "tokens")
    splits = {}
    for name in dict.fromkeys(str(row["split"]) for row in rows if "split" in row):
        chosen = sorted(
            (row for row in rows if "split" in row and str(row["split"]) == name),
            key=lambda row: row["step"],
        )
        at = np.interp(_series(chosen, "step"), np.append(0.0, steps), np.append(0.0, tokens))
        splits[name] = Validation(at, _series(chosen, "ce_loss"), chosen[-1])
    return Run(
        label, tokens, _series(training, "ce_loss"), _series(training, "tokens_per_second"), splits
    )


def _series(rows: Sequence[dict[str, Any]], name: str) -> Series:
    return np.array(
        [math.nan if row[name] is None else row[name] for row in rows], dtype=np.float64
    )


def summarize(run: Run) -> dict[str, Any]:
    """The numbers of one run, ready for JSON: losses in nats per token, None where a loss is not finite."""
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


def format_table(summaries: Sequence[dict[str, Any]], *, markdown: bool) -> str:
    """One line per run, two columns per validation split; numbers right-aligned."""
    splits = list(dict.fromkeys(name for summary in summaries for name in summary["validation"]))
    header = [
        "run",
        *(f"{name} {what}" for name in splits for what in ("CE (nats)", "perplexity")),
        "tokens",
        "median tokens/s",
    ]
    body = []
    for summary in summaries:
        cells = [summary["run"]]
        for name in splits:
            numbers = summary["validation"].get(name)
            cells += (
                ["-", "-"]
                if numbers is None
                else [_number(numbers["ce_loss"], ".4f"), _number(numbers["perplexity"], ",.2f")]
            )
        body.append(
            [*cells, f"{summary['tokens']:,}", _number(summary["median_tokens_per_second"], ",.0f")]
        )
    return align([header, *body], markdown=markdown)


def align(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Rows, the header first, as text in columns or as Markdown; all columns but the first right-aligned."""
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _number(value: float | None, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)


def running_mean(values: Series, window: int) -> Series:
    """Mean over `window` rows around each row, cut off at both ends, so that the curve does not lag behind the rows."""
    sums = np.append(0.0, np.cumsum(values))
    index = np.arange(values.size)
    first, last = (
        np.maximum(index - window // 2, 0),
        np.minimum(index + window // 2 + 1, values.size),
    )
    return (sums[last] - sums[first]) / (last - first)


def draw(runs: Sequence[Run], output: Path) -> None:
    """Write the picture: smoothed training cross-entropy (lines) and validation cross-entropy (points) over tokens."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError(
            "The picture needs matplotlib: pip install 'megatron-kd[report]'."
        ) from None
    # A Figure made without pyplot draws with Agg: no display is asked for.
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    scale, unit = _token_unit(max(float(run.tokens.max()) for run in runs))
    splits = list(dict.fromkeys(name for run in runs for name in run.splits))
    tops, bottoms = [], []
    for run, colour in zip(runs, _cycle(COLOURS, len(runs)), strict=True):
        smooth = _draw_run(axes, run, colour, splits, scale)
        if smooth.size:
            # The first steps fall from ln(vocabulary): on one scale with them every later difference is a hairline.
            tops.append(smooth[smooth.size // 12 :].max())
            bottoms.append(smooth.min())
        bottoms += [
            float(np.nanmin(split.ce))
            for split in run.splits.values()
            if np.isfinite(split.ce).any()
        ]
    if tops:
        margin = 0.06 * max(max(tops) - min(bottoms), 1e-3)
        axes.set_ylim(min(bottoms) - margin, max(tops) + margin)
    axes.set_xlim(left=0)
    axes.set_title("Next-token cross-entropy", loc="left", fontsize=13, pad=10)
    axes.set_xlabel(f"training tokens ({unit})", fontsize=11)
    axes.set_ylabel("cross-entropy (nats per token)", fontsize=11)
    _style(axes)
    _legend(figure, runs, splits)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def _draw_run(axes: Axes, run: Run, colour: str, splits: Sequence[str], scale: float) -> Series:
    """Draw one run; returns its smoothed training loss over the finite rows."""
    finite = np.isfinite(run.ce)
    tokens, ce = run.tokens[finite] / scale, run.ce[finite]
    smooth = running_mean(ce, max(1, ce.size // 50))
    axes.plot(tokens, ce, color=colour, alpha=0.15, linewidth=0.8, zorder=1)
    axes.plot(tokens, smooth, color=colour, linewidth=1.8, zorder=2)
    for name, split in run.splits.items():
        marker = MARKERS[splits.index(name) % len(MARKERS)]
        axes.plot(
            split.tokens / scale,
            split.ce,
            ":",
            marker=marker,
            color=colour,
            markersize=7,
            markeredgecolor="white",
            linewidth=1,
            zorder=3,
        )
    return smooth


def _legend(figure: Figure, runs: Sequence[Run], splits: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    colours = _cycle(COLOURS, len(runs))
    handles = [
        Line2D([], [], color=colour, linewidth=4, label=run.label)
        for run, colour in zip(runs, colours, strict=True)
    ]
    handles.append(Line2D([], [], color="#777777", linewidth=1.8, label="training, running mean"))
    for number, name in enumerate(splits):
        marker = MARKERS[number % len(MARKERS)]
        handles.append(
            Line2D(
                [],
                [],
                color="#777777",
                marker=marker,
                linestyle=":",
                markersize=7,
                label=f"validation: {name}",
            )
        )
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _token_unit(largest: float) -> tuple[float, str]:
    for scale, unit in (
        (1e12, "trillions"),
        (1e9, "billions"),
        (1e6, "millions"),
        (1e3, "thousands"),
    ):
        if largest >= scale:
            return scale, unit
    return 1.0, "count"


def _cycle(choices: Sequence[str], count: int) -> list[str]:
    return [choices[number % len(choices)] for number in range(count)]


def _labels(directories: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        names = [directory.resolve().name for directory in directories]
        return (
            names
            if len(set(names)) == len(names)
            else [str(directory) for directory in directories]
        )
    if len(labels) != len(directories):
        raise ReportError(
            f"--labels needs one label for each run: {len(directories)} runs, {len(labels)} labels."
        )
    return list(labels)


def report_sweeps(options: argparse.Namespace) -> None:
    """Print the tables; write the page, the pictures and the numbers where they are asked for. ConfigError."""
    if options.labels is not None or options.output is not None:
        raise ConfigError(
            "--labels and --output are for runs: for sweeps use --html, --pictures and --json"
        )
    results = [read_result(folder) for folder in options.runs]
    for result in results:
        print(("## " if options.markdown else "") + str(result.content["title"]) + "\n")
        print(align(table(result), markdown=options.markdown))
        print("".join(f"\n{'* ' if options.markdown else ''}{note}" for note in result.notes()))
    if options.html is not None:
        from megatron_kd.sweep.page import page

        write(options.html, page(results))
    if options.pictures is not None:
        from megatron_kd.sweep.draw import save_pictures
        from megatron_kd.sweep.plots import pictures

        for number, result in enumerate(results, 1):
            save_pictures(
                pictures(result),
                options.pictures if len(results) == 1 else options.pictures / str(number),
            )
    if options.json is not None:
        write(options.json, json.dumps([as_json(result) for result in results], indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Whole, or not at all. ConfigError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def report_runs(options: argparse.Namespace) -> None:
    """Print the table, draw the curves. ReportError."""
    if options.output is None:
        raise ReportError("--output is needed: the picture of the runs' curves.")
    if options.html is not None or options.pictures is not None:
        raise ReportError(
            "--html and --pictures are for sweeps, folders with a sweep.json; for runs use --output."
        )
    labels = _labels(options.runs, options.labels)
    runs = [
        read_run(directory, label) for directory, label in zip(options.runs, labels, strict=True)
    ]
    summaries = [summarize(run) for run in runs]
    print(format_table(summaries, markdown=options.markdown))
    try:
        draw(runs, options.output)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReportError(f"The report cannot be written: {error}.") from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR", help="run directories, or folders of sweeps"
    )
    parser.add_argument(
        "--labels", nargs="+", help="a name for each run (default: the directory's name)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="runs: picture to write; the ending chooses the format (.png, .svg, .pdf)",
    )
    parser.add_argument(
        "--html", type=Path, help="sweeps: one page with everything, to open in any browser"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="sweeps: the pictures as PNG files"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one sentence on standard error."""
    options = _parse(arguments)
    try:
        sweeps = [folder for folder in options.runs if (folder / SWEEP_FILE).exists()]
        if sweeps and len(sweeps) < len(options.runs):
            raise ReportError(
                f"{sweeps[0]} is a sweep and not all of the others are: show runs and sweeps one after the other."
            )
        if sweeps:
            report_sweeps(options)
        else:
            report_runs(options)
    except (ReportError, ConfigError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare runs or sweeps: tables, plots, and for sweeps one web page.

    python tools/report.py RUN_DIR [RUN_DIR ...] [--labels a b c] --output out.png
        [--json out.json] [--markdown]
    python tools/report.py SWEEP_DIR [SWEEP_DIR ...] [--html out.html] [--pictures FOLDER]
        [--json out.json] [--markdown]

Runs: final validation losses, speed, and the loss curves, from each metrics.jsonl. Sweeps (folders
of tools/sweep.py, with a sweep.json): for each cell mean and standard deviation over seeds, the
difference to the baseline with the same seeds, and the paper's figure, with a note where seeds are
missing. Imports neither torch nor megatron-core, so it runs on a login node.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.storage.exit_codes import BAD_INPUT
from megatron_kd.sweep.file_names import SWEEP_FILE
from megatron_kd.sweep.plots.run_curves import draw_runs
from megatron_kd.sweep.results.run_results import ReportError, format_runs, read_run, summarize
from megatron_kd.sweep.results.sweep_results import read_result
from megatron_kd.sweep.results.tables import align, as_json, table


def main(argv: Sequence[str] | None = None) -> int:
    """Report; return 0, or 2 with one sentence on standard error."""
    options = _parser().parse_args(argv)
    try:
        sweeps = [folder for folder in options.runs if (folder / SWEEP_FILE).exists()]
        if sweeps and len(sweeps) < len(options.runs):
            raise ReportError(
                f"{sweeps[0]} is a sweep and not all of the others are: "
                "show runs and sweeps one after the other."
            )
        if sweeps:
            report_sweeps(options)
        else:
            report_runs(options)
    except (ReportError, ConfigError) as error:
        print(f"report: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
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
        "--pictures", type=Path, metavar="FOLDER", help="sweeps: the plots as PNG files"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def report_runs(options: argparse.Namespace) -> None:
    """Print the table of some runs and draw their curves.

    Raises:
        ReportError: An input or output cannot be used.
    """
    if options.output is None:
        raise ReportError("--output is needed: the picture of the runs' curves.")
    if options.html is not None or options.pictures is not None:
        raise ReportError(
            "--html and --pictures are for sweeps, folders with a sweep.json; "
            "for runs use --output."
        )
    labels = _labels(options.runs, options.labels)
    runs = [
        read_run(directory, label) for directory, label in zip(options.runs, labels, strict=True)
    ]
    summaries = [summarize(run) for run in runs]
    print(format_runs(summaries, markdown=options.markdown))
    try:
        draw_runs(runs, options.output)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReportError(f"The report cannot be written: {error}.") from None


def _labels(directories: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        names = [directory.resolve().name for directory in directories]
        return names if len(set(names)) == len(names) else list(map(str, directories))
    if len(labels) != len(directories):
        raise ReportError(
            f"--labels needs one label for each run: {len(directories)} runs, {len(labels)} labels."
        )
    return list(labels)


def report_sweeps(options: argparse.Namespace) -> None:
    """Print the tables of some sweeps; write the page, the plots and the numbers on request.

    Raises:
        ConfigError: An input or output cannot be used.
    """
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
        from megatron_kd.sweep.pages.page import page

        _write(options.html, page(results))
    if options.pictures is not None:
        from megatron_kd.sweep.plots.draw import pictures, save_pictures

        for number, result in enumerate(results, 1):
            several = len(results) > 1
            folder = options.pictures / str(number) if several else options.pictures
            save_pictures(pictures(result), folder)
    if options.json is not None:
        _write(options.json, json.dumps([as_json(result) for result in results], indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file atomically; ConfigError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())

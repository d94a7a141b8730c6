"""Write sweeps as one web page: a single file that requests nothing and works from a disk."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kd.sweep.plots.draw import pictures, svg
from megatron_kd.sweep.plots.kinds import PLOT_KINDS
from megatron_kd.sweep.plots.picture import Picture
from megatron_kd.sweep.results.sweep_results import CellResult, SeedValues, SweepResult
from megatron_kd.sweep.results.tables import (
    baseline_name,
    decimals,
    finished_seeds,
    format_sample,
    heading,
    is_measured,
    paper_heading,
)

_FOLDER = Path(__file__).parent
_ARROWS = {"lower": " ↓", "higher": " ↑"}


def page(results: Sequence[SweepResult]) -> str:
    """Return the HTML document of some sweeps. Everything that comes from a file is escaped.

    Raises:
        ConfigError: matplotlib is missing.
    """
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script runs and nothing is requested, whatever a name in a file contains.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    titles = " · ".join(str(result.content["title"]) for result in results)
    sections = "\n".join(_sweep(result, f"s{number}") for number, result in enumerate(results))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_safe(titles)}</title>\n<style>\n{style}</style>\n"
        f"</head>\n<body>\n<main>\n{sections}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _safe(text: object) -> str:
    return html.escape(str(text), quote=True)


def _sweep(result: SweepResult, name: str) -> str:
    """Return the section of one sweep; `name` is the prefix of its ids."""
    content = result.content
    small = (
        '<p class="warning">A small version, to see that everything works: '
        "its numbers mean nothing.</p>"
        if content["small"]
        else ""
    )
    paragraphs = "".join(
        f"<p>{_safe(paragraph.strip())}</p>"
        for paragraph in re.split(r"\n\s*\n", content["text"])
        if paragraph.strip()
    )
    notes = "".join(f"<li>{_safe(note)}</li>" for note in result.notes())
    lacking = (
        f'<div class="warning" role="note"><strong>Not complete</strong><ul>{notes}</ul></div>'
        if notes
        else ""
    )
    figures = "\n".join(
        _figure(picture, f"{name}-{number}") for number, picture in enumerate(pictures(result))
    )
    head = f"<h1>{_safe(content['title'])}</h1>\n{small}{paragraphs}{lacking}"
    return f"<section>\n{head}\n{_table(result)}\n{figures}\n{_origin(result)}\n</section>"


def _figure(picture: Picture, name: str) -> str:
    kind = PLOT_KINDS[picture.kind]
    caption = kind.caption
    if any(series.paper for series in picture.series):
        caption += kind.paper_caption
    if picture.notes:
        caption += f" Fewer seeds than asked for: {_safe('; '.join(picture.notes))}."
    body = f'<div class="picture" tabindex="0">{svg(picture, name)}</div>'
    return (
        f"<figure>\n<h2>{_safe(picture.title)}</h2>\n{body}\n"
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _table(result: SweepResult) -> str:
    grouped = any(cell.group for cell in result.cells)
    header = [_head("cell", is_number=False)]
    if grouped:
        header.append(_head("group", is_number=False))
    header.append(_head("seeds", is_number=True))
    for metric in result.metrics:
        if is_measured(metric):
            header.append(
                _head(heading(metric) + _ARROWS.get(metric["better"], ""), is_number=True)
            )
            if result.has_baseline:
                text = f"{metric['name']} − {baseline_name(result)}"
                header.append(_head(text, is_number=True))
        if _has_paper(result, metric):
            header.append(_head(paper_heading(metric), is_number=True))
    body = "\n".join(_line(result, cell, grouped) for cell in result.cells)
    legend = (
        "Mean ± standard deviation over seeds. "
        "Hover over a number for each seed's; click a heading to sort."
    )
    if result.has_baseline:
        legend += (
            f" “− {_safe(baseline_name(result))}”: "
            "mean of the differences of runs with the same seed."
        )
    return (
        '<div class="scroll" tabindex="0"><table class="sortable">'
        f"<thead><tr>{''.join(header)}</tr></thead>\n<tbody>\n{body}\n</tbody>"
        f'</table></div>\n<p class="small">{legend} ↓ lower is better, ↑ higher is better.</p>'
    )


def _has_paper(result: SweepResult, metric: Mapping[str, Any]) -> bool:
    return any(metric["name"] in cell.paper for cell in result.cells)


def _head(text: str, *, is_number: bool) -> str:
    attribute = " class=number" if is_number else ""
    return f'<th scope="col"{attribute}><button type="button">{_safe(text)}</button></th>'


def _line(result: SweepResult, cell: CellResult, grouped: bool) -> str:
    values = ", ".join(f"{name} = {value}" for name, value in cell.values.items())
    fields = [f'<th scope="row" title="{_safe(values)}">{_safe(cell.name)}</th>']
    if grouped:
        fields.append(f"<td>{_safe(cell.group)}</td>")
    missing = " missing" if cell.lacking else ""
    fields.append(
        f'<td class="number{missing}" data-value="{result.seeds - len(cell.lacking)}">'
        f"{finished_seeds(result, cell)}</td>"
    )
    for metric in result.metrics:
        name = metric["name"]
        digits = decimals([other.samples[name] for other in result.cells])
        if is_measured(metric):
            fields.append(_number(cell.samples[name], digits, ""))
            if result.has_baseline:
                fields.append(_number(cell.differences[name], digits, "+"))
        if _has_paper(result, metric):
            fields.append(_paper_figure(cell.paper.get(name)))
    return f"<tr>{''.join(fields)}</tr>"


def _number(sample: SeedValues | None, digits: int, sign: str) -> str:
    if sample is None:
        return '<td class="number" data-value="">-</td>'
    seeds = [f"seed {seed}: {value:.6g}" for seed, value in sorted(sample.values.items())]
    seeds += [f"seed {seed}: {reason}" for seed, reason in sorted(sample.lacking.items())]
    value = "" if sample.mean is None else repr(sample.mean)
    missing = " missing" if sample.lacking else ""
    text = _safe(format_sample(sample, digits, sign=sign))
    return (
        f'<td class="number{missing}" data-value="{value}" '
        f'title="{_safe("; ".join(seeds))}">{text}</td>'
    )


def _paper_figure(figure: float | None) -> str:
    value, text = ("", "-") if figure is None else (figure, f"{figure:g}")
    return f'<td class="number" data-value="{value}">{text}</td>'


def _origin(result: SweepResult) -> str:
    content = result.content
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    variables = ", ".join(f"{name} = {value}" for name, value in content["variables"].items())
    facts = [
        ("started", content["time"]),
        ("command", content["command"]),
        ("commit", content["commit"]),
        ("machine", content["machine"]),
        ("versions", versions),
        ("seeds", ", ".join(map(str, content["seeds"]))),
        ("variables", variables or "none"),
    ]
    facts += [
        ("finished steps", f"{count} at {origin}") for origin, count in result.origins.items()
    ]
    entries = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in facts)
    return f"<h2>Where these numbers come from</h2>\n<dl>{entries}</dl>"

"""Sweeps as one page: a single file that asks for nothing else, not even scripts or fonts, and works from a disk."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_kd.sweep.draw import svg
from megatron_kd.sweep.plots import Picture, pictures
from megatron_kd.sweep.results import (
    Result,
    Row,
    Sample,
    baseline_name,
    decimals,
    heading,
    measured,
    paper_heading,
    shown,
)

_HERE = Path(__file__).parent


def page(results: Sequence[Result]) -> str:
    """The whole document. ConfigError without matplotlib. Everything that comes from a file is escaped."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # No script but this one, and no request to anywhere: a name in a file cannot change that.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    titles = " · ".join(str(result.content["title"]) for result in results)
    sections = "\n".join(_sweep(result, f"s{number}") for number, result in enumerate(results))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{_safe(titles)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{sections}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _safe(text: object) -> str:
    return html.escape(str(text), quote=True)


def _sweep(result: Result, name: str) -> str:
    content = result.content
    small = (
        '<p class="warning">A small version, to see that everything works: its numbers mean nothing.</p>'
        if content["small"]
        else ""
    )
    paragraphs = "".join(
        f"<p>{_safe(part.strip())}</p>"
        for part in re.split(r"\n\s*\n", content["text"])
        if part.strip()
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
    notes = (
        f" Fewer seeds than asked for: {_safe('; '.join(picture.notes))}." if picture.notes else ""
    )
    spread = {
        "curve": "Mean over seeds; the band is one standard deviation.",
        "bars": "Mean over seeds ± one standard deviation.",
    }
    caption = spread.get(picture.kind, "Means over seeds; bars are one standard deviation.")
    if picture.kind == "bars" and any(series.paper for series in picture.series):
        caption += " Diamonds: the paper's figures."
    body = f'<div class="picture" tabindex="0">{svg(picture, name)}</div>'
    return f"<figure>\n<h2>{_safe(picture.title)}</h2>\n{body}\n<figcaption>{caption}{notes}</figcaption>\n</figure>"


def _table(result: Result) -> str:
    baseline = any(each is not None for row in result.rows for each in row.differences.values())
    grouped = any(row.group for row in result.rows)
    header = [
        _head("cell", False),
        *([_head("group", False)] if grouped else []),
        _head("seeds", True),
    ]
    for metric in result.metrics:
        better = {"lower": " ↓", "higher": " ↑"}.get(metric["better"], "")
        if measured(metric):
            header.append(_head(heading(metric) + better, True))
        if baseline and measured(metric):
            header.append(_head(f"{metric['name']} − {baseline_name(result)}", True))
        if any(metric["name"] in row.paper for row in result.rows):
            header.append(_head(paper_heading(metric), True))
    body = "\n".join(_row(result, row, baseline, grouped) for row in result.rows)
    legend = "Mean ± standard deviation over seeds. Hover over a number for each seed's; click a heading to sort."
    if baseline:
        legend += f" “− {_safe(baseline_name(result))}”: mean of the differences of runs with the same seed."
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{"".join(header)}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        f'</table></div>\n<p class="small">{legend} ↓ lower is better, ↑ higher is better.</p>'
    )


def _head(text: str, number: bool) -> str:
    return f'<th scope="col"{" class=number" if number else ""}><button type="button">{_safe(text)}</button></th>'


def _row(result: Result, row: Row, baseline: bool, grouped: bool) -> str:
    done = result.seeds - len(row.lacking)
    seeds = str(done) if not row.lacking else f"{done} of {result.seeds}"
    values = ", ".join(f"{name} = {value}" for name, value in row.values.items())
    cells = [
        f'<th scope="row" title="{_safe(values)}">{_safe(row.name)}</th>',
        *([f"<td>{_safe(row.group)}</td>"] if grouped else []),
    ]
    cells.append(
        f'<td class="number{" missing" if row.lacking else ""}" data-value="{done}">{seeds}</td>'
    )
    for metric in result.metrics:
        name = metric["name"]
        digits = decimals([each.samples[name] for each in result.rows])
        if measured(metric):
            cells.append(_number(row.samples[name], digits, ""))
        if baseline and measured(metric):
            cells.append(_number(row.differences[name], digits, "+"))
        if any(name in each.paper for each in result.rows):
            paper = row.paper.get(name)
            cells.append(
                f'<td class="number" data-value="{"" if paper is None else paper}">{"-" if paper is None else f"{paper:g}"}</td>'
            )
    return f"<tr>{''.join(cells)}</tr>"


def _number(sample: Sample | None, digits: int, sign: str) -> str:
    if sample is None:
        return '<td class="number" data-value="">-</td>'
    told = [f"seed {seed}: {value:.6g}" for seed, value in sorted(sample.values.items())]
    told += [f"seed {seed}: {why}" for seed, why in sorted(sample.lacking.items())]
    value = "" if sample.mean is None else repr(sample.mean)
    missing = " missing" if sample.lacking else ""
    return f'<td class="number{missing}" data-value="{value}" title="{_safe("; ".join(told))}">{_safe(shown(sample, digits, sign=sign))}</td>'


def _origin(result: Result) -> str:
    content = result.content
    made = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    facts = [
        ("started", content["time"]),
        ("command", content["command"]),
        ("commit", content["commit"]),
        ("machine", content["machine"]),
        ("versions", made),
        ("seeds", ", ".join(map(str, content["seeds"]))),
        (
            "variables",
            ", ".join(f"{name} = {value}" for name, value in content["variables"].items())
            or "none",
        ),
    ]
    facts += [
        ("finished steps", f"{count} at {origin}") for origin, count in result.origins.items()
    ]
    rows = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in facts)
    return f"<h2>Where these numbers come from</h2>\n<dl>{rows}</dl>"

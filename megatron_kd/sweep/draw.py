"""Pictures of a sweep with matplotlib: as files, and as SVG inside a page, where every point says its numbers."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from megatron_kd.config import ConfigError
from megatron_kd.sweep.plots import Picture, Series
from megatron_kd.sweep.templating import slug

# Okabe and Ito's colours, as tools/report.py has them: distinct for colour-blind readers and in grey print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
MARKERS = ("o", "s", "^", "D", "v", "P")
_GRID, _MUTED = "#dddddd", "#777777"
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11.0,
    "svg.hashsalt": "megatron-kd",
}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_HOVER_POINTS = 40


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """One PNG for each. ConfigError without matplotlib, or where a file cannot be written."""
    paths = []
    for number, picture in enumerate(pictures, 1):
        path = folder / f"{number}-{slug(picture.title)[:60] or picture.kind}.png"
        with _settings():
            figure, _ = _figure(picture)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=130)
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
        paths.append(path)
    return paths


def svg(picture: Picture, name: str) -> str:
    """The picture as an element of a page. name: what its ids begin with, different for each picture of the page."""
    with _settings():
        figure, texts = _figure(picture)
        stream = io.StringIO()
        figure.savefig(
            stream,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        _plain(element, name)
        title = texts.get(element.get("id", "").removeprefix(f"{name}-"))
        if title is not None:
            said = ElementTree.Element("title")
            said.text = title
            element.insert(0, said)
            element.set("class", "point")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", picture.alt)
    return ElementTree.tostring(root, encoding="unicode")


def _plain(element: ElementTree.Element, name: str) -> None:
    """Without namespaces, which a page has by itself; ids of this picture only; colours that follow the page's."""
    element.tag = element.tag.removeprefix(_SVG)
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        key = key.removeprefix(_LINK)
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = f"#{name}-{value[1:]}"
        value = re.sub(r"url\(#", f"url(#{name}-", value)
        if key == "style":
            for number, colour in enumerate(COLOURS):
                value = value.replace(colour, f"var(--series-{number})")
            value = (
                value.replace(_GRID, "var(--grid)")
                .replace(_MUTED, "var(--muted)")
                .replace("#000000", "currentColor")
            )
            value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
        element.set(key, value)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Text stays text, and is never read as a formula. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'megatron-kd[report]'") from None
    settings: Any = _SETTINGS
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are the browser's to draw.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _figure(picture: Picture) -> tuple[Any, dict[str, str]]:
    """The figure, and what each marked part of it says."""
    from matplotlib.figure import Figure

    rows = len(picture.series)
    # Made without pyplot, so that no display is asked for.
    figure = Figure(
        figsize=(8.0, max(2.2, 0.9 + 0.36 * rows) if picture.kind == "bars" else 4.6),
        layout="constrained",
    )
    axes = figure.add_subplot()
    texts: dict[str, str] = {}
    if not picture.series:
        axes.text(0.5, 0.5, "no finished runs", transform=axes.transAxes, ha="center", color=_MUTED)
    {"bars": _draw_bars, "curve": _draw_curve}.get(picture.kind, _draw_points)(axes, picture, texts)
    _style(axes, picture)
    if picture.kind != "bars" and picture.series:
        _legend(figure, picture)
    return figure, texts


def _style(axes: Any, picture: Picture) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.grid(color=_GRID, linewidth=0.7, axis="x" if picture.kind == "bars" else "both")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(picture.x_label)
    if picture.kind != "bars":
        axes.set_ylabel(picture.y_label)
    if picture.x_names:
        axes.set_xticks(range(len(picture.x_names)), picture.x_names)
    if picture.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if picture.kind == "lines":
            axes.set_xticks(
                sorted({point.x for series in picture.series for point in series.points})
            )
            axes.set_xticks([], minor=True)


def _legend(figure: Any, picture: Picture) -> None:
    from matplotlib.lines import Line2D

    marked = picture.kind != "curve"
    handles = [
        Line2D(
            [],
            [],
            color=_colour(number),
            linewidth=2,
            marker=_marker(number) if marked else "",
            linestyle=_line(picture, number),
        )
        for number in range(len(picture.series))
    ]
    names = [series.name for series in picture.series]
    if any(series.paper for series in picture.series):
        handles.append(
            Line2D([], [], color=_MUTED, marker="D", markerfacecolor="none", linestyle="")
        )
        names.append("the paper's figure")
    columns = 1 if max(map(len, names)) > 40 else 2 if max(map(len, names)) > 18 else 4
    legend = figure.legend(
        handles,
        [""] * len(names),
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=10,
    )
    # Set afterwards: a legend leaves out names that begin with _.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def _line(picture: Picture, number: int) -> Any:
    """Colours come again after eight: then lines are dashed."""
    if picture.kind == "tradeoff" and all(len(series.points) == 1 for series in picture.series):
        return ""
    return ("-", "--", ":", "-.")[number // len(COLOURS) % 4]


def _draw_bars(axes: Any, picture: Picture, texts: dict[str, str]) -> None:
    """Bars from zero where zero is near; else points, because a bar that does not begin at zero says nothing true."""
    means = [series.points[0].x for series in picture.series]
    bars = bool(means) and min(means) >= 0 and min(means) <= 0.6 * max(means)
    for row, series in enumerate(picture.series):
        point = series.points[0]
        gid = f"p{len(texts)}"
        texts[gid] = point.text
        if bars:
            (bar,) = axes.barh([row], [point.x], height=0.62, color=COLOURS[0], alpha=0.8)
            bar.set_gid(gid)
        else:
            axes.plot([point.x], [row], "o", color=COLOURS[0], markersize=8, gid=gid)
        if point.x_sd:
            axes.errorbar(
                [point.x],
                [row],
                xerr=[point.x_sd],
                fmt="none",
                ecolor=_MUTED if bars else COLOURS[0],
                capsize=4,
                linewidth=1.5,
            )
        for paper in series.paper:
            gid = f"p{len(texts)}"
            texts[gid] = paper.text
            axes.plot(
                [paper.x],
                [row],
                "D",
                color=COLOURS[1],
                markerfacecolor="none",
                markersize=7,
                gid=gid,
            )
    axes.set_yticks(range(len(picture.series)), [series.name for series in picture.series])
    axes.set_ylim(len(picture.series) - 0.5, -0.5)
    if bars:
        axes.set_xlim(left=0)


def _draw_curve(axes: Any, picture: Picture, texts: dict[str, str]) -> None:
    tops, bottoms = [], []
    for number, series in enumerate(picture.series):
        colour = _colour(number)
        xs, ys = [point.x for point in series.points], [point.y for point in series.points]
        low, high = ([point.y + sign * point.y_sd for point in series.points] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(xs, ys, color=colour, linewidth=1.8, linestyle=_line(picture, number))
        # The first steps fall from ln(vocabulary): on one scale with them every later difference is a hairline.
        tops.append(max(high[len(high) // 12 :]))
        bottoms.append(min(low))
    if not tops:
        return
    margin = 0.06 * max(max(tops) - min(bottoms), 1e-6)
    low_end, high_end = min(bottoms) - margin, max(tops) + margin
    axes.set_ylim(low_end, high_end)
    for number, series in enumerate(picture.series):
        few = len(series.points) <= _HOVER_POINTS
        chosen = [
            *series.points[:: max(1, len(series.points) // _HOVER_POINTS)],
            *series.points[-1:],
        ]
        for point in dict.fromkeys(chosen):
            if not low_end <= point.y <= high_end:
                continue
            gid = f"p{len(texts)}"
            texts[gid] = point.text
            # On long curves they are not seen, only felt.
            axes.plot(
                [point.x],
                [point.y],
                "o",
                color=_colour(number),
                markersize=5 if few else 9,
                alpha=1.0 if few else 0.0,
                gid=gid,
            )


def _draw_points(axes: Any, picture: Picture, texts: dict[str, str]) -> None:
    for number, series in enumerate(picture.series):
        colour, line = _colour(number), _line(picture, number)
        if line:
            axes.plot(
                [point.x for point in series.points],
                [point.y for point in series.points],
                line,
                color=colour,
                linewidth=1.5,
            )
        _draw_marks(axes, series, colour, _marker(number), texts)


def _draw_marks(axes: Any, series: Series, colour: str, marker: str, texts: dict[str, str]) -> None:
    for point in series.points:
        spread = {
            "xerr": [point.x_sd] if point.x_sd else None,
            "yerr": [point.y_sd] if point.y_sd else None,
        }
        axes.errorbar(
            [point.x], [point.y], **spread, fmt="none", ecolor=colour, capsize=3, linewidth=1.2
        )
        gid = f"p{len(texts)}"
        texts[gid] = point.text
        axes.plot([point.x], [point.y], marker, color=colour, markersize=7, gid=gid)
    for paper in series.paper:
        gid = f"p{len(texts)}"
        texts[gid] = paper.text
        axes.plot(
            [paper.x], [paper.y], "D", color=colour, markerfacecolor="none", markersize=8, gid=gid
        )

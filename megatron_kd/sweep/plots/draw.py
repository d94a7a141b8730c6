"""Draw the plots of a sweep with matplotlib: as files, and as SVG with tooltips for pages."""

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
from megatron_kd.sweep.definition.templating import slug
from megatron_kd.sweep.plots.canvas import (
    COLOURS,
    GRID,
    MUTED,
    Canvas,
    colour_of,
    line_style_of,
    marker_of,
)
from megatron_kd.sweep.plots.kinds import PLOT_KINDS
from megatron_kd.sweep.plots.picture import Picture, PlotKind
from megatron_kd.sweep.results.sweep_results import SweepResult

_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11.0,
    "svg.hashsalt": "megatron-kd",
}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def pictures(result: SweepResult) -> list[Picture]:
    """Return the content of every [[plot]] of a sweep, in order."""
    return [
        PLOT_KINDS[plot["kind"]].make(result, plot, result.groups(plot["groups"]))
        for plot in result.content["plots"]
    ]


def describe(picture: Picture) -> str:
    """Describe a picture in words, for screen readers."""
    last_only = PLOT_KINDS[picture.kind].describes_last_point_only
    sentences = []
    for series in picture.series:
        points = series.points[-1:] if last_only else series.points
        texts = (point.text.removeprefix(f"{series.name}: ") for point in points)
        sentences.append(f"{series.name}: {', '.join(texts)}.")
    axes = f"{picture.y_label} against {picture.x_label}."
    return f"{picture.title}. {axes} {' '.join(sentences)}"


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write every picture as a PNG file.

    Raises:
        ConfigError: matplotlib is missing, or a file cannot be written.
    """
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
    """Return a picture as an element of a page.

    Args:
        picture: The picture.
        name: Prefix of the element's ids, different for each picture of a page.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with _settings():
        figure, tooltips = _figure(picture)
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
        _adapt_to_page(element, name)
        tooltip = tooltips.get(element.get("id", "").removeprefix(f"{name}-"))
        if tooltip is not None:
            title = ElementTree.Element("title")
            title.text = tooltip
            element.insert(0, title)
            element.set("class", "point")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", describe(picture))
    return ElementTree.tostring(root, encoding="unicode")


def _adapt_to_page(element: ElementTree.Element, name: str) -> None:
    """Remove namespaces, make ids unique in the page, and use the page's colours."""
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
            value = _page_style(value)
        element.set(key, value)


def _page_style(style: str) -> str:
    for number, colour in enumerate(COLOURS):
        style = style.replace(colour, f"var(--series-{number})")
    style = style.replace(GRID, "var(--grid)").replace(MUTED, "var(--muted)")
    style = style.replace("#000000", "currentColor")
    return re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Keep text as text and never parse it as a formula; ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'megatron-kd[report]'") from None
    settings: Any = _SETTINGS
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The browser draws letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _figure(picture: Picture) -> tuple[Any, dict[str, str]]:
    """Draw a picture; return the figure and the tooltips by mark."""
    from matplotlib.figure import Figure

    kind = PLOT_KINDS[picture.kind]
    height = max(2.2, 0.9 + 0.36 * len(picture.series)) if kind.horizontal else 4.6
    # A Figure made without pyplot needs no display.
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    canvas = Canvas(axes)
    if not picture.series:
        axes.text(0.5, 0.5, "no finished runs", transform=axes.transAxes, ha="center", color=MUTED)
    kind.draw(canvas, picture)
    _style(axes, picture, kind)
    if picture.series and not kind.horizontal:
        _legend(figure, picture, kind)
    return figure, canvas.tooltips


def _style(axes: Any, picture: Picture, kind: PlotKind) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, linewidth=0.7, axis="x" if kind.horizontal else "both")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(picture.x_label)
    if not kind.horizontal:
        axes.set_ylabel(picture.y_label)
    if picture.x_names:
        axes.set_xticks(range(len(picture.x_names)), picture.x_names)
    if picture.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        if kind.ticks_at_points:
            ticks = {point.x for series in picture.series for point in series.points}
            axes.set_xticks(sorted(ticks))
            axes.set_xticks([], minor=True)


def _legend(figure: Any, picture: Picture, kind: PlotKind) -> None:
    from matplotlib.lines import Line2D

    has_lines = kind.joins_points or any(len(series.points) > 1 for series in picture.series)
    handles = [
        Line2D(
            [],
            [],
            color=colour_of(number),
            linewidth=2,
            marker=marker_of(number) if kind.has_markers else "",
            linestyle=line_style_of(number) if has_lines else "",
        )
        for number in range(len(picture.series))
    ]
    names = [series.name for series in picture.series]
    if any(series.paper for series in picture.series):
        handles.append(
            Line2D([], [], color=MUTED, marker="D", markerfacecolor="none", linestyle="")
        )
        names.append("the paper's figure")
    longest = max(map(len, names))
    legend = figure.legend(
        handles,
        [""] * len(names),
        loc="outside lower left",
        ncols=1 if longest > 40 else 2 if longest > 18 else 4,
        frameon=False,
        fontsize=10,
    )
    # Texts are set afterwards: matplotlib leaves names that begin with _ out of a legend.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)

"""The pictures of a comparison, as SVG that follows the page: text and axes take its colour, points say their names.
Knows matplotlib; refuses to know how scores are judged.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.comparison.results import Comparison, Row
from trimtab.report import smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""A colour that stands for the page's own; nothing else is drawn in it."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6BB1", "#7F7F7F")
"""Safe for colour-blind readers, and seen on white and on black."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
AXES = (
    ("parameters", "trained parameters", lambda row: max(1.0, float(row.parameters)), True),
    ("seconds", "training seconds", lambda row: row.seconds, False),
    ("memory", "peak memory, MB", lambda row: row.peak_memory_mb, False),
)
"""What the objective is drawn against: name, title, value, whether on a logarithmic axis."""


def pareto(found: Comparison, axes: Sequence[Any] = AXES) -> dict[str, Figure]:
    """The objective against each cost, by the cost's name; none without a scored method."""
    rows = [row for row in found.rows if row.runs]
    return {name: _scatter(found, rows, title, cost, log) for name, title, cost, log in axes} if rows else {}


def front(rows: Sequence[Row], cost: Callable[[Row], float], sign: int) -> list[Row]:
    """The methods that no other beats in both score and cost, in the order of their cost."""
    ordered = sorted(rows, key=lambda row: (cost(row), -sign * row.mean))
    kept: list[Row] = []
    for row in ordered:
        if not kept or sign * row.mean > sign * kept[-1].mean:
            kept.append(row)
    return kept


def _scatter(found: Comparison, rows: Sequence[Row], title: str, cost: Any, log: bool) -> Figure:
    figure, axis = blank((4.6, 3.6))
    best = front(rows, cost, 1 if found.higher else -1)
    axis.plot([cost(row) for row in best], [row.mean for row in best], color=INK, alpha=0.35, linewidth=1, zorder=1)
    for at, row in enumerate(rows):
        deviation = 0.0 if math.isnan(row.deviation) else row.deviation
        colour, marker = _look(at)
        axis.errorbar(cost(row), row.mean, deviation or None, fmt="none", ecolor=colour, alpha=0.6, capsize=3)
        (point,) = axis.plot(cost(row), row.mean, marker, color=colour, markersize=8, zorder=3)
        point.set_gid(_gid(row, cost, title, found))
    if log:
        axis.set_xscale("log")
    axis.set_xlabel(title)
    axis.set_ylabel(found.objective.replace("_", " "))
    axis.grid(alpha=0.15, color=INK)
    axis.margins(x=0.25, y=0.15)
    figure.draw_without_rendering()
    name_points(axis, [(row.method, cost(row), row.mean) for row in rows], INK)
    return figure


def curves(found: Comparison) -> Figure | None:
    """The training loss of every method's first seed by epoch, smoothed; None where there is none."""
    rows = [row for row in found.rows if len(row.curve) > 1]
    if not rows:
        return None
    figure, axis = blank((7.2, 3.8))
    for at, row in enumerate(rows):
        colour, _ = _look(at)
        loss = smoothed([loss for _, loss in row.curve])
        epochs = [epoch for epoch, _ in row.curve]
        (line,) = axis.plot(epochs, loss, color=colour, linewidth=1.6, label=row.method, linestyle=_dash(at))
        line.set_gid(hover(f"{row.method}: loss {loss[-1]:.3f} after {epochs[-1]:.3g} epochs"))
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss, smoothed")
    axis.grid(alpha=0.15, color=INK)
    legend = axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def blank(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure in the page's colours, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.tick_params(colors=INK, labelsize=8, which="both")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(INK)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    return figure, axis


def _look(at: int) -> tuple[str, str]:
    return COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]


def _dash(at: int) -> str:
    return ("-", "--", "-.", ":")[at // len(COLOURS) % 4]


def _gid(row: Row, cost: Any, title: str, found: Comparison) -> str:
    spread = "" if math.isnan(row.deviation) else f" ± {row.deviation:.3f}"
    return hover(f"{row.method}: {found.objective} {row.mean:.3f}{spread}, {title} {cost(row):,.4g}")


def hover(text: str) -> str:
    """A text that an element carries as its id until it becomes its <title>."""
    return "title:" + text.replace('"', "″")


# -- SVG ----------------------------------------------------------------------------------------------------------


def inline(figure: Figure, name: str) -> str:
    """The figure as an <svg> for a page: the page's colours, identifiers of its own, names as <title> for hovering."""
    text = _svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="title:([^"]*)">', lambda found: f'<g class="named"><title>{found[1]}</title>', text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg {_SPACES} role="img" class="plot" \1>', text, count=1)
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    return text.replace(INK, "currentColor")


_SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def alone(figure: Figure) -> str:
    """The figure as an SVG file of its own, dark on white."""
    figure.set_facecolor("#ffffff")
    text = re.sub(r'<g id="title:([^"]*)">', lambda found: f"<g><title>{found[1]}</title>", _svg(figure))
    figure.set_facecolor("none")
    return text.replace(INK, "#222222")


def _svg(figure: Figure) -> str:
    import matplotlib

    out = io.StringIO()
    settings: Any = {"svg.hashsalt": "trimtab", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        figure.savefig(out, format="svg", metadata={"Date": None}, facecolor=figure.get_facecolor())
    return out.getvalue()


# -- names beside points ------------------------------------------------------------------------------------------


def name_points(axis: Any, points: Sequence[tuple[str, float, float]], colour: str = "black") -> None:
    """Names beside points (name, x, y), once the layout is made: the nearest place that neither a name nor a point has,
    with a thin line where it is far.
    """
    scale = 72 / axis.figure.dpi  # points a pixel
    left, right = axis.bbox.x0 * scale, axis.bbox.x1 * scale
    at = {name: axis.transData.transform((x, y)) * scale for name, x, y in points}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    for name, x_value, y_value in sorted(points, key=lambda point: -point[2]):
        x, y = at[name]
        width = 5.2 * len(name)
        inside = [side for side in (7, -7 - width) if left < x + side and x + side + width < right] or [7]
        places = [(side, rise) for rise in range(-96, 97, 6) for side in inside]
        boxes = {place: _box(x, y, *place, width) for place in places}
        far = {(side, rise): abs(rise) + (12 if side < 0 else 0) for side, rise in places}
        side, rise = min(places, key=lambda place: (_overlaps(boxes[place], taken), far[place]))
        taken.append(_box(x, y, side, rise, width))
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if abs(rise) > 6 else None
        axis.annotate(
            name,
            (x_value, y_value),
            xytext=(side, rise - 3),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            arrowprops=line,
            parse_math=False,
            in_layout=False,
        )


Box = tuple[float, float, float, float]


def _box(x: float, y: float, side: float, rise: float, width: float) -> Box:
    return x + side, y + rise - 5, x + side + width, y + rise + 5


def _overlaps(box: Box, taken: Sequence[Box]) -> int:
    left, bottom, right, top = box
    return sum(left < x1 and x0 < right and bottom < y1 and y0 < top for x0, y0, x1, y1 in taken)

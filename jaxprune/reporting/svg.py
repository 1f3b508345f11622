"""How plots of a report are drawn: as SVG in the page's own colours, with its fonts."""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

# Colours that stand for variables of the page's style sheet.
TEXT, AXIS, GRID, DENSE = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0505{number:02x}" for number in range(10)]
VARIABLES = {TEXT: "--text", AXIS: "--axis", GRID: "--grid", DENSE: "--dense"}
VARIABLES |= {color: f"--series-{number}" for number, color in enumerate(SERIES)}
MARKERS = "osD^vP*X"
LEAST, MOST = 1e-12, 1e15
"""Between these, numbers are drawn where they belong."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": AXIS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "grid.color": GRID,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": TEXT,
    "lines.markersize": 3.5,
    "lines.linewidth": 1.2,
}
WIDTH = 4.4
"""Inches; a phone is about as wide, so that the text of a plot stays readable there."""


class Figure(NamedTuple):
    """A plot with its heading.

    Attributes:
        title: the title of the plot.
        svg: the plot.
    """

    title: str
    svg: Markup


def draw(title: str, height: float, plot: Callable[[Axes], None]) -> Figure:
    """Draws on one pair of axes; the legend, where there is one, goes below them."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        # matplotlib's font has no Chinese, a box stands for it; and names may leave the plot no
        # room.
        warnings.filterwarnings("ignore", "Glyph .* missing|constrained_layout not applied")
        figure = Canvas(figsize=(WIDTH, height), layout="constrained")
        axis = figure.add_subplot()
        plot(axis)
        handles, labels = axis.get_legend_handles_labels()
        if len(labels) > 1:
            columns = max(1, min(4, 56 // (8 + max(map(len, labels)))))
            figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return Figure(title, _inline(file.getvalue(), title))


def _inline(svg: str, title: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    # Several plots are in one page: no two elements may have one id.
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:12]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return Markup(svg)


def logarithmic(axis: Any) -> None:
    """Makes an axis logarithmic, with plain numbers, at 1, 2 and 5 where it spans little; linear
    where all are 0."""
    if not axis.get_minpos() < math.inf:
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    for multiples in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
        ticks = [
            m * 10.0**e for e in range(-9, 10) for m in multiples if low <= m * 10.0**e <= high
        ]
        if len(ticks) <= 7:
            break
    if len(ticks) < 2:
        ticks = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def series_style(number: int) -> dict[str, Any]:
    return {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}


def display_name(name: str, most: int = 26) -> str:
    """Returns a name of somebody else's as a plot bears it: without its middle where it is long, so
    that it leaves room."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    name = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
    # matplotlib's legends leave out what begins with _
    return f" {name}" if name.startswith("_") else name


def format_number(value: float | None) -> str:
    """Returns a number in three or four digits; None stands for infinity."""
    if value is None:
        return "∞"
    return f"{value:.2f}" if value < 100 else f"{value:.4g}" if value < 1e4 else f"{value:.2e}"

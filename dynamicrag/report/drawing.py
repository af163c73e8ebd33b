"""The style of all figures, and their conversion to inline SVG and PNG.

Lengths are CSS pixels. Each figure is drawn for a desktop and for a phone, so that its text is readable on both. Text
and rules use the colours of the page, which change in dark mode.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.typing import RcKeyType

WIDE, NARROW = 880, 350
INK, MUTED, RULE, PAPER = "#1b1b1e", "#66666d", "#d5d5da", "#fefefe"
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
STYLE: dict[RcKeyType, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"], "font.size": 12,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.labelsize": 12, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.6, "lines.markersize": 5,
    "legend.frameon": False, "legend.fontsize": 12, "legend.handlelength": 1.2, "figure.facecolor": PAPER, "axes.facecolor": "none",
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False,
}
SELECTOR_COLOURS = {
    "none": "#9696a0", "top": "#6b9ac4", "all": "#3f6c9c", "monot5": "#c28a2c", "adaptive": "#6d9b58", "pointwise": "#8f72b5",
    "dynamic": "#cf4a33", "windows": "#e2856f", "gold": "#b3a125",
}
LINE_COLOURS = ("#1f8583", "#b0508c", "#b98a1f", "#5b67c0", "#6f8f3a", "#8a6a58")


@dataclass
class Picture:
    """A figure of the page: `wide` and `narrow` are SVG; `caption` and `alt` are plain text."""

    name: str
    alt: str
    caption: str
    wide: str
    narrow: str


def picture(folder: Path, name: str, draw: Callable[[int], Figure], alt: str, caption: str) -> Picture:
    """Draw a figure at both widths, and write it to folder/name.png at twice the resolution."""
    drawn = {}
    with rc_context(STYLE):
        for size, width in (("wide", WIDE), ("narrow", NARROW)):
            figure = draw(width)
            drawn[size] = _inline(figure, f"{name}-{size}", alt)
            if size == "wide":
                figure.savefig(folder / f"{name}.png", dpi=144, metadata={"Software": None})
    return Picture(name, alt, caption, **drawn)


def _inline(figure: Figure, prefix: str, alt: str) -> str:
    """Return the figure as an SVG element with unique ids and the colours of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def panels(count: int, width: int, height: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Create `count` axes of `height`, in up to `columns` columns on a desktop and one column on a phone."""
    columns = min(count, columns) if width > NARROW else 1
    lines = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width / 72, lines * height / 72), layout=layout)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def short(label: str, width: int) -> str:
    """Shorten a long label by cutting out its middle."""
    most = 42 if width > NARROW else 28
    return label if len(label) <= most else f"{label[: most // 2 - 1]}…{label[len(label) - most // 2 :]}"


def interval_bars(axes: Axes, labels: Sequence[str], cells: Sequence[dict], colours: Sequence[str]) -> None:
    """Draw horizontal bars from 0, first on top, with 95 % intervals and values at the ends."""
    places = range(len(labels))
    axes.barh(places, [cell["score"] for cell in cells], height=0.62, color=colours)
    for place, cell in zip(places, cells, strict=True):
        axes.plot([cell["low"], cell["high"]], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
        axes.annotate(f"{cell['score']:.1f}", (cell["high"], place), (5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(max(cell["high"] for cell in cells), 1))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_color(RULE)


def key(figure: Figure, entries: Sequence[tuple[str, dict]]) -> None:
    """Add a legend above the panels, from labels and marker styles."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **{"linestyle": "none", "marker": "s", "markersize": 8, **look}) for label, look in entries]
    per_line = max(1, int(figure.get_figwidth() * 72 // 170))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), per_line), columnspacing=1.4, handletextpad=0.5)

"""Figures of answers: scores by system and by documents, and costs. `width` is in CSS pixels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamicrag.report.drawing import (
    LINE_COLOURS,
    MUTED,
    NARROW,
    PAPER,
    SELECTOR_COLOURS,
    interval_bars,
    key,
    panels,
    short,
)
from dynamicrag.report.systems import System, by_generator

METRIC_LABELS = {
    "em": "exact match", "match": "match", "accuracy": "accuracy", "f1": "token F1", "rouge": "ROUGE-L",
    "rouge_lsum": "ROUGE-Lsum", "str_em": "STR-EM",
}
K_BINS = [*((k, k) for k in range(6)), (6, 8), (9, 11), (12, 14), (15, 10**6)]  # used if k exceeds 8


def score_label(systems: Sequence[System]) -> str:
    """Return the label of the score axis: the metric, if all systems have the same and only one."""
    metrics = {str(system.summary["metric"]) for system in systems}
    name = metrics.pop() if len(metrics) == 1 else "score"
    label = "score" if "+" in name else METRIC_LABELS.get(name, name)
    return f"{label}, 0 to 100"


def generator_bars(groups: dict[str, dict[str, dict]], width: int) -> Figure:
    """Draw one group of bars per data set and one bar per generator: {data set: {generator: cell of evaluate.py}}."""
    generators = list(dict.fromkeys(name for cells in groups.values() for name in cells))
    colours = dict(zip(generators, LINE_COLOURS * len(generators), strict=False))
    bars = [(group, name, cells[name]) for group, cells in groups.items() for name in generators if name in cells]
    figure, [axes] = panels(1, width, 60 + 24 * len(bars) + 14 * len(groups), 1)
    interval_bars(axes, [""] * len(bars), [cell for _, _, cell in bars], [colours[name] for _, name, _ in bars])
    for edge in range(1, len(bars)):
        if bars[edge][0] != bars[edge - 1][0]:
            axes.axhline(edge - 0.5, color=MUTED, linewidth=0.6, linestyle=(0, (2, 3)))
    middles = [[place for place, (group, _, _) in enumerate(bars) if group == name] for name in groups]
    axes.set_yticks([sum(places) / len(places) for places in middles], [short(name, width) for name in groups])
    axes.set_xlabel("score, 0 to 100")
    key(figure, [(short(name, width), {"color": colours[name]}) for name in generators])
    return figure


def selector_bars(systems: Sequence[System], width: int) -> Figure:
    """Draw bars of every selector, in one panel per generator."""
    generators = by_generator(systems)
    tallest = max(map(len, generators.values()))
    figure, axes = panels(len(generators), width, 70 + 27 * tallest, 2)
    limit = 1.18 * max(max(system.summary["high"] for system in systems), 1)
    for panel, (generator, members) in zip(axes, generators.items(), strict=True):
        colours = [SELECTOR_COLOURS.get(system.family, MUTED) for system in members]
        interval_bars(panel, [short(system.label, width) for system in members], [system.summary for system in members], colours)
        panel.set_xlim(0, limit)
        panel.set_title(short(generator, width))
        panel.set_xlabel(score_label(systems))
    return figure


def k_curves(systems: Sequence[System], width: int) -> Figure:
    """Plot score and prompt tokens against the documents used: lines for fixed k, a point for the dynamic selector."""
    figure, (scores, tokens) = panels(2, width, 290, 2)
    colours = {}
    for number, (generator, members) in enumerate(by_generator(systems).items()):
        colour = colours[generator] = LINE_COLOURS[number % len(LINE_COLOURS)]
        fixed = sorted((system for system in members if system.fixed), key=lambda system: system.documents)
        for chosen, style in (
            (fixed, {"marker": "o"}),
            ([system for system in members if system.selector == "dynamic"], {"marker": "D", "linestyle": "none", "markersize": 9, "zorder": 4}),
        ):
            look: dict[str, Any] = {"color": colour, "markeredgecolor": PAPER, **style}
            k = [system.documents for system in chosen]
            score = [system.score for system in chosen]
            bounds = [[abs(system.summary[side] - system.score) for system in chosen] for side in ("low", "high")]
            shift = 0.012 * max(system.documents for system in systems) * number  # draws intervals next to each other
            scores.errorbar([value + shift for value in k], score, yerr=bounds, elinewidth=1, **look)
            tokens.plot(k, [system.prompt_tokens for system in chosen], **look)
    for axes, label in ((scores, score_label(systems)), (tokens, "prompt tokens per question")):
        axes.set_xlabel("documents used, mean k")
        axes.set_title(label)
        axes.set_ylim(0, None)
    marks = [("fixed k", {"marker": "o", "linestyle": "-", "color": MUTED}), ("dynamic", {"marker": "D", "color": MUTED})]
    key(figure, [(short(name, width), {"color": colour}) for name, colour in colours.items()] + marks)
    return figure


def k_heat(groups: dict[str, dict[str, Counter]], width: int) -> Figure:
    """Draw the share of questions of each kind (lines) with k documents (columns): {panel: {kind: Counter of k}}."""
    largest = max(k for kinds in groups.values() for counts in kinds.values() for k in counts)
    bins = [(k, k) for k in range(largest + 1)] if largest <= 8 else [edges for edges in K_BINS if edges[0] <= largest]
    names = [str(low) if low == high else f"{low}+" if high > 10**5 else f"{low}–{high}" for low, high in bins]
    kinds = list(dict.fromkeys(kind for counts in groups.values() for kind in counts))
    figure, axes = panels(len(groups), width, 78 + 26 * len(kinds), 3)
    for number, (panel, (title, counted)) in enumerate(zip(axes, groups.items(), strict=True)):
        colour = SELECTOR_COLOURS["all" if title.startswith("needed") else "dynamic"]
        for line, kind in enumerate(kinds):
            counts = counted.get(kind, Counter())
            for column, (low, high) in enumerate(bins):
                share = sum(number for k, number in counts.items() if low <= k <= high) / max(counts.total(), 1)
                if share:
                    panel.bar(column, 0.92, 0.94, line - 0.46, color=colour, alpha=0.1 + 0.7 * share)
                    panel.text(column, line, f"{100 * share:.0f}", ha="center", va="center")
        panel.set(xlim=(-0.5, len(bins) - 0.5), ylim=(len(kinds) - 0.5, -0.5), xlabel="k, documents")
        panel.set_xticks(range(len(bins)), names)
        panel.set_yticks(range(len(kinds)), [short(kind, NARROW) for kind in kinds] if number % 3 == 0 or width <= NARROW else [""] * len(kinds))
        panel.set_title(short(title, NARROW))
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
    return figure


def top_n_curves(series: Mapping[str, Sequence[System]], single: Mapping[str, System], width: int) -> Figure:
    """Plot score, calls and prompt tokens against N, one line per series.

    `single` maps a series to its single-window system.
    """
    figure, axes = panels(3, width, 270, 3)
    colours = dict(zip(series, LINE_COLOURS * len(series), strict=False))
    points: list[tuple[str, Sequence[System], dict[str, Any]]] = [(name, members, {"marker": "o"}) for name, members in series.items()]
    points += [(name, [system], {"marker": "D", "linestyle": "none", "markersize": 7}) for name, system in single.items()]
    largest = max(system.shown for _, members, _ in points for system in members)
    for name, members, look in points:
        shift = 0.015 * largest * list(series).index(name)  # draws intervals next to each other
        n = [system.shown + shift for system in members]
        bounds = [[abs(system.summary[side] - system.score) for system in members] for side in ("low", "high")]
        axes[0].errorbar(n, [system.score for system in members], yerr=bounds, color=colours[name], elinewidth=1, **look)
        axes[1].plot(n, [system.calls for system in members], color=colours[name], **look)
        axes[2].plot(n, [system.prompt_tokens for system in members], color=colours[name], **look)
    for name, system in single.items():
        axes[0].axhline(system.score, color=colours[name], linewidth=0.9, linestyle=(0, (2, 3)))
    every = [system for members in series.values() for system in members]
    for panel, title in zip(axes, (score_label(every), "calls per question",
                                   "prompt tokens per question"), strict=True):
        panel.set_title(title)
        panel.set(xlabel="N, documents read", xticks=sorted({system.shown for _, members, _ in points for system in members}))
        panel.set_ylim(0, None)
    marks = [("one window, dynamic", {"marker": "D", "color": MUTED})]
    key(figure, [(short(name, width), {"color": colour}) for name, colour in colours.items()] + marks)
    return figure


def cost_bars(systems: Sequence[System], width: int) -> Figure:
    """Draw calls, tokens and speed of every system of one evaluation set."""
    costs = {
        "calls": [system.calls for system in systems],
        "prompt tokens": [system.prompt_tokens for system in systems],
        "generated tokens": [system.generated_tokens for system in systems],
        "questions per second": [system.speed for system in systems],
    }
    figure, axes = panels(len(costs), width, 56 + 23 * len(systems), len(costs))
    for number, (panel, (title, values)) in enumerate(zip(axes, costs.items(), strict=True)):
        panel.barh(range(len(systems)), values, height=0.62, color=[SELECTOR_COLOURS.get(system.family, MUTED) for system in systems])
        for place, value in enumerate(values):
            said = "not known" if np.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            panel.annotate(said, (np.nan_to_num(value), place), (4, 0), textcoords="offset points", va="center")
        named = number == 0 or width <= NARROW
        panel.set_yticks(range(len(systems)), [short(system.name, width) if named else "" for system in systems])
        panel.set(ylim=(len(systems) - 0.4, -0.6), xlim=(0, 1.32 * max(*np.nan_to_num(values), 1e-9)))
        panel.set_title(title)
        panel.grid(axis="y", visible=False)
    return figure


def line(axes: Axes, x: Sequence[float], y: Sequence[float], **look: Any) -> None:
    """Draw a curve with its points. A curve of more than 40 points is thin, with a running mean."""
    if len(x) <= 40:
        axes.plot(x, y, marker="o", **{"markersize": 3.5, **look})
        return
    width = len(x) // 12
    axes.plot(x, y, **{"linewidth": 0.8, "alpha": 0.4, **look})
    axes.plot(np.convolve(x, np.ones(width) / width, "valid"), np.convolve(y, np.ones(width) / width, "valid"), **look)

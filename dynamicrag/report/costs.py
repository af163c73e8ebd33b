"""Sections about cost: top-N inference compared with one window, and the cost of an answer for each system."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dynamicrag.report import figures
from dynamicrag.report.drawing import picture
from dynamicrag.report.sections import Section, slug
from dynamicrag.report.systems import BY_LLM, System, by_evaluation_set


def top_n(systems: Sequence[System], folder: Path) -> Section:
    """Plot runs with more documents by N, for windows and other selectors, together with inference.py's single window."""
    text = "Documents beyond one window, chosen window by window, compared with one window and with other selectors."
    section = Section("topn", "Top N, window by window", text)
    for name, members in by_evaluation_set([system for system in systems if system.wider]).items():
        series: dict[str, list[System]] = defaultdict(list)
        for system in members:
            how = "by windows" if system.selector == "windows" else system.selector.replace(":", " ")
            series[f"{system.generator} · {how}"].append(system)
        if not any(system.selector == "windows" for system in members):
            continue
        asked = members[0].summary["groups"].keys()
        single = {}
        for label, runs in series.items():
            like = [one for one in systems if not one.wider and one.generator == runs[0].generator]
            same = [one for one in like if one.evaluation_set == name] or [one for one in like if one.summary["groups"].keys() == asked]
            if runs[0].selector == "windows":
                single.update((label, one) for one in same if one.selector == "dynamic")
            series[label] = sorted([*runs, *(one for one in same if one.selector == runs[0].selector)], key=lambda one: one.shown)
        sentences = [
            f"{label}, N = {', '.join(str(one.shown) for one in runs)}: score {', '.join(format(one.score, '.1f') for one in runs)}"
            for label, runs in series.items()
        ] + [f"one window of {one.shown} on {one.evaluation_set}, {one.generator}: {one.score:.1f}" for one in single.values()]
        caption = f"{name}: score with 95 % intervals, calls and prompt tokens by N. {'; '.join(sentences)}."
        section.pictures.append(picture(
            folder, f"topn_{slug(name)}", lambda width, series=series, single=single: figures.top_n_curves(series, single, width), caption, caption,
        ))
    if not section.pictures:
        section.missing = "no results of top_inference.py; run scripts/11_top_n.sh."
    return section


def efficiency(systems: Sequence[System], folder: Path) -> Section:
    text = "Cost per answer. Speed is the number of questions divided by the run's seconds, without loading the models."
    section = Section("efficiency", "Efficiency", text)
    for name, members in by_evaluation_set(systems).items():
        sentences = [
            f"{one.name}: {one.said('calls', 1)}, {one.said('prompt_tokens')}"
            for one in members if one.selector in BY_LLM
        ]
        alt = "Bars: " + "; ".join(f"{one.name} {one.said('calls', 1)}, {one.speed:.2f} questions per "
                                   "second" for one in members)
        caption = f"{name}: calls and tokens are means per question. {'; '.join(sentences)}{'.' if sentences else ''}"
        section.pictures.append(picture(
            folder, f"efficiency_{slug(name)}", lambda width, shown=members: figures.cost_bars(shown, width), alt, caption,
        ))
    return section

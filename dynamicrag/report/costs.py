"""The sections about cost: top-N inference against one window, and what an answer of each system takes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dynamicrag.report import figures
from dynamicrag.report.drawing import picture
from dynamicrag.report.sections import Section, slug
from dynamicrag.report.systems import BY_LLM, System, by_evaluation_set


def top_n(systems: Sequence[System], folder: Path) -> Section:
    """Runs of more documents against N: by windows, and any selector of that many; beside inference.py's single window."""
    text = "More documents than one window holds, chosen from window by window, against one window and other selectors."
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
        caption = f"{name}: score with 95 % intervals, calls and prompt tokens against N. {'; '.join(sentences)}."
        section.pictures.append(picture(
            folder, f"topn_{slug(name)}", lambda width, series=series, single=single: figures.top_n_curves(series, single, width), caption, caption,
        ))
    if not section.pictures:
        section.missing = "no results of top_inference.py; scripts/11_top_n.sh makes them."
    return section


def efficiency(systems: Sequence[System], folder: Path) -> Section:
    text = "What an answer costs. Speed is questions by the seconds in the run's manifest, which leave out loading the models."
    section = Section("efficiency", "Efficiency", text)
    for name, members in by_evaluation_set(list(systems)).items():
        sentences = [
            f"{one.name}: {one.said('calls', 1)}, {one.said('prompt_tokens')}"
            for one in members if one.selector in BY_LLM
        ]
        alt = "Bars: " + "; ".join(f"{one.name} {one.said('calls', 1)}, {one.speed:.2f} questions a second" for one in members)
        caption = f"{name}: calls and tokens are means a question. {'; '.join(sentences)}{'.' if sentences else ''}"
        section.pictures.append(picture(
            folder, f"efficiency_{slug(name)}", lambda width, shown=members: figures.cost_bars(shown, width), alt, caption,
        ))
    return section

"""Sections that compare systems: generators, rerankers, fixed and dynamic k, and chosen documents.

Captions state the findings.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from dynamicrag.report import figures
from dynamicrag.report.drawing import picture
from dynamicrag.report.sections import Section, Table, slug
from dynamicrag.report.systems import BY_LLM, System, by_evaluation_set, by_generator
from dynamicrag.rows.row import Row


def kind_of(row: Row) -> str:
    """Return the group of a question: its kind if rows have one, otherwise its data set."""
    return str(row.get("kind") or row.get("dataset") or "other")


def overlap(one: System, other: System) -> bool:
    return one.summary["low"] <= other.summary["high"] and other.summary["low"] <= one.summary["high"]


def findings(members: Sequence[System]) -> list[str]:
    """Compare dynamic selection with the best fixed number of documents: one sentence per generator of an evaluation set."""
    sentences = []
    for generator, own in by_generator(members).items():
        dynamic = next((system for system in own if system.selector == "dynamic"), None)
        fixed = max((system for system in own if system.fixed), key=lambda system: system.score, default=None)
        if dynamic and fixed:
            sentences.append(
                f"On {members[0].evaluation_set}, {generator} with dynamic selection scores {dynamic.score:.1f} from "
                f"{dynamic.documents:.2f} documents per question; its best fixed selection, {fixed.label}, scores "
                f"{fixed.score:.1f} from {fixed.documents:.2f}. The intervals "
                f"{'overlap' if overlap(dynamic, fixed) else 'do not overlap'}."
            )
    return sentences


def group_tables(systems: Sequence[System]) -> list[Table]:
    """Return tables of score and mean documents by data set and by question kind, for evaluation sets with several of them."""
    tables = []
    for name, members in by_evaluation_set(systems).items():
        for what, summaries in (("data set", [one.summary for one in members]), ("question kind", [one.kinds for one in members])):
            groups = sorted({group for summary in summaries if summary for group in summary["groups"]})
            if len(groups) < 2:
                continue
            sizes = {group: max(summary["groups"].get(group, {"n": 0})["n"] for summary in summaries if summary) for group in groups}
            cells = [[summary["groups"].get(group) for group in groups] for summary in summaries if summary]
            shown = [[f"{cell['score']:.1f} ({cell['documents']:.1f})" if cell else "" for cell in line] for line in cells]
            rows = [[system.name, *line] for system, line in zip((one for one in members if one.kinds or what == "data set"), shown, strict=True)]
            header = ["system", *(f"{group or 'other'} ({sizes[group]})" for group in groups)]
            tables.append(Table(f"{name} by {what}", header, rows,
                                "score, with mean documents in brackets; questions in the header"))
    return tables


def generators(systems: Sequence[System], folder: Path) -> Section:
    section = Section("generators", "Generators", "Each model with dynamic selection, on each data set.")
    cells_by_group: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    for name, members in by_evaluation_set([system for system in systems if system.selector == "dynamic"]).items():
        for system in members:
            for group, cell in system.summary["groups"].items():
                cells_by_group[name, group][system.name.replace(" · dynamic", "")] = cell
    if not cells_by_group:
        section.missing = "no results with dynamic selection; run scripts/09_infer.sh."
        return section
    sets, data_sets = Counter(name for name, _ in cells_by_group), Counter(group for _, group in cells_by_group)
    groups = {}  # a set with one data set gets its own name, a data set in several sets gets both names
    for (name, group), cells in cells_by_group.items():
        label = name if sets[name] == 1 else group or "other"
        groups[label if sets[name] == 1 or data_sets[group] == 1 else f"{label} of {name}"] = cells
    compared = [cells for cells in groups.values() if len(cells) > 1]
    apart = sum(max(cell["low"] for cell in cells.values()) > min(cell["high"] for cell in cells.values()) for cells in compared)
    best = Counter()
    for cells in compared:
        ranked = sorted(cells, key=lambda model: -cells[model]["score"])
        best[ranked[0]] += cells[ranked[0]]["score"] > cells[ranked[1]]["score"]
    caption = "Score by data set, with 95 % intervals."
    if compared:
        shares = " and ".join(f"{model} scores highest on {count}" for model, count in best.most_common() if count)
        shares = shares or "No model scores highest on any"
        caption += f" {shares} of {len(groups)}; "
        caption += f"two intervals do not overlap on {apart}." if apart else "the intervals overlap on all."
    groups = {f"{group}, n = {max(cell['n'] for cell in cells.values())}": cells for group, cells in groups.items()}
    bars = {group: ", ".join(f"{model} {cell['score']:.1f}" for model, cell in cells.items()) for group, cells in groups.items()}
    alt = "Grouped bars: " + "; ".join(f"{group}: {shown}" for group, shown in bars.items())
    section.pictures.append(picture(folder, "generators", lambda width: figures.generator_bars(groups, width), alt, caption))
    return section


def rerankers(systems: Sequence[System], folder: Path) -> Section:
    section = Section("rerankers", "Rerankers", "The same model answers from documents chosen by different selectors.")
    for name, members in by_evaluation_set(systems).items():
        compared = [system for own in by_generator(members).values() if len(own) > 1 for system in own]
        if not compared:
            continue
        sentences = [f"{name}: score by selector, with 95 % intervals."]
        for generator, own in by_generator(compared).items():
            choosing = [system for system in own if not system.knows]
            best = max(choosing or own, key=lambda system: system.score)
            sentences.append(f"With {generator}, {best.label} scores highest ({best.score:.1f})")
            if (dynamic := next((system for system in own if system.selector == "dynamic"), None)) and len(choosing) > 1:
                within = sum(overlap(dynamic, other) for other in choosing if other is not dynamic)
                sentences[-1] += f"; the interval of dynamic overlaps {within} of the {len(choosing) - 1} others"
            sentences[-1] += "."
        alt = "Bars: " + "; ".join(f"{system.name} {system.score:.1f}" for system in compared)
        section.pictures.append(picture(
            folder, f"rerankers_{slug(name)}", lambda width, shown=compared: figures.selector_bars(shown, width), alt, " ".join(sentences),
        ))
    if not section.pictures:
        section.missing = ("no model has results with several selectors; set SELECTORS in the settings file and run "
                           "scripts/09_infer.sh.")
    return section


def documents(systems: Sequence[System], folder: Path) -> Section:
    text = "No document, the first K, or all documents, compared with a number chosen per question."
    section = Section("k", "Fixed k and dynamic k", text)
    for name, members in by_evaluation_set(systems).items():
        shown = [system for own in by_generator(members).values() if sum(one.fixed for one in own) > 1
                 for system in own if system.fixed or system.selector == "dynamic"]
        if not shown:
            continue
        points = [
            f"{one.generator} dynamic: {one.score:.1f} at k = {one.documents:.2f}, {one.said('prompt_tokens')}"
            for one in shown if one.selector == "dynamic"
        ]
        caption = f"{name}: score with 95 % intervals, and prompt tokens, by k."
        if points:
            caption += f" {'; '.join(points)} (including the selection call, which reads all documents shown)."
        alt = "Curves: " + "; ".join(f"{one.name} k {one.documents:.2f}, score {one.score:.1f}" for one in shown)
        section.pictures.append(picture(folder, f"k_{slug(name)}", lambda width, shown=shown: figures.k_curves(shown, width), alt, caption))
    if not section.pictures:
        section.missing = ("no model has results with two fixed numbers of documents; set SELECTORS in the settings "
                           "file and run scripts/09_infer.sh.")
    return section


def chosen(systems: Sequence[System], folder: Path) -> Section:
    text = "Share of the questions of each kind, in percent, with k documents."
    section = Section("chosen", "Documents chosen", text)
    for name, members in by_evaluation_set([system for system in systems if system.selector == "dynamic"]).items():
        needed: dict[str, Counter] = defaultdict(Counter)
        groups: dict[str, dict[str, Counter]] = {}
        sentences = []
        for row in members[0].rows:
            if row["needed"] is not None:
                needed[kind_of(row)][row["needed"]] += 1
        means = {kind: sum(k * count for k, count in counts.items()) / counts.total() for kind, counts in needed.items()}
        kinds = sorted({kind_of(row) for row in members[0].rows}, key=lambda kind: (means.get(kind, 0), kind))
        if needed:
            groups["needed (gold documents)"] = {kind: needed[kind] for kind in kinds}
        for system in members:
            counted: dict[str, Counter] = defaultdict(Counter)
            answered = [row for row in system.rows if isinstance(row.get("response"), str)]
            for row in answered:
                counted[kind_of(row)][len(row.get("id_list", []))] += 1
            if not answered:
                continue
            groups[system.name] = {kind: counted[kind] for kind in kinds}
            k, most = sum(counted.values(), Counter()).most_common(1)[0]
            sentences.append(f"{system.name} chooses {k} for {100 * most / len(answered):.0f} % of the questions")
            if same := [len(row.get("id_list", [])) == row["needed"] for row in answered if row["needed"] is not None]:
                sentences[-1] += f", and as many as needed for {100 * sum(same) / len(same):.0f} %"
        if sentences:
            alt = "Shares by kind and k. " + "; ".join(sentences)
            caption = f"{name}: {'; '.join(sentences)}."
            section.pictures.append(picture(folder, f"chosen_{slug(name)}", lambda width, shown=groups: figures.k_heat(shown, width), alt, caption))
    section.tables = selection_tables(systems)
    if not section.pictures:
        section.missing = "no results with dynamic selection; run scripts/09_infer.sh."
    return section


def selection_tables(systems: Sequence[System]) -> list[Table]:
    """Return evaluate.py's selection metrics if gold documents are known: one line per rule and per model that selects."""
    columns = {"precision": 1, "recall": 1, "f1": 1, "exact": 1, "needed_k": 2, "chosen_k": 2}
    tables = []
    for name, members in by_evaluation_set(systems).items():
        rows: dict[str, list[str]] = {}
        for system in members:
            if means := system.summary.get("selection"):
                shown = ["" if means[key] is None else f"{means[key]:.{digits}f}" for key, digits in columns.items()]
                rows.setdefault(system.name if system.selector in BY_LLM else system.label, shown)
        if rows:
            header = ["chosen by", "precision", "recall", "F1", "exact", "needed k", "chosen k"]
            lines = [[chooser, *shown] for chooser, shown in rows.items()]
            note = "in percent; exact: exactly the needed documents"
            tables.append(Table(f"{name}: chosen against gold documents", header, lines, note))
    return tables

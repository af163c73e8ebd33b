"""Markdown tables of results, aligned for terminals: scores, selections and comparisons, with one line per system."""

from collections.abc import Callable
from pathlib import Path

from dynamicrag.evaluation.selections import UNANSWERED

Summaries = dict[str, dict]  # by system, as returned by answers.summarise()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def system_names(results_files: list[str]) -> list[str]:
    """Return the file names without suffix, or whole paths if two names are equal."""
    stems = [Path(path).stem for path in results_files]
    return stems if len(set(stems)) == len(stems) else results_files


def summary_tables(summaries: Summaries) -> str:
    """Return one line per system with score, interval, metric, documents, cost and rows left out, then a table by group."""
    columns: dict[str, Callable[[dict], str]] = {
        "n": lambda s: str(s["n"]),
        "score": lambda s: f"{s['score']:.1f}",
        "95 %": lambda s: f"{s['low']:.1f} to {s['high']:.1f}",
        "metric": lambda s: s["metric"],
        "documents": lambda s: f"{s['documents']:.2f}" if s.get("documents_known", s["n"]) else "",
        "None": lambda s: f"{100 * s['none_share']:.0f} %" if s.get("documents_known", s["n"]) else "",
        "unanswered": lambda s: str(s["unanswered"]),
        "calls": lambda s: cost_cell(s, "calls"),
        "prompt tokens": lambda s: cost_cell(s, "prompt_tokens", 0),
        "generated tokens": lambda s: cost_cell(s, "generated_tokens"),
    }
    for heading, key in (("no gold answer", "without_gold_answer"), ("repeated", "repeated")):
        if any(summary.get(key) for summary in summaries.values()):
            columns[f"left out: {heading}"] = lambda s, key=key: str(s.get(key, 0))
    if any("entity_support" in summary for summary in summaries.values()):
        columns["entities in chosen"] = lambda s: f"{_number(s['entity_support']['chosen'])} (of {s['entity_support']['responses']})"
        columns["in retrieved"] = lambda s: _number(s["entity_support"]["retrieved"])
    rows = [[name, *(show(summary) for show in columns.values())] for name, summary in summaries.items()]
    tables = [markdown_table(["system", *columns], rows)]
    groups = sorted({group for summary in summaries.values() for group in summary["groups"]})
    if len(groups) > 1:
        def group_cell(summary: dict, group: str) -> str:
            cell = summary["groups"].get(group)
            return f"{cell['score']:.1f} ({cell['documents']:.1f})" if cell else ""

        def group_heading(group: str) -> str:
            metrics = {summary["groups"][group].get("metrics", "") for summary in summaries.values() if group in summary["groups"]} - {""}
            return f"{group} ({', '.join(sorted(metrics))})" if metrics else group

        rows = [[name, *(group_cell(summary, group) for group in groups)] for name, summary in summaries.items()]
        tables.append("Score, and mean documents used in brackets:\n\n" + markdown_table(["system", *map(group_heading, groups)], rows))
    return "\n\n".join(tables)


def cost_cell(summary: dict, key: str, digits: int = 1) -> str:
    """Format a mean cost per question, with the number of questions if it is not known for all; "" if it is not known."""
    value, known = summary.get(key), summary.get(f"{key}_known", summary["n"])
    return _number(value, digits) + (f" (of {known})" if value is not None and known < summary["n"] else "")


def selection_tables(summaries: Summaries) -> str:
    """Return one line per system, then the chosen k by needed k. Returns "" if gold documents are not known."""
    known = {name: summary["selection"] for name, summary in summaries.items() if "selection" in summary}
    if not known:
        return ""
    lines = [
        [
            name, str(selection["n"]), str(selection["needing_documents"]),
            *(_number(selection[key]) for key in ("precision", "recall", "f1", "recall_ceiling", "exact")),
            *(_number(selection[key], 2) for key in ("needed_k", "chosen_k")),
        ]
        for name, selection in known.items()
    ]
    header = ["system", "n", "need some", "precision", "recall", "F1", "recall of all retrieved", "exact", "needed k", "chosen k"]
    counts = {
        (name, needed): cell for name, selection in known.items() for needed, cell in selection["by_needed_k"].items()
    }
    chosen = sorted({k for cell in counts.values() for k in cell["counts"]} - {UNANSWERED}, key=int)
    if any(UNANSWERED in cell["counts"] for cell in counts.values()):
        chosen.append(UNANSWERED)
    by_k = [
        [name, needed, _number(cell["chosen_k"], 2), *(str(cell["counts"].get(k, 0)) for k in chosen)]
        for (name, needed), cell in counts.items()
    ]
    return (
        "Documents chosen against gold documents:\n\n" + markdown_table(header, lines)
        + "\n\nQuestions by documents needed (lines) and chosen (columns):\n\n"
        + markdown_table(["system", "needed", "mean chosen", *chosen], by_k)
    )


def comparison_table(first: str, compared: dict[str, dict[str, float]]) -> str:
    """Return one line per system that the first one is compared with. Files of earlier versions have no metric column."""
    with_metric = any("metric" in row for row in compared.values())
    lines = [
        [
            name, str(row["n"]), f"{row['difference']:+.1f}",
            f"{row['low']:+.1f} to {row['high']:+.1f}", f"{row['p']:.4f}",
            *([row.get("metric", "")] if with_metric else []),
        ]
        for name, row in compared.items()
    ]
    header = ["system", "n", "difference", "95 %", "p", *(["metric"] if with_metric else [])]
    return f"{first} minus each of the others:\n\n" + markdown_table(header, lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"

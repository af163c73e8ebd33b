"""Data of the case browser. Each document is stored once per evaluation set; positions are 1-based."""

from collections.abc import Mapping, Sequence

from dynamicrag.report.reading import answered_rows
from dynamicrag.report.systems import System, by_evaluation_set
from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.row import Row
from dynamicrag.rows.tasks import task_of_row

BINARY = ("em", "match", "accuracy")  # shown as right or wrong; other metrics are shown as numbers
RIGHT = 0.5  # minimum score of an answer that the filters treat as right
DOCUMENTS_SHOWN = 20  # further documents are shown only if they are chosen or gold


def case_sets(systems: Sequence[System], most: int, metric: str | None) -> list[dict]:
    """Return the cases of every evaluation set, at most `most` of each."""
    return [_case_set(name, members, most, metric) for name, members in by_evaluation_set(systems).items()]


def pick(scores: dict[str, float], most: int) -> list[str]:
    """Pick at most `most` ids, evenly spaced and in order; half of them right and half wrong if there are enough."""
    right = [row_id for row_id, score in scores.items() if score >= RIGHT]
    wrong = [row_id for row_id, score in scores.items() if score < RIGHT]
    of_right = min(len(right), max(most // 2, most - len(wrong)))
    picked = {*_spread(right, of_right), *_spread(wrong, min(len(wrong), most - of_right))}
    return [row_id for row_id in scores if row_id in picked]


def _spread(values: list[str], count: int) -> list[str]:
    return [values[number * len(values) // count] for number in range(count)]


def _case_set(name: str, systems: list[System], most: int, metric: str | None) -> dict:
    """Return one evaluation set: system names, documents, and cases that refer to both by number."""
    reference = max(range(len(systems)), key=lambda number: (systems[number].selector == "dynamic", number))
    # Elsewhere, unanswered questions come last
    in_order = min(systems, key=lambda system: system.summary["unanswered"]).rows
    scores = systems[reference].scores
    picked = pick({row["id"]: scores[row["id"]] for row in in_order if row["id"] in scores}, most)
    wanted = set(picked)
    answers = [{row["id"]: row for row in system.rows} for system in systems]
    numbers: dict[tuple[str, str], int] = {}
    cases = {}
    for row in answered_rows(systems[reference].path):
        if row["id"] in wanted:
            runs = [_run(rows.get(row["id"], {}), system) for rows, system in zip(answers, systems, strict=True)]
            cases[row["id"]] = _case(row, needed_documents(row, str(systems[reference].path)), runs, metric, numbers)
    return {
        "name": name, "systems": [system.name for system in systems], "reference": reference, "asked": len(scores),
        "documents": [list(document) for document in numbers], "cases": [cases[row_id] for row_id in picked],
    }


def _run(row: Mapping, system: System) -> list:
    """Return one system's answer, score, chosen positions, error and number of documents shown for a question."""
    answered = isinstance(row.get("response"), str)
    score = system.scores.get(row.get("id", ""))
    return [
        row["response"] if answered else None, None if score is None else round(score, 3), row.get("id_list", []) if answered else [],
        "" if answered else str(row.get("error", "not asked")), row.get("docs_shown", system.shown),
    ]


def _case(row: Row, gold: set[str] | None, runs: list[list], metric: str | None, numbers: dict[tuple[str, str], int]) -> dict:
    docs = row.get("docs", [])
    gold_at = [position for position, doc in enumerate(docs, start=1) if doc["id"] in (gold or ())]
    shown = {*range(1, min(len(docs), DOCUMENTS_SHOWN) + 1), *gold_at, *(position for run in runs for position in run[2])}
    texts = [(position, (docs[position - 1]["title"], docs[position - 1]["text"])) for position in sorted(shown) if position <= len(docs)]
    return {
        "id": row["id"], "question": row["question"], "kind": str(row.get("kind") or row.get("dataset") or ""),
        "answers": row.get("answers", []), "graded": (metric or task_of_row(row).metric) not in BINARY,
        "needed": None if gold is None else len(gold), "gold": gold_at, "lacking": sorted({*(gold or ())} - {doc["id"] for doc in docs}),
        "docs": [[position, numbers.setdefault(text, len(numbers))] for position, text in texts], "more": len(docs) - len(texts), "runs": runs,
    }

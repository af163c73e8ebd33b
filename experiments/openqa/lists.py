"""Write the list of documents of every question: the reranker's first N candidates, in its order, with calibrated labels.

No needed document is added: a question whose documents the search missed stays without them. A label is "true" if the
score is above the threshold that gives the best mean F1 of the selected documents on the dev questions.

Reads    INPUT_FILE                        reranked rows (reranker.py --sort) with gold_docs, part and dataset
Writes   OUTPUT_DIR/PART.jsonl             the rows of each part with at most N documents and their new labels
         OUTPUT_DIR/summary.json           the threshold, and per part and data set how many needed documents the lists hold

    .venv/bin/python experiments/openqa/lists.py --input_file runs/openqa/reranked.jsonl --output_dir runs/openqa/lists
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import orjson

from dynamicrag import stage
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.jsonio import write_json
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, log

THRESHOLDS = [number / 100 for number in range(2, 100, 2)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--input_file", required=True, help="reranked rows")
    parser.add_argument("--output_dir", required=True, help="folder of the lists")
    parser.add_argument("--n_docs", type=int, default=6, help="documents in a list")
    return parser.parse_args(argv)


def set_f1(chosen: Collection[str], needed: Collection[str]) -> float:
    """Return F1 of the chosen documents; 1 if none is chosen and none is needed."""
    if not chosen and not needed:
        return 1.0
    return 2 * len(set(chosen) & set(needed)) / (len(set(chosen)) + len(set(needed)))


def labelled(row: Row, threshold: float) -> Row:
    """Return the row with the labels of a threshold."""
    docs = [{**doc, "rerank_label": "true" if doc["rerank_score"] > threshold else "false"} for doc in row["docs"]]
    return {**row, "docs": docs}


def selection_f1(rows: Sequence[Row], threshold: float) -> float:
    """Return the mean F1 of the documents whose score is above the threshold, in the lists of the rows."""
    return statistics.fmean(set_f1([doc["id"] for doc in row["docs"] if doc["rerank_score"] > threshold], row["gold_docs"]) for row in rows)


def held(rows: Sequence[Row]) -> dict[str, float]:
    """Return how many documents the questions need, how many of these the lists hold, and how many are first."""
    needing = [row for row in rows if row["gold_docs"]]
    ids = [[doc["id"] for doc in row["docs"]] for row in needing]
    return {
        "questions": len(rows),
        "needed": statistics.fmean(len(row["gold_docs"]) for row in rows),
        "all needed in list": statistics.fmean(set(row["gold_docs"]) <= set(shown) for row, shown in zip(needing, ids, strict=True)) if needing else 1.0,
        "first is needed": statistics.fmean(bool(shown) and shown[0] in row["gold_docs"] for row, shown in zip(needing, ids, strict=True)) if needing else 0.0,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(args.input_file, ("docs", "gold_docs")):
        parts[row["part"]].append({**row, "docs": row["docs"][: args.n_docs]})
    if not parts.get("dev"):
        raise UserError(f"{args.input_file}: has no row of the part dev; make it with experiments/openqa.sh")
    by_threshold = {threshold: selection_f1(parts["dev"], threshold) for threshold in THRESHOLDS}
    threshold = max(by_threshold, key=lambda value: (by_threshold[value], -value))
    summary: dict = {"threshold": threshold, "dev selection F1": by_threshold[threshold], "at 0.5": by_threshold[0.5], "parts": {}}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_json(folder / f"{part}.jsonl", (labelled(row, threshold) for row in rows))
        by_set: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_set[row["dataset"]].append(row)
        summary["parts"][part] = {"all": held(rows), **{name: held(of_set) for name, of_set in sorted(by_set.items())}}
        log.info("%s: %d lists; all needed documents are in %.0f %% of them", part, len(rows), 100 * summary["parts"][part]["all"]["all needed in list"])
    log.info("threshold %.2f: selection F1 %.3f on dev (%.3f at 0.5)", threshold, by_threshold[threshold], by_threshold[0.5])
    with atomic_writer(folder / "summary.json") as file:
        file.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    stage.run(main)

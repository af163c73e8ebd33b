"""Score result files against their gold answers, with 95 % bootstrap intervals, and report costs.

Without --metric, every row is scored with the metric of its data set (dynamicrag/rows/tasks.py). Keys that are missing
from a result row (question, answers, data set, gold documents, group) come from the row of --eval_file with the same
id, so that results may consist of ids and responses only. Rows that could not be answered (the run's remain file) and
rows of --eval_file that are missing from the results count as wrong. If a question has several rows, the first one
counts. Repeated rows and rows without a gold answer are left out and counted in log and table. Several result files
give one table, with one row each. If the needed documents are known (gold_docs, or DPR's positive_ctxs), a second table
scores the selections. --entity_support adds the share of an answer's named entities that occur in its documents.
--compare compares the first file with each of the others by question: difference, interval and p, by paired bootstrap.

Reads    results/llama3_8b_nq.json                       rows with answers and response, and the remain file next to it
Writes   results/llama3_8b_nq.json.metrics.json          per file: score, interval, n, documents, calls, tokens, selection
         standard output                                 the tables in Markdown

    python evaluate.py --results_file results/llama3_8b_nq.json --metric match
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import orjson

from dynamicrag import stage
from dynamicrag.evaluation.answers import summarise
from dynamicrag.evaluation.grounding import with_entity_support
from dynamicrag.evaluation.metrics import METRIC_NAMES, paired_bootstrap
from dynamicrag.evaluation.results import read_asked, result_rows
from dynamicrag.evaluation.tables import comparison_table, selection_tables, summary_tables, system_names
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.output_checks import refuse_overlap
from dynamicrag.rows.row import Row
from dynamicrag.rows.tracking import track
from dynamicrag.stage import UserError, log


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--results_file", nargs="+", default=["results/llama3_8b_nq.json"],
                       help="answered rows of one or more runs")
    files.add_argument("--remain_file", help="rows without an answer (default: the file that the run's manifest names)")
    files.add_argument("--eval_file", help="all questions, with keys that the results lack; missing questions count "
                                           "as wrong")
    files.add_argument("--output_file", help="metrics as JSON (default: <results_file>.metrics.json)")
    files.add_argument("--table_file", help="also write the Markdown table here")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--metric", choices=METRIC_NAMES, help="metric of every row (default: that of each data set)")
    scoring.add_argument("--entity_support",
                         action="store_true", help="search the documents for the answers' named entities")
    scoring.add_argument("--compare", action="store_true", help="compare the first results file with each of the others")
    scoring.add_argument("--group_by", default="dataset", help="key of the rows by which scores are grouped")
    scoring.add_argument("--dataset", help="data set of every row; overrides the rows")
    stage.add_seed_flag(parser)
    return parser.parse_args(argv)


def compare(scores: dict[str, dict[str, float]], seed: int) -> dict[str, dict]:
    """Return the first system minus each other one, 0 to 100, with 95 % interval and p, over the same questions.

    Raises UserError if the systems have different questions: without --eval_file a missing question has no score.
    """
    (first, own), *others = scores.items()
    compared = {}
    for name, theirs in others:
        if missing := sorted(own.keys() ^ theirs.keys()):
            raise UserError(f"{first} and {name}: {len(missing)} questions occur in only one of them, such as "
                            f"{missing[0]}; give --eval_file")
        comparison = paired_bootstrap([own[row_id] for row_id in own], [theirs[row_id] for row_id in own], seed)
        compared[name] = {"n": len(own), **{key: value * (1 if key == "p" else 100) for key, value in comparison._asdict().items()}}
    return compared


def with_progress(rows: Iterable[Row], results_file: str, asked: Mapping | None, name: str) -> Iterable[Row]:
    """Yield the rows, with a progress bar. The total comes from the evaluation file or the run's manifest."""
    from tqdm import tqdm

    counts = (read_manifest(results_file) or {}).get("counts", {})
    return tqdm(rows, desc=name, unit=" rows", total=len(asked) if asked is not None else counts.get("rows"))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.remain_file and len(args.results_file) > 1:
        raise UserError("--remain_file: applies to a single results file; omit it, because each manifest names its "
                        "remain file")
    if args.compare and len(args.results_file) < 2:
        raise UserError("--compare: needs at least two results files; give more as --results_file")
    output = args.output_file or f"{args.results_file[0]}.metrics.json"
    outputs = [*filter(None, (output, args.table_file))]
    refuse_overlap(outputs, filter(None, (*args.results_file, args.remain_file, args.eval_file)))
    for path in outputs:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    asked = read_asked(args.eval_file, args.group_by, args.dataset) if args.eval_file else None
    summaries, scores = {}, {}
    for name, results_file in zip(system_names(args.results_file), args.results_file, strict=True):
        repeated: Counter[str] = Counter()
        rows = result_rows(results_file, args.remain_file, args.eval_file, args.dataset, asked, repeated)
        if args.entity_support:
            rows = with_entity_support(rows, results_file)
        rows = with_progress(rows, results_file, asked, name)
        summaries[name], scores[name] = summarise(rows, args.metric, args.group_by, args.seed, results_file, repeated, keep_scores=args.compare)
    compared = compare(scores, args.seed) if args.compare else {}
    for name, row in compared.items():
        row["metric"] = "+".join(sorted({summaries[system]["metric"] for system in (next(iter(summaries)), name)}))
    tables = [summary_tables(summaries), selection_tables(summaries)]
    if compared:
        tables.append(comparison_table(next(iter(summaries)), compared))
    table = "\n\n".join(filter(None, tables))
    metrics = {"arguments": vars(args), "results": summaries, "compared": compared}
    with atomic_writer(output) as file:
        file.write(orjson.dumps(metrics, option=orjson.OPT_INDENT_2))
    if args.table_file:
        with atomic_writer(args.table_file) as file:
            file.write(f"{table}\n".encode())
    track("evaluate", output, {"results": summaries, "compared": compared}, vars(args))
    print(table)
    log.info("metrics are in %s%s", output, f", the table in {args.table_file}" if args.table_file else "")


if __name__ == "__main__":
    stage.run(main)

"""Score result files against their gold answers, with 95 % bootstrap intervals, and what the answers cost.

Without --metric every row is scored by its data set's own metric (dynamicrag/tasks.py). Rows that could not be
answered (the remain file of the run) and rows of --eval_file that are missing from the results count as wrong. Several
result files make one table, a row each. --compare says how the first of them differs from each of the others, question by
question: the difference, its interval and p, by paired bootstrap.

Reads    results/llama3_8b_nq.json                       rows with answers and response, and the remain file beside it
Writes   results/llama3_8b_nq.json.metrics.json          per file: score, interval, n, documents, calls, tokens
         standard output                                 the table, in Markdown

    python evaluate.py --results_file results/llama3_8b_nq.json --metric match
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson

from dynamicrag import stage
from dynamicrag.answering import unanswered
from dynamicrag.manifest import read_manifest
from dynamicrag.metrics import METRIC_NAMES, bootstrap_interval, paired_bootstrap, score_row
from dynamicrag.records import Row, read_rows
from dynamicrag.stage import UserError, log
from dynamicrag.tables import markdown_table, system_names
from dynamicrag.tasks import task_of


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--results_file", nargs="+", default=["results/llama3_8b_nq.json"], help="answered rows, of one or more runs")
    files.add_argument("--remain_file", help="rows without an answer (default: the one the run's manifest names)")
    files.add_argument("--eval_file", help="the questions asked; those missing from the results count as wrong")
    files.add_argument("--output_file", help="metrics as JSON (default: <results_file>.metrics.json)")
    files.add_argument("--table_file", help="also write the Markdown table here")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--metric", choices=METRIC_NAMES, help="metric of every row (default: each data set's own)")
    scoring.add_argument("--compare", action="store_true", help="compare the first results file with each of the others")
    scoring.add_argument("--group_by", default="dataset", help="key of the rows by which scores are broken down")
    scoring.add_argument("--dataset", help="data set of every row, over what the rows say")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def summarise(rows: Iterable[Row], metric: str | None, group_by: str, seed: int) -> tuple[dict, dict[str, float]]:
    """Scores on 0 to 100, and cost a question; and the score of each question in [0, 1], by its id.

    Rows without `response` are wrong, with no documents and no cost; rows without any gold answer are left out and
    counted.
    """
    scores: dict[str, float] = {}
    by_group: dict[str, list[float]] = defaultdict(list)
    documents_by_group: dict[str, list[int]] = defaultdict(list)
    documents: list[int] = []
    usage: dict[str, list[int]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    metrics = set()
    for row in rows:
        row_metric = metric or task_of(row.get("dataset")).metric
        answered = isinstance(row.get("response"), str)
        score = score_row(row_metric, row["response"] if answered else "", row)
        if score is None:
            seen["without_gold_answer"] += 1
            continue
        metrics.add(row_metric)
        scores[row["id"]] = score
        by_group[str(row.get(group_by, ""))].append(score)
        seen["unanswered"] += not answered
        if answered:
            chosen = len(row.get("id_list", ()))
            documents.append(chosen)
            documents_by_group[str(row.get(group_by, ""))].append(chosen)
            seen["none"] += not chosen
            for key, value in row.get("usage", {}).items():
                usage[key].append(value)
    if not scores:
        raise UserError("no row has a gold answer to score against")

    def cell(values: list[float]) -> dict:
        low, high = bootstrap_interval(values, seed)
        return {"n": len(values), "score": 100 * statistics.fmean(values), "low": 100 * low, "high": 100 * high}

    summary = {
        "metric": "+".join(sorted(metrics)),
        **cell(list(scores.values())),
        "unanswered": seen["unanswered"],
        "without_gold_answer": seen["without_gold_answer"],
        "documents": statistics.fmean(documents) if documents else 0.0,
        "none_share": seen["none"] / len(documents) if documents else 0.0,
        **{key: statistics.fmean(values) for key, values in usage.items()},
        "groups": {
            group: {**cell(values), "documents": statistics.fmean(documents_by_group[group] or [0])}
            for group, values in sorted(by_group.items())
        },
    }
    return summary, scores


def compare(scores: dict[str, dict[str, float]], seed: int) -> dict[str, dict[str, float]]:
    """The first system less each other one, on 0 to 100, with its 95 % interval and p, over the same questions.

    Raises UserError for systems that were not asked the same: without --eval_file a missing question has no score.
    """
    (first, own), *others = scores.items()
    compared = {}
    for name, theirs in others:
        if missing := sorted(own.keys() ^ theirs.keys()):
            raise UserError(f"{first} and {name} have {len(missing)} questions that the other has not, {missing[0]} the first; give --eval_file")
        found = paired_bootstrap([own[row_id] for row_id in own], [theirs[row_id] for row_id in own], seed)
        compared[name] = {"n": len(own), **{key: value * (1 if key == "p" else 100) for key, value in found._asdict().items()}}
    return compared


def comparison_table(first: str, compared: dict[str, dict[str, float]]) -> str:
    """One line a system that the first is compared with."""
    lines = [
        [name, str(found["n"]), f"{found['difference']:+.1f}", f"{found['low']:+.1f} to {found['high']:+.1f}", f"{found['p']:.4f}"]
        for name, found in compared.items()
    ]
    return f"{first} less each of the others:\n\n" + markdown_table(["system", "n", "difference", "95 %", "p"], lines)


def summary_tables(summaries: dict[str, dict]) -> str:
    """One line a system: score with interval, documents, cost; then score and documents by group."""
    columns: dict[str, Callable[[dict], str]] = {
        "n": lambda s: str(s["n"]),
        "score": lambda s: f"{s['score']:.1f}",
        "95 %": lambda s: f"{s['low']:.1f} to {s['high']:.1f}",
        "documents": lambda s: f"{s['documents']:.2f}",
        "None": lambda s: f"{100 * s['none_share']:.0f} %",
        "unanswered": lambda s: str(s["unanswered"]),
        "calls": lambda s: f"{s.get('calls', 0):.1f}",
        "prompt tokens": lambda s: f"{s.get('prompt_tokens', 0):.0f}",
        "generated tokens": lambda s: f"{s.get('generated_tokens', 0):.1f}",
    }
    rows = [[name, *(show(summary) for show in columns.values())] for name, summary in summaries.items()]
    tables = [markdown_table(["system", *columns], rows)]
    groups = sorted({group for summary in summaries.values() for group in summary["groups"]})
    if len(groups) > 1:
        def group_cell(summary: dict, group: str) -> str:
            found = summary["groups"].get(group)
            return f"{found['score']:.1f} ({found['documents']:.1f})" if found else ""

        rows = [[name, *(group_cell(summary, group) for group in groups)] for name, summary in summaries.items()]
        tables.append("Score, and mean documents used in brackets:\n\n" + markdown_table(["system", *groups], rows))
    return "\n\n".join(tables)


def result_rows(results_file: str, remain_file: str | None, eval_file: str | None, dataset: str | None) -> Iterable[Row]:
    """Answered rows, then those of the remain file (a row in both is taken once), then what else was asked.

    Raises UserError for a row that is not among those asked: results of another file would look like missing answers.
    """
    seen = set()
    asked = {row["id"] for row in read_rows(eval_file)} if eval_file else None
    manifest = read_manifest(results_file)
    if remain_file is None and manifest and len(manifest["outputs"]) > 1:
        named = Path(manifest["outputs"][1])
        remain_file = str(named if named.exists() else Path(results_file).with_name(named.name))
    if remain_file is None and eval_file is None:
        log.warning("%s: no manifest names its remain file and no --eval_file was given: questions that got no answer are "
                    "not counted", results_file)
    for path in filter(None, [results_file, remain_file]):
        if _holds_no_row(Path(path)) and (path != results_file or manifest):  # of a run all or none of whose rows failed
            continue
        for row in read_rows(path, dataset=dataset):
            if asked is not None and row["id"] not in asked:
                raise UserError(f"{path}: row {row['id']} is not in {eval_file}; these are not the answers to its questions")
            if row["id"] not in seen:
                seen.add(row["id"])
                yield row
    if asked is not None and len(seen) < len(asked):
        log.warning("%s: %d of %d questions are missing; they count as wrong", results_file, len(asked) - len(seen), len(asked))
        for row in read_rows(eval_file, dataset=dataset):
            if row["id"] not in seen:
                yield unanswered(row)


def _holds_no_row(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 16 and path.read_bytes().strip() in (b"[]", b"")


def main(argv=None):
    args = parse_args(argv)
    if args.remain_file and len(args.results_file) > 1:
        raise UserError("--remain_file belongs to one results file; of several, each one's manifest names its own")
    if args.compare and len(args.results_file) < 2:
        raise UserError("--compare needs two results files or more")
    summaries, scores = {}, {}
    for name, results_file in zip(system_names(args.results_file), args.results_file, strict=True):
        rows = result_rows(results_file, args.remain_file, args.eval_file, args.dataset)
        summaries[name], scores[name] = summarise(rows, args.metric, args.group_by, args.seed)
    compared = compare(scores, args.seed) if args.compare else {}
    output = Path(args.output_file or f"{args.results_file[0]}.metrics.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(orjson.dumps({"arguments": vars(args), "results": summaries, "compared": compared}, option=orjson.OPT_INDENT_2))
    table = summary_tables(summaries)
    if compared:
        table += "\n\n" + comparison_table(next(iter(summaries)), compared)
    if args.table_file:
        Path(args.table_file).write_text(table + "\n", encoding="utf-8")
    print(table)
    log.info("metrics in %s%s", output, f", table in {args.table_file}" if args.table_file else "")


if __name__ == "__main__":
    stage.run(main)

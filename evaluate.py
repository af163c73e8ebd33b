"""Score result files against their gold answers, with 95 % bootstrap intervals, and what the answers cost.

Without --metric every row is scored by its data set's own metric (dynamicrag/tasks.py). What a row of results does not say
(question, answers, data set, gold documents, group) is taken from the row of --eval_file with its id: results may be ids
and responses alone. Rows that could not be answered (the remain file of the run) and rows of --eval_file that are missing
from the results count as wrong; of rows that answer one question the first counts. Rows left out, of a question that came
before or without a gold answer, are counted in log and table. Several result files make one table, a row each. Where the rows say which
documents are needed (gold_docs, or DPR's positive_ctxs), another table scores those chosen. --entity_support adds how many
of an answer's named entities are in the documents it was given. --compare says how the first file differs from each of
the others, question by question: the difference, its interval and p, by paired bootstrap.

Reads    results/llama3_8b_nq.json                       rows with answers and response, and the remain file beside it
Writes   results/llama3_8b_nq.json.metrics.json          per file: score, interval, n, documents, calls, tokens, selection
         standard output                                 the tables, in Markdown

    python evaluate.py --results_file results/llama3_8b_nq.json --metric match
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import orjson

from dynamicrag import stage
from dynamicrag.answering import fail_unanswered
from dynamicrag.atomic import atomic_writer
from dynamicrag.completion import CLOSES, OPENS, after_reasoning
from dynamicrag.gold import needed_documents
from dynamicrag.grounding import with_entity_support
from dynamicrag.manifest import read_manifest
from dynamicrag.metrics import METRIC_NAMES, paired_bootstrap
from dynamicrag.output import refuse_overlap
from dynamicrag.records import Row, read_rows
from dynamicrag.result_tables import comparison_table, selection_tables, summary_tables
from dynamicrag.scoring import MISSING, summarise
from dynamicrag.stage import UserError, log
from dynamicrag.tables import system_names


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--results_file", nargs="+", default=["results/llama3_8b_nq.json"], help="answered rows, of one or more runs")
    files.add_argument("--remain_file", help="rows without an answer (default: the one the run's manifest names)")
    files.add_argument("--eval_file", help="the questions asked, with what the results do not say; those missing count as wrong")
    files.add_argument("--output_file", help="metrics as JSON (default: <results_file>.metrics.json)")
    files.add_argument("--table_file", help="also write the Markdown table here")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--metric", choices=METRIC_NAMES, help="metric of every row (default: each data set's own)")
    scoring.add_argument("--entity_support", action="store_true", help="look for the answers' named entities in the documents")
    scoring.add_argument("--compare", action="store_true", help="compare the first results file with each of the others")
    scoring.add_argument("--group_by", default="dataset", help="key of the rows by which scores are broken down")
    scoring.add_argument("--dataset", help="data set of every row, over what the rows say")
    stage.add_seed_flag(parser)
    return parser.parse_args(argv)


def compare(scores: dict[str, dict[str, float]], seed: int) -> dict[str, dict[str, float]]:
    """The first system minus each other one, on 0 to 100, with its 95 % interval and p, over the same questions.

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


def result_rows(
    results_file: str, remain_file: str | None, eval_file: str | None, dataset: str | None,
    asked: Mapping[str, Row] | None = None, repeated: Counter[str] | None = None,
) -> Iterable[Row]:
    """Answered rows, then those of the remain file, then what else was asked, each question once: its first row counts.

    `asked` is what read_asked() gives of eval_file, if it was read already. Rows of a question that came before are counted
    in `repeated`, by results_file. Of a response with reasoning, what follows the reasoning is scored. Raises UserError for a row
    that is not among those asked, by id or by question: results of another file would look like missing or wrong answers;
    and for a file none of whose rows has a response.
    """
    if asked is None and eval_file:
        asked = read_asked(eval_file, "dataset", dataset)
    manifest = read_manifest(results_file)
    if remain_file is None and manifest and len(manifest["outputs"]) > 1:
        named = Path(manifest["outputs"][1])
        remain_file = str(named if named.exists() else Path(results_file).with_name(named.name))
    if remain_file is None and eval_file is None:
        log.warning("%s: no manifest names its remain file and no --eval_file was given: questions that got no answer are "
                    "not counted", results_file)
    repeated = Counter() if repeated is None else repeated
    seen, first_repeat = set(), None
    reasoned, responded, without_response = 0, False, None
    for path in filter(None, [results_file, remain_file]):
        if _holds_no_row(Path(path)) and (path != results_file or manifest):  # of a run all or none of whose rows failed
            continue
        for row in read_rows(path, dataset=dataset, unique=False, asked=asked):
            if asked is not None and row["id"] not in asked:
                raise UserError(f"{path}: row {row['id']} is not in {eval_file}; these are not the answers to its questions")
            if asked is not None and _plain(row["question"]) != _plain(asked[row["id"]]["question"]):
                raise UserError(f"{path}: row {row['id']} answers another question than that of {eval_file}; several data sets call their "
                                "rows so: give the evaluation file of this one")
            responded = responded or (path == results_file and "response" in row)
            if "response" not in row and "error" not in row:
                without_response = without_response or row
            elif isinstance(row.get("response"), str) and (OPENS.search(row["response"]) or CLOSES.search(row["response"])):
                reasoned += 1
                row = _without_reasoning(row)
            if row["id"] in seen:
                repeated[results_file] += 1
                first_repeat = first_repeat or f"{row['id']} in {path}"
            else:
                seen.add(row["id"])
                yield row
    if without_response:
        told = f"of row {without_response['id']}: {', '.join(sorted(without_response))}"
        if not responded:
            raise UserError(f"{results_file}: no row has a 'response' (the keys {told}); call the key of the answer so, and score "
                            "retrieved documents with evaluate_retrieval.py")
        log.warning("%s: some rows have neither 'response' nor 'error', and count as wrong (the keys %s)", results_file, told)
    if reasoned:
        log.warning("%s: %d responses hold a model's reasoning; what follows it is scored", results_file, reasoned)
    if first_repeat:
        log.warning("%s: answered again and not counted: %d rows, %s the first; the first row of a question counts",
                    results_file, repeated[results_file], first_repeat)
    if asked is not None and len(seen) < len(asked):
        log.warning("%s: %d of %d questions are missing; they count as wrong", results_file, len(asked) - len(seen), len(asked))
        for row in read_rows(eval_file, dataset=dataset):
            if row["id"] not in seen:
                yield fail_unanswered(row, MISSING)


def _plain(question: str) -> str:
    return " ".join(question.split()).casefold()


def _without_reasoning(row: Row) -> Row:
    """The row with what its response says after the reasoning; unanswered if that is nothing."""
    answer = after_reasoning(row["response"])
    if answer:
        return {**row, "response": answer}
    return {**fail_unanswered(row, "no answer in the response: it ends within its reasoning"), "usage": row.get("usage") or {}}


def read_asked(path: str, group_by: str, dataset: str | None) -> dict[str, Row]:
    """The questions asked by id, in the order of the file, each with what scores it: everything but its documents' texts.

    Raises UserError as read_rows does, for a question asked twice too.
    """
    asked = {}
    for row in read_rows(path, dataset=dataset):
        needed = needed_documents(row, path)
        kept = {key: row[key] for key in ("question", "retrieved_question", "dataset", "answers", "qa_pairs", "choices", group_by) if key in row}
        asked[row["id"]] = kept if needed is None else {**kept, "gold_docs": sorted(needed)}
    return asked


def with_progress(rows: Iterable[Row], results_file: str, asked: Mapping[str, Row] | None, name: str) -> Iterable[Row]:
    """The rows, under a progress bar; how many there will be is what was asked, or what the run's manifest counted."""
    from tqdm import tqdm

    counts = (read_manifest(results_file) or {}).get("counts", {})
    return tqdm(rows, desc=name, unit=" rows", total=len(asked) if asked is not None else counts.get("rows"))


def _holds_no_row(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 16 and path.read_bytes().strip() in (b"[]", b"")


def main(argv=None):
    args = parse_args(argv)
    if args.remain_file and len(args.results_file) > 1:
        raise UserError("--remain_file belongs to one results file; of several, each one's manifest names its own")
    if args.compare and len(args.results_file) < 2:
        raise UserError("--compare needs two results files or more")
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
        summaries[name], scores[name] = summarise(rows, args.metric, args.group_by, args.seed, results_file, repeated)
    compared = compare(scores, args.seed) if args.compare else {}
    for name, found in compared.items():
        found["metric"] = "+".join(sorted({summaries[system]["metric"] for system in (next(iter(summaries)), name)}))
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
    print(table)
    log.info("metrics in %s%s", output, f", table in {args.table_file}" if args.table_file else "")


if __name__ == "__main__":
    stage.run(main)

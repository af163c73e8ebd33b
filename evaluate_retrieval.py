"""Score the documents of result files against gold documents and against gold answers in their text.

If gold documents are known (--qrels, or else the rows' gold_docs or DPR's positive_ctxs): recall R@k, nDCG@10 and
MRR@10. If gold answers are known: answer@k, the share of questions with an answer in the text of one of the first k
documents, by DPR's rule (not meaningful if answers are labels). All values are from 0 to 100. Questions of --eval_file
that are missing from the results count as zero. Reranked rows give two lines: the retriever's order and the reranker's
order.

Reads    output/retrieval_data_rerank.jsonl                  rows with docs of any stage; or a TREC run and --eval_file
Writes   output/retrieval_data_rerank.jsonl.retrieval.json   per file and order: measures, interval, n, documents
         standard output                                     the table in Markdown

    python evaluate_retrieval.py --results_file output/retrieval_data_rerank.jsonl
"""

import argparse
import itertools
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from dynamicrag import stage
from dynamicrag.evaluation.means import Mean
from dynamicrag.evaluation.metrics import bootstrap_interval
from dynamicrag.evaluation.retrieval import SCORES, answer_rank, gold_measures, in_order
from dynamicrag.evaluation.tables import markdown_table, system_names
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.rows.gold import Question, Ranked, ranked_questions, read_questions
from dynamicrag.rows.output_checks import refuse_overlap
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc
from dynamicrag.rows.tracking import track
from dynamicrag.rows.trec import is_run, read_qrels, write_run
from dynamicrag.stage import UserError, log

ANSWER_CUTOFF = 20
# The first that is known is the main measure, which has an interval.
MAIN_MEASURES = {"nDCG@10": "d", f"answer@{ANSWER_CUTOFF}": "b"}  # with the type of its values
QUESTIONS_PER_CHUNK = 256  # number of questions whose documents are in memory


class Scored(NamedTuple):
    """One question: its measures in [0, 1] (none if no gold data is known) and its number of documents."""

    group: str
    measures: dict[str, float]
    documents: int


class Tally:
    """The measures of any number of questions, as means; of each question, only MAIN_MEASURES are kept (9 bytes)."""

    def __init__(self):
        self.count = self.documents = self.without_documents = 0
        self.means: dict[str, Mean] = {}
        self.main = {name: array(kind) for name, kind in MAIN_MEASURES.items()}

    def add(self, one: Scored) -> None:
        """Add one question."""
        self.count += 1
        self.documents += one.documents
        self.without_documents += not one.documents
        for name, value in one.measures.items():
            self.means.setdefault(name, Mean()).add(value)
            if (values := self.main.get(name)) is not None:
                values.append(value if values.typecode == "d" else int(value))

    def summary(self, seed: int) -> dict:
        """Return means from 0 to 100, each over the questions for which the measure is known, and the interval of the main measure."""
        gold, answers = map(len, self.main.values())
        name, values = next(named for named in self.main.items() if named[1])
        low, high = bootstrap_interval(values, seed)
        return {
            "n": self.count,
            "gold": gold,  # number of questions with gold documents, and with gold answers
            "answers": answers,
            "measures": {measure: 100 * (mean.value() or 0.0) for measure, mean in self.means.items()},
            "main": name, "low": 100 * low, "high": 100 * high,
            "documents": self.documents / self.count,
            "without_documents": self.without_documents,
        }


class Order:
    """The tallies of the questions by one order of their documents: of all with gold data, and by group."""

    def __init__(self):
        self.every, self.groups = Tally(), defaultdict(Tally)
        self.left_out = 0  # questions without gold data
        self.has_documents = False

    def add(self, scored: Iterable[Scored]) -> None:
        for one in scored:
            self.has_documents |= one.documents > 0
            self.left_out += not one.measures
            for tally in (self.every, self.groups[one.group]) if one.measures else ():
                tally.add(one)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    default = "output/retrieval_data_rerank.jsonl"
    files.add_argument("--results_file", nargs="+", default=[default],
                       help="one or more files of rows with docs, or TREC runs")
    files.add_argument("--eval_file", help="all questions, with gold documents and answers that the results lack")
    files.add_argument("--qrels", help="gold documents as TREC qrels; overrides the rows")
    files.add_argument("--output_file", help="measures as JSON (default: <results_file>.retrieval.json)")
    files.add_argument("--table_file", help="also write the Markdown table here")
    files.add_argument("--run_file", help="also write the documents as a TREC run, in reranked order if there is one")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--stage", choices=["auto", *SCORES], default="auto",
        help="order of the documents: by score or by rerank_score; auto gives both if every document has a "
             "rerank_score",
    )
    scoring.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20, 50], help="cutoffs of R@k and answer@k")
    scoring.add_argument("--group_by", default="dataset", help="key of the rows by which measures are grouped")
    scoring.add_argument("--dataset", help="data set of every row; overrides the rows")
    stage.add_seed_flag(parser)
    args = parser.parse_args(argv)
    if min(args.k) < 1:
        parser.error("--k must be at least 1")
    args.k = sorted(set(args.k))
    return args


def score_questions(ranked: list[tuple[Question, list[Doc]]], cutoffs: list[int]) -> list[Scored]:
    """Return the measures of each pair of a question and its documents, best first."""
    answer_cutoffs = sorted({*cutoffs, ANSWER_CUTOFF})
    with_gold = [([doc["id"] for doc in docs], question.gold) for question, docs in ranked if question.gold]
    by_gold = iter(gold_measures(with_gold, cutoffs))
    scored = []
    for question, docs in ranked:
        measures = next(by_gold) if question.gold else {}
        if question.answers:
            first = answer_rank(docs[: answer_cutoffs[-1]], question.answers)
            measures |= {f"answer@{k}": float(first <= k) for k in answer_cutoffs}
        scored.append(Scored(question.group, measures, len(docs)))
    return scored


def score_orders(path: str, questions: Iterator[Ranked], wanted: str, cutoffs: list[int]) -> dict[str, Order]:
    """Score every question by the `wanted` order of its documents. "auto" gives both orders, or one if a rerank_score is missing."""
    scored = {order: Order() for order in (SCORES if wanted == "auto" else [wanted])}
    while chunk := list(itertools.islice(questions, QUESTIONS_PER_CHUNK)):
        for order in list(scored):
            ranked: list[tuple[Question, list[Doc]]] = []
            unjudged: list[str] = []
            for row_id, question, docs in chunk:
                if (ordered := in_order(docs, order)) is None:
                    unjudged.append(row_id)
                else:
                    ranked.append((question, ordered))
            if not unjudged:
                scored[order].add(score_questions(ranked, cutoffs))
            elif wanted == "auto":
                del scored[order]
            else:
                raise UserError(f"{path}: row {unjudged[0]}: a document has no rerank_score; run reranker.py first, or "
                                "give --stage retrieval")
    if len(scored) > 1 and not scored["reranking"].has_documents:
        del scored["reranking"]  # there is no document at all
    return scored


def summarise_file(path: str, scored: Order, qrels_file: str | None, seed: int) -> dict:
    """Return the summary of all questions and by group. Questions without gold data are left out and counted."""
    if not scored.every.count:
        raise UserError(f"{path}: no question has gold documents, or gold answers to search for in texts; give --qrels "
                        "or --eval_file")
    summary = scored.every.summary(seed)
    if qrels_file and not summary["gold"]:
        raise UserError(f"{path}: no question has a relevant document in {qrels_file}; give the qrels of these "
                        "questions")
    if scored.left_out:
        log.warning("%s: %d rows have neither gold documents nor gold answers and are not counted", path, scored.left_out)
    groups = {group: tally.summary(seed) for group, tally in sorted(scored.groups.items())}
    return {**summary, "left_out": scored.left_out, "groups": groups}


def summary_tables(results: dict[str, dict[str, dict]], group_by: str) -> str:
    """Return one line per system and order, with the interval of the main measure, then the main measure by group."""
    lines = [([name, order], summary) for name, orders in results.items() for order, summary in orders.items()]
    measures = dict.fromkeys(measure for _, summary in lines for measure in summary["measures"])
    columns = ["n", "documents"]
    for count, of_answers in (("gold", False), ("answers", True)):
        block = [measure for measure in measures if measure.startswith("answer@") is of_answers]
        columns += [count, *block] if block else []
    if any(summary["left_out"] for _, summary in lines):
        columns.append("left_out")
    rows = [[*line, *(_cell(summary, column) for column in columns)] for line, summary in lines]
    tables = [markdown_table(["system", "order", *(column.replace("_", " ") for column in columns)], rows)]
    groups = sorted({group for _, summary in lines for group in summary["groups"]})
    if len(groups) > 1:
        none = {"measures": {}}  # for a group that only another file has
        cells = [[_cell(s["groups"].get(group, none), s["main"]) for group in groups] for _, s in lines]
        rows = [[*line, summary["main"], *shown] for (line, summary), shown in zip(lines, cells, strict=True)]
        tables.append(f"By {group_by}:\n\n" + markdown_table(["system", "order", "measure", *groups], rows))
    return "\n\n".join(tables)


def _cell(summary: dict, column: str) -> str:
    value = summary.get(column, summary["measures"].get(column, ""))
    shown = f"{value:.1f}" if isinstance(value, float) else str(value)
    return f"{shown} ({summary['low']:.1f} to {summary['high']:.1f})" if column == summary.get("main") else shown


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.run_file and len(args.results_file) > 1:
        raise UserError("--run_file: can hold the documents of one results file only; give one --results_file")
    if args.run_file and is_run(args.results_file[0]):
        raise UserError(f"{args.results_file[0]}: is already a TREC run; omit --run_file, which converts rows")
    output = args.output_file or f"{args.results_file[0]}.retrieval.json"
    outputs = [*filter(None, (output, args.table_file, args.run_file))]
    refuse_overlap(outputs, filter(None, (*args.results_file, args.eval_file, args.qrels)))
    for path in outputs:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    qrels = read_qrels(args.qrels) if args.qrels else None
    asked = read_questions(args.eval_file, args.group_by, qrels, args.dataset) if args.eval_file else None
    results = {}
    for name, path in zip(system_names(args.results_file), args.results_file, strict=True):
        questions = ranked_questions(path, args.group_by, qrels, args.dataset, asked, args.eval_file)
        orders = score_orders(path, questions, args.stage, args.k)
        results[name] = {order: summarise_file(path, scored, args.qrels, args.seed) for order, scored in orders.items()}
    table = summary_tables(results, args.group_by)
    with atomic_writer(output) as file:
        file.write(orjson.dumps({"arguments": vars(args), "results": results}, option=orjson.OPT_INDENT_2))
    if args.table_file:
        with atomic_writer(args.table_file) as file:
            file.write(f"{table}\n".encode())
    if args.run_file:
        [(name, orders)] = results.items()
        order = list(orders)[-1]
        rows = read_rows(args.results_file[0], STAGE_KEYS["evaluate_retrieval"].reads, args.dataset)
        write_run(args.run_file, rows, SCORES[order], "_".join([*name.split(), order]))
    track("evaluate_retrieval", output, {"results": results}, vars(args))
    print(table)
    log.info("measures are in %s%s", output, f", the table in {args.table_file}" if args.table_file else "")


if __name__ == "__main__":
    stage.run(main)

"""Score every retrieved document: rows with docs -> the same rows with rerank_score and rerank_label.

The scores are the expert that DynamicRAG clones. The model is monoT5 (Nogueira et al., 2020, arXiv 2003.06713), a
cross-encoder (if the checkpoint is a sequence classifier), or a causal model that answers yes or no, such as
Qwen3-Reranker. rerank_score is P(relevant) in [0, 1]; rerank_label is "true" above 0.5. The documents stay in the
retriever's order unless --sort is given. --run takes the scores from a TREC run of any other reranker.

Reads    output/retrieval_data.jsonl                     rows with docs
Writes   output/retrieval_data_rerank.jsonl              + rerank_score and rerank_label of each document

    python reranker.py --model_name_or_path models/reranker/monot5 --input_file output/retrieval_data.jsonl \\
        --output_file output/retrieval_data_rerank.jsonl --device cuda
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.models.batches import BATCH_TOKENS_HELP
from dynamicrag.models.device import DEVICES, DTYPES, device_flag, place
from dynamicrag.models.reranker import Tokens, document_text
from dynamicrag.rows.output import Output
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.rows.trec import Run

Judged = tuple[Row, Doc]  # row, document
NEEDS = STAGE_KEYS["reranker"].reads

# Documents are sorted by length across the questions of a chunk. A run continues after the last whole chunk.
QUESTIONS_PER_CHUNK = 64


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", default="output/retrieval_data.jsonl", help="rows with docs, JSON or JSONL")
    group.add_argument("--output_file", default="output/retrieval_data_rerank.jsonl", help="the same rows with scores")
    group.add_argument("--dataset", default=None, help="data set of every row; overrides the rows")
    group = parser.add_argument_group("documents")
    group.add_argument("--n_docs",
                       type=int, default=None, help="keep and score only the first n documents (default: all)")
    group.add_argument("--run", default=None,
                       help="TREC run with the scores of another reranker; missing documents score 0")
    group.add_argument("--logits", action="store_true", help="the scores of --run are log-odds, not probabilities")
    group.add_argument("--sort", action="store_true",
                       help="sort by rerank_score, best first; equal scores keep the retriever's order")
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", default="models/reranker/monot5", help="a folder or a hub name")
    group.add_argument("--max_length", type=int, default=512, help="maximum tokens of question and document")
    group.add_argument("--instruction", default=None,
                       help="search instruction for a causal reranker (default: as given by the checkpoint, or a "
                            "neutral one)")
    group.add_argument("--system_prompt", default=None,
                       help="system prompt for a causal reranker, as on its model card (default: a neutral one)")
    group.add_argument("--batch_tokens", type=int, default=None, help=BATCH_TOKENS_HELP)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 if the hardware supports it")
    group.add_argument("--device", type=device_flag, default="auto", help=DEVICES)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.logits and not args.run:
        parser.error("--logits describes the scores of --run; give both or neither")
    if args.n_docs is not None and args.n_docs < 1:
        parser.error("--n_docs must be at least 1")
    return args


def rerank(rows: list[Row], score: Callable[[list[Judged]], Iterable[float]], n_docs: int | None, sort: bool) -> list[Row]:
    """Return the rows with rerank_score and rerank_label on their first n_docs documents, all scored in one call."""
    shown = [row["docs"][:n_docs] for row in rows]
    scores = map(float, score([(row, doc) for row, docs in zip(rows, shown, strict=True) for doc in docs]))
    reranked = []
    for row, docs in zip(rows, shown, strict=True):
        judged: list[Doc] = []
        for doc, value in zip(docs, scores, strict=False):
            if not 0 <= value <= 1:
                raise stage.UserError(f"score {value} of row {row['id']!r} and document {doc['id']!r}: not a probability; try --dtype float32, "
                                      "or --logits for a --run of log-odds")
            judged.append({**doc, "rerank_score": value, "rerank_label": "true" if value > 0.5 else "false"})
        if sort:
            judged.sort(key=lambda doc: -doc.get("rerank_score", 0.0))
        reranked.append({**row, "docs": judged})
    return reranked


def scores_of_run(run: Run, logits: bool) -> Callable[[list[Judged]], list[float]]:
    """Return a function that gives another reranker's scores, 0 for a document without one."""

    def score(pairs: list[Judged]) -> list[float]:
        scores = {row["id"]: dict(run.ranking(row["id"])) for row, _ in pairs}
        run_scores = [scores[row["id"]].get(doc["id"]) for row, doc in pairs]
        return [0.0 if value is None else (1 + math.tanh(value / 2)) / 2 if logits else value for value in run_scores]

    return score


def by_model(args: argparse.Namespace) -> tuple[Callable, Callable]:
    """Return the two halves of scoring a chunk: prepare(rows) tokenises, work(prepared) returns the scored rows."""
    from tqdm import tqdm

    from dynamicrag.models.reranker import load_reranker

    model = load_reranker(args.model_name_or_path, args.device, args.dtype, args.max_length, args.instruction, args.system_prompt)
    stage.log.info("%s: %s", args.model_name_or_path, model.said())
    progress = tqdm(desc="judging", unit=" documents", unit_scale=True)

    def prepare(rows: list[Row]) -> tuple[list[Row], list[Tokens]]:
        return rows, model.tokenize([(row["question"], document_text(doc)) for row in rows for doc in row["docs"][: args.n_docs]])

    def work(prepared: tuple[list[Row], list[Tokens]]) -> list[Row]:
        rows, tokens = prepared
        return rerank(rows, lambda _: model.score_tokens(tokens, args.batch_tokens, progress.update), args.n_docs, args.sort)

    return prepare, work


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from dynamicrag.rows.records import count_rows, read_rows

    judge = args.run or args.model_name_or_path
    inputs = [args.input_file]
    if args.run or Path(judge).exists():
        inputs.append(judge)
    output = Output(vars(args), [args.output_file], inputs)
    if output.finished:
        return
    count = count_rows(args.input_file, NEEDS, skip_malformed=bool(output.reject), dataset=args.dataset)
    given = next((row["docs"] for row in read_rows(args.input_file, NEEDS, args.dataset, lambda _: None) if row["docs"]), [])
    if any("rerank_label" in doc for doc in given):
        stage.log.warning("%s: documents already have a rerank_label, like published training data; it is replaced",
                          args.input_file)
    if args.run:
        run = Run(args.run)
        ids = (row["id"] for row in read_rows(args.input_file, NEEDS, args.dataset, lambda _: None))
        run.check_questions(ids, args.input_file, "their documents score 0")
        score = scores_of_run(run, args.logits)
        prepare, work = None, lambda chunk: rerank(chunk, score, args.n_docs, args.sort)
    else:
        output.record(**place(args.device, args.dtype))
        prepare, work = by_model(args)
    rows = read_rows(args.input_file, NEEDS, args.dataset, output.reject)
    output.process(rows, QUESTIONS_PER_CHUNK, work, count, "reranking", prepare)
    judged = relevant = 0
    for row in output.written():
        judged += len(row["docs"])
        relevant += sum(doc.get("rerank_label") == "true" for doc in row["docs"])
    output.finish(documents=judged, relevant=relevant)


if __name__ == "__main__":
    stage.run(main)

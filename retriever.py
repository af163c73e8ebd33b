"""Retrieve documents: questions -> the same rows with `docs`, scored, best first.

Dense retrieval follows Contriever (Izacard et al., 2022, arXiv 2112.09118): the question is encoded like the passages,
after the prompt for questions given by the encoder's folder or --query_prompt. Inner products are compared exactly
(`--index flat`) or through a compressed index. `--index bm25` is a lexical search. `--run` takes the documents from
another system's TREC run. Several of these are fused by reciprocal rank (Cormack et al., 2009). If a row has
`retrieved_question`, the search uses it.

Reads    data/splits/split_0.json                        questions
         data/psgs_w100.tsv                              the corpus
         data/wikipedia_embeddings/*                     its embeddings: own shards or those of Contriever
Writes   output/retrieval_split_0.json                   + docs: id, title, text, score

    python retriever.py --model_name_or_path models/retriever --passages data/psgs_w100.tsv \\
        --passages_embeddings "data/wikipedia_embeddings/*" --query data/splits/split_0.json \\
        --output_dir output/retrieval_split_0.json --n_docs 50
"""

from __future__ import annotations

import argparse
import ctypes
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag import stage
from dynamicrag.files.locks import in_turn
from dynamicrag.models.batches import BATCH_TOKENS_HELP
from dynamicrag.models.device import DEVICES, DTYPES, device_flag, pick_device, place
from dynamicrag.models.encoder_settings import POOLINGS, refuse_other_settings
from dynamicrag.rows.output import Output
from dynamicrag.rows.row import Row
from dynamicrag.rows.trec import Run, fuse
from dynamicrag.search.index import CANDIDATES, NPROBE, faiss_can_read
from dynamicrag.search.questions import QuestionOptions, encode_questions, query_settings, search_text

if TYPE_CHECKING:
    import numpy as np

    from dynamicrag.search.passages import PassageStore

Question = tuple[int, Row]  # number of the row among the valid rows, which is that of its vector; row
# A search maps questions to scores (float32) and corpus positions (int64, -1: no document), both [questions, k].
Search = Callable[[list[Question]], tuple["np.ndarray", "np.ndarray"]]

M_ARENA_MAX = -8  # of mallopt(3)
# Questions per pass. On a GPU, rounding the vectors takes as long as comparing them with 1024 questions.
QUESTIONS_PER_PASS = {"cpu": 1024, "cuda": 4096}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--query", default="data/splits/split_0.json", help="questions, JSON or JSONL")
    group.add_argument("--passages", default="data/psgs_w100.tsv", help="corpus: TSV, JSONL or Parquet, or a folder")
    group.add_argument("--passages_embeddings", default="data/wikipedia_embeddings/*", help="shards of the corpus, as a quoted glob")
    group.add_argument("--passage_store", default=None, help="folder of the memory-mapped corpus (default: <passages>.store)")
    group.add_argument("--output_dir", "--output_file", default="output/retrieval_split_0.json", help="output file")
    group.add_argument("--dataset", default=None, help="data set of every row; overrides the rows")
    group = parser.add_argument_group("search")
    group.add_argument("--n_docs", type=int, default=50, help="documents per question")
    group.add_argument("--index", nargs="*", help="flat (exact), a faiss factory string (IVF1024,SQ8), or bm25 (default: flat)")
    group.add_argument("--run", nargs="*", default=[], help="TREC run files; fused with --index if both are given")
    group.add_argument("--index_path", default=None, help="file of the faiss index (default: next to the shards)")
    group.add_argument("--nprobe", type=int, default=NPROBE, help="clusters that an IVF index searches")
    group.add_argument("--candidates", type=int, default=CANDIDATES, help="candidates of a compressed index per requested document")
    group.add_argument("--corpus_shard", default="0/1", help="i/n: search only part i (from 0) of n; aggregate.py merges the results")
    group.add_argument("--questions_per_pass", type=int, help="questions per pass over the vectors (default: 1024; 4096 on a GPU)")
    group = parser.add_argument_group("encoder")
    group.add_argument("--model_name_or_path", default="models/retriever", help="encoder: a folder or a hub name")
    group.add_argument("--pooling", choices=POOLINGS, default=None, help="pooling of a plain folder, as in the embedding stage (default: mean)")
    group.add_argument("--normalize", action="store_true", help="scale vectors to length 1, as in the embedding stage")
    group.add_argument("--query_prompt", default=None, help="prefix of each question, such as E5's 'query: ' (default: as given by the folder)")
    group.add_argument("--max_length", type=int, default=None, help="maximum tokens of a question (default: as given by the folder, or 512)")
    group.add_argument("--batch_tokens", type=int, default=None, help=BATCH_TOKENS_HELP)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 if the hardware supports it")
    group.add_argument("--device", type=device_flag, default="auto", help=DEVICES)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    # Values, and flags that exclude each other
    args.index = (["flat"] if not args.run else []) if args.index is None else args.index
    part = re.fullmatch(r"(\d+)/(\d+)", args.corpus_shard)
    if not part or int(part[1]) >= int(part[2]):
        parser.error(f"--corpus_shard {args.corpus_shard}: expected i/n with i from 0 to n-1")
    if args.corpus_shard != "0/1" and (args.run or "bm25" in args.index):
        parser.error("--corpus_shard divides embeddings; omit --run, which has no parts, and --index bm25, because BM25 "
                     "weights words by the whole corpus")
    compressed = [index for index in args.index if index not in ("bm25", "flat")]
    if unknown := next((index for index in compressed if not faiss_can_read(index)), None):
        parser.error(f"--index {unknown}: expected flat, bm25, or a faiss factory string such as IVF1024,SQ8 or HNSW32")
    if (args.corpus_shard != "0/1" and len(args.index) > 1) or (args.index_path and len(compressed) > 1):
        parser.error("--corpus_shard and --index_path accept one index only; ranks within a part cannot be fused")
    if not args.index and not args.run:
        parser.error("--index or --run is required")
    counts = [args.n_docs, args.nprobe, args.candidates, *([] if args.questions_per_pass is None else [args.questions_per_pass])]
    if min(counts) < 1:
        parser.error("--n_docs, --questions_per_pass, --nprobe and --candidates must be at least 1")
    return args


def attach_docs(rows: list[Row], scores: np.ndarray, found: np.ndarray, store: PassageStore) -> list[Row]:
    """Give each row its documents, best first, in place of earlier ones.

    `scores` and `found` are [rows, k]; `found` holds positions in the store (-1: no document).
    """
    hits = found >= 0
    docs = iter(store.docs(found[hits].tolist()))
    return [
        {**row, "docs": [{**next(docs), "score": float(score)} for score in row_scores[row_hits]]}
        for row, row_scores, row_hits in zip(rows, scores, hits, strict=True)
    ]


def allocate_from_one_arena() -> None:
    """Limit glibc to one memory arena. Otherwise freed memory stays reserved per thread, 250 MB in every worker."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, 1)


def process_of_its_own() -> Executor:
    """Return an executor that encodes questions in a child process, so that all its memory is free before the search."""
    return ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL))


def dense_searches(
    args: argparse.Namespace, device: str, shard_paths: list[Path], store: PassageStore, output: Output, queries: str, count: int
) -> dict[str, Search]:
    """Return a search for every embedding index in --index.

    It first encodes all `count` questions and writes their vectors to the file `queries`, in the order of the rows.
    """
    import numpy as np

    from dynamicrag.search.index import open_index, search_corpus
    from dynamicrag.search.shards import check_shards, open_shards, part_of, shard_bounds

    # Check the shards against encoder and corpus, then encode the questions
    shards, options = open_shards(shard_paths), stage.options_from(args, QuestionOptions)
    with process_of_its_own() as encoding:
        output.record(**encoding.submit(place, device, args.dtype).result())
        settings = encoding.submit(query_settings, options).result()
        refuse_other_settings(shard_paths, args.model_name_or_path, settings)
        corpus = check_shards(shards, settings.width, store, args.model_name_or_path)
        output.begin()  # from here on, no other run can write this output or its vectors
        with in_turn(args.passages) if device == "cpu" else nullcontext():
            said = encoding.submit(encode_questions, options, queries, count).result()
            stage.log.info("%s, for questions: %s", args.model_name_or_path, said)
            encoding.shutdown()  # frees its memory before the other workers continue
    # This worker's part of the corpus
    part, parts = map(int, args.corpus_shard.split("/"))
    shards, corpus = part_of(shards, part, parts), corpus[slice(*shard_bounds(len(corpus), part, parts))]

    def search_by(factory: str) -> Search:
        index = open_index(
            shards, factory, args.index_path, device, args.seed, args.corpus_shard, args.nprobe, args.candidates
        )

        def search(questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
            vectors = np.load(queries, mmap_mode="r")[[number for number, _ in questions]]
            return search_corpus(index, shards, corpus, np.array(vectors), args.n_docs)

        return search

    return {factory: search_by(factory) for factory in args.index if factory != "bm25"}


def bm25_search(args: argparse.Namespace, store: PassageStore) -> Search:
    from dynamicrag.search.bm25 import open_bm25

    index = open_bm25(store)
    return lambda questions: index.search([search_text(row) for _, row in questions], args.n_docs)


def run_search(run: Run, args: argparse.Namespace, store: PassageStore) -> Search:
    """Return a search that gives the documents of another system's run. Questions that are not in the run get none."""
    import numpy as np

    def search(questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
        scores = np.zeros((len(questions), args.n_docs), dtype=np.float32)
        positions = np.full(scores.shape, -1, dtype=np.int64)
        for number, (_, row) in enumerate(questions):
            ranking = run.ranking(row["id"])[: args.n_docs]
            doc_positions = store.positions(doc_id for doc_id, _ in ranking)
            if (doc_positions < 0).any():
                raise stage.UserError(f"{run.path}: document {ranking[int(doc_positions.argmin())][0]!r} of query "
                                      f"{row['id']!r} is not in {args.passages}; give the corpus that the run searched")
            positions[number, : len(ranking)] = doc_positions
            scores[number, : len(ranking)] = [score for _, score in ranking]
        return scores, positions

    return search


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    allocate_from_one_arena()
    from dynamicrag.rows.records import count_rows, read_rows
    from dynamicrag.search.shards import find_shards

    # End if an earlier run is complete
    inputs, dense = [args.query, args.passages, *args.run], any(index != "bm25" for index in args.index)
    shard_paths = find_shards(args.passages_embeddings) if dense else []
    inputs += map(str, shard_paths)
    if dense and Path(args.model_name_or_path).exists():
        inputs.append(args.model_name_or_path)
    output = Output(vars(args), [args.output_dir], inputs)
    if output.finished:
        return
    # Check questions and runs before the long work
    count = count_rows(args.query, skip_malformed=bool(output.reject), dataset=args.dataset)
    runs = [Run(path) for path in args.run]
    for run in runs:
        ids = (row["id"] for row in read_rows(args.query, dataset=args.dataset, reject=lambda _: None))
        run.check_questions(ids, args.query, "they get no document from it")

    from dynamicrag.search.passages import open_passages

    # Open the searches
    store, queries = open_passages(args.passages, args.passage_store), f"{output.path}.queries.npy"
    device = pick_device(args.device) if dense else "cpu"
    by_index = dense_searches(args, device, shard_paths, store, output, queries, count) if dense else {}
    if "bm25" in args.index:
        by_index["bm25"] = bm25_search(args, store)
    searches = [by_index[index] for index in args.index] + [run_search(run, args, store) for run in runs]

    # Search
    searched = without = 0

    def retrieve(questions: list[Question]) -> list[Row]:
        nonlocal searched, without
        rankings = [search(questions) for search in searches]
        fused = len(rankings) > 1
        scores, positions = fuse([ranking for _, ranking in rankings], args.n_docs) if fused else rankings[0]
        searched, without = searched + len(questions), without + int((positions < 0).all(axis=1).sum())
        return attach_docs([row for _, row in questions], scores, positions, store)

    # Numbered before any is skipped, so that a continued run searches with the vectors of its own rows.
    questions = enumerate(read_rows(args.query, dataset=args.dataset, reject=output.reject))
    output.process(questions, args.questions_per_pass or QUESTIONS_PER_PASS["cuda" if device.startswith("cuda") else "cpu"], retrieve, count, "retrieving")
    if without:
        stage.log.warning("%d of %d questions of %s have no document; %s", without, searched, args.query,
                          "the passages contain none of their words" if args.index == ["bm25"] else "check --index, --nprobe and --run")
    Path(queries).unlink(missing_ok=True)  # removed before the run is complete, because nothing would remove it later
    output.finish(docs_per_question=min(args.n_docs, len(store)))


if __name__ == "__main__":
    stage.run(main)

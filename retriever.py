"""Retrieve documents: questions -> the same with `docs`, scored, best first.

Dense retrieval as in Contriever (Izacard et al., 2022, arXiv 2112.09118): the question is encoded like the passages
and compared by inner product. `retrieved_question`, where a row has one, is what is searched with.

Reads    data/splits/split_0.json                        questions
         data/psgs_w100.tsv                              the corpus
         data/wikipedia_embeddings/*                     its embeddings: own shards, or those Contriever publishes
Writes   output/retrieval_split_0.json                   + docs: id, title, text, score

    python retriever.py --model_name_or_path models/retriever --passages data/psgs_w100.tsv \\
        --passages_embeddings "data/wikipedia_embeddings/*" --query data/splits/split_0.json \\
        --output_dir output/retrieval_split_0.json --n_docs 50
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag import stage
from dynamicrag.device import DEVICES, DTYPES
from dynamicrag.output import Output

if TYPE_CHECKING:
    import numpy as np

    from dynamicrag.passages import PassageStore

# One pass over the embeddings serves this many questions.
QUESTIONS_A_CHUNK = 1024


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = stage.ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--query", default="data/splits/split_0.json", help="questions, JSON or JSONL")
    group.add_argument("--passages", default="data/psgs_w100.tsv", help="corpus: TSV, JSONL or Parquet, or a folder")
    group.add_argument("--passages_embeddings", default="data/wikipedia_embeddings/*", help="its shards, a quoted glob")
    group.add_argument("--passage_store", default=None, help="folder of the memory-mapped corpus (<passages>.store)")
    group.add_argument("--output_dir", "--output_file", default="output/retrieval_split_0.json", help="output file")
    group.add_argument("--dataset", default=None, help="data set of all rows, instead of what they say")
    group = parser.add_argument_group("search")
    group.add_argument("--n_docs", type=int, default=50, help="documents a question")
    group.add_argument("--index", default="flat", help="flat (exact), or a faiss factory string: IVF1024,SQ8")
    group.add_argument("--index_path", default=None, help="where a faiss index is kept (beside the shards)")
    group = parser.add_argument_group("encoder")
    group.add_argument("--model_name_or_path", default="models/retriever", help="encoder: a folder or a hub name")
    group.add_argument("--normalize", action="store_true", help="vectors of length 1, as given when embedding")
    group.add_argument("--max_length", type=int, default=512, help="tokens of a question that are read")
    group.add_argument("--batch_tokens", type=int, default=16384, help="padded tokens in a batch")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 where the hardware has it")
    group.add_argument("--device", default="auto", help=DEVICES)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.n_docs < 1:
        parser.error("--n_docs must be at least 1")
    return args


def search_text(row: dict) -> str:
    """What a row is searched with."""
    return row.get("retrieved_question") or row["question"]


def attach_docs(
    rows: list[dict], scores: np.ndarray, found: np.ndarray, corpus: np.ndarray, store: PassageStore
) -> list[dict]:
    """Give each row its documents, best first, replacing any it had.

    scores and found are [rows, k]; found counts vectors over all shards (-1: no hit, no document) and corpus maps
    them to positions in the store.
    """
    hits = found >= 0
    docs = iter(store.docs(corpus[found[hits]].tolist()))
    return [
        {**row, "docs": [{**next(docs), "score": float(score)} for score in row_scores[row_hits]]}
        for row, row_scores, row_hits in zip(rows, scores, hits, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from dynamicrag.records import count_rows, read_rows
    from dynamicrag.shards import check_shards, find_shards, open_shards

    shard_paths = find_shards(args.passages_embeddings)
    inputs = [args.query, args.passages, *map(str, shard_paths)]
    inputs += [args.model_name_or_path] * Path(args.model_name_or_path).exists()
    output = Output(args, [args.output_dir], inputs)
    if output.finished:
        return
    count = count_rows(args.query, skip_malformed=bool(output.reject))

    from dynamicrag.dense import Encoder, hidden_size
    from dynamicrag.device import pick_device
    from dynamicrag.index import open_index
    from dynamicrag.passages import open_passages

    shards = open_shards(shard_paths)
    store = open_passages(args.passages, args.passage_store)
    corpus = check_shards(shards, hidden_size(args.model_name_or_path), store, args.model_name_or_path)
    encoder = Encoder(args.model_name_or_path, args.device, args.dtype, args.max_length, args.normalize)
    index = open_index(shards, args.index, args.index_path, pick_device(args.device), args.seed)

    def retrieve(rows: list[dict]) -> list[dict]:
        queries = encoder.encode(list(map(search_text, rows)), args.batch_tokens)
        scores, found = index.search(queries, args.n_docs)
        return attach_docs(rows, scores, found, corpus, store)

    rows = read_rows(args.query, dataset=args.dataset, reject=output.reject)
    output.process(rows, QUESTIONS_A_CHUNK, retrieve, count, "retrieving")
    output.finish(docs_a_question=min(args.n_docs, index.count))


if __name__ == "__main__":
    stage.run(main)

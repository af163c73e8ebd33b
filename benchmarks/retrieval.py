"""Measure speed and memory of the retriever, as ratios within one run.

    search       exact search in batches of several sizes, compared with faiss and a matrix product with top-k
    compressed   recall@k compared with exact search, speed and size of compressed indexes
    workers      start-up time and memory of 1, 2 and 4 retrievers that share one index
    memory       the retriever with 1,000 and 100,000 questions, and the passage store with 10 times the passages

The embeddings are artificial (benchmarks/measure.py), or real with --passages_embeddings and --query.

    python benchmarks/retrieval.py --parts search compressed workers memory
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import made
import measure
import numpy as np

from dynamicrag.search.exact import ExactIndex
from dynamicrag.search.inner_products import best_first
from dynamicrag.stage import ArgumentParser

# Scores of the products that are compared with, at a time (4 GB in bfloat16); questions per batch of the slow systems.
MAX_SCORES, SLOW_BATCH = 1 << 31, 1024
COMPRESSED = ("IVF1024,SQ8", "RR768,IVF1024,RaBitQ4", "RR768,IVF1024,RaBitQfs")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--parts", nargs="+", default=["search", "compressed", "workers", "memory"])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--questions", type=int, default=1024)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256, 1024, 8192], help="questions per pass (part search)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compressed", nargs="+", default=COMPRESSED, help="faiss factory strings")
    parser.add_argument("--nprobes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--candidates", nargs="+", type=int, default=[4, 10])
    parser.add_argument("--passages_embeddings", help="real shards instead of artificial vectors, as a quoted glob")
    parser.add_argument("--query", help="questions for these shards; requires --model_name_or_path (and --normalize)")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--normalize", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (part search only)")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors, float16 [n, width], and questions, float32 [m, width]."""
    if not args.passages_embeddings:
        vectors = measure.vectors_like_passages(args.vectors, args.width)
        return vectors, measure.questions_about(vectors, max(args.questions, *args.batches))
    from dynamicrag.models.encoder import Encoder
    from dynamicrag.models.encoder_settings import QUERY
    from dynamicrag.rows.records import read_rows
    from dynamicrag.search.shards import find_shards, open_shards

    vectors = np.concatenate([shard.vectors for shard in open_shards(find_shards(args.passages_embeddings))])
    texts = [row["question"] for row in read_rows(args.query)][: args.questions]
    return vectors, Encoder(args.model_name_or_path, normalize=args.normalize, role=QUERY).encode(texts)


# ---------------------------------------------------------------- exact search


def search(args: argparse.Namespace, vectors: np.ndarray, questions: np.ndarray) -> None:
    import faiss
    import torch

    from dynamicrag.models.device import devices_of, pick_dtype

    # The indexes
    ours = ExactIndex([vectors], devices_of(args.device))
    wide = vectors.astype(np.float32)
    plain = faiss.IndexFlatIP(vectors.shape[1])
    plain.add(wide)
    device, k = devices_of(args.device)[0], args.k

    # What is compared
    def torch_search(matrix: torch.Tensor, batch: np.ndarray) -> None:
        asked = torch.from_numpy(batch).to(device, matrix.dtype)
        for some in asked.split(MAX_SCORES // len(matrix)):
            (some @ matrix.T).topk(k)[1].cpu()

    full, narrow = (torch.from_numpy(wide).to(device, dtype) for dtype in (torch.float32, pick_dtype("auto", device)))
    rough = f"matmul + topk {str(narrow.dtype)[6:]}"
    find = {
        "--index flat": lambda batch: ours.search(batch, k),
        rough: lambda batch: torch_search(narrow, batch),
        "matmul + topk float32": lambda batch: torch_search(full, batch),
        "faiss IndexFlatIP": lambda batch: plain.search(batch, k),
    }
    slow = ("matmul + topk float32", "faiss IndexFlatIP")  # no faster with more questions

    def in_one_batch(name: str, size: int):
        batch = np.resize(questions, (min(size, SLOW_BATCH) if name in slow else size, questions.shape[1]))

        def work() -> int:
            find[name](batch)
            return len(batch)

        return work

    # Measure and report speed
    first = time.perf_counter()
    ours.search(questions[:1], k)
    first = time.perf_counter() - first
    seconds = {size: measure.in_turns({name: in_one_batch(name, size) for name in find}, args.rounds) for size in args.batches}
    rows = [
        [str(size), f"{1 / taken['--index flat']:.1f}", *(f"{taken[name] / taken['--index flat']:.2f}" for name in [*find][1:])]
        for size, taken in seconds.items()
    ]
    title = f"Exact search, {len(vectors):,} x {vectors.shape[1]}, k = {k}, {args.device}"
    header = ["questions per pass", "questions/s", *(f"speed relative to {name}" for name in [*find][1:])]
    measure.report(title, header, rows, {str(size): {name: 1 / s for name, s in taken.items()} for size, taken in seconds.items()}, args.output_file)
    print(f"\nThe vectors of the products are in memory in their type. The first search, which measures the bounds, took {first:.2f} s.")

    # Compare the results with brute force and with faiss
    questions = questions[: args.questions]
    scores, positions = ours.search(questions, k)
    sample = questions[:64]
    expected = np.concatenate([
        (sample.astype(np.float64) @ vectors[start : start + 50_000].T.astype(np.float64)).astype(np.float32)
        for start in range(0, len(vectors), 50_000)
    ], axis=1)
    expected_scores, expected_positions = best_first(expected, np.broadcast_to(np.arange(len(vectors)), expected.shape), k)
    same = (positions[:64] == expected_positions).all(), (scores[:64] == expected_scores).all()
    faiss_positions = plain.search(questions, k)[1]
    agree = np.mean([len(set(a) & set(b)) / k for a, b in zip(positions, faiss_positions, strict=True)])
    print(f"\nbrute force in float64, 64 questions: the same documents {same[0]}, the same scores {same[1]}; "
          f"documents shared with faiss in float32: {agree:.4%}")


# ---------------------------------------------------------------- compressed indexes


def compressed(args: argparse.Namespace, vectors: np.ndarray, questions: np.ndarray, folder: Path) -> None:
    from dynamicrag.search.index import open_index
    from dynamicrag.search.shards import find_shards, open_shards, save_array, save_ids

    questions = questions[: args.questions]
    save_array(folder / "passages_00.npy", vectors)
    save_ids(folder / "passages_00.ids.npy", [str(number) for number in range(len(vectors))])
    shards = open_shards(find_shards(f"{folder}/*"))
    exact = ExactIndex([vectors])
    gold = exact.search(questions, args.k)[1]
    flat_size = vectors.size * 4
    systems, recall, size, built = {"flat": lambda: len(exact.search(questions, args.k)[0])}, {"flat": 1.0}, {"flat": flat_size}, {"flat": 0.0}
    for factory in args.compressed:
        began = time.perf_counter()
        open_index(shards, factory)
        seconds = time.perf_counter() - began
        kept = next(path for path in folder.glob("index_*.faiss") if path.name[6:-6] == "".join(c if c.isalnum() else "_" for c in factory))
        for nprobe, candidates in itertools.product(args.nprobes if "IVF" in factory else [1], args.candidates):
            index = open_index(shards, factory, nprobe=nprobe, candidates=candidates)
            name = f"{factory} --nprobe {nprobe} --candidates {candidates}"
            found = index.search(questions, args.k)[1]
            recall[name] = float(np.mean([len(set(a) & set(b)) / args.k for a, b in zip(found, gold, strict=True)]))
            size[name], built[name] = kept.stat().st_size, seconds
            systems[name] = lambda index=index: len(index.search(questions, args.k)[0])
    seconds = measure.in_turns(systems, args.rounds)
    rows = [
        [name, f"{recall[name]:.3f}", f"{seconds['flat'] / s:.1f}", f"{size[name] / flat_size:.3f}", f"{built[name]:.0f}"]
        for name, s in seconds.items()
    ]
    title = f"Compressed indexes, {len(vectors):,} x {vectors.shape[1]}"
    header = ["--index", f"recall@{args.k}", "speed to flat", "size to float32", "seconds to build"]
    figures = {name: {"recall": recall[name], "speed": seconds["flat"] / s, "size": size[name] / flat_size} for name, s in seconds.items()}
    measure.report(title, header, rows, figures, args.output_file)


# ---------------------------------------------------------------- memory


def retriever(model: Path, passages: Path, embeddings: str, query: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, "retriever.py", "--model_name_or_path", str(model), "--passages", str(passages), "--passages_embeddings",
            embeddings, "--query", str(query), "--output_file", str(output), *flags]


def workers(args: argparse.Namespace, folder: Path) -> None:
    """Measure workers on 3 GB of vectors: 2 x 1,000,000 vectors of width 768 in float16."""
    count = 2 * args.vectors
    model, passages, embeddings = made.encoder(folder / "encoder", args.width, 12), made.corpus(folder, count), made.shards(folder / "embeddings", count, args.width)
    query, first = made.questions_file(folder, 256), made.questions_file(folder, 1)
    building = measure.run_watched([retriever(model, passages, embeddings, first, folder / "first.jsonl")])[1]
    rows, figures = [], {"seconds with the store to build": building}
    for number in (1, 2, 4):
        startup = measure.run_watched([retriever(model, passages, embeddings, first, folder / f"s{number}_{w}.jsonl") for w in range(number)])[1]
        peak, _ = measure.run_watched([retriever(model, passages, embeddings, query, folder / f"w{number}_{w}.jsonl") for w in range(number)])
        figures[str(number)] = {"seconds from start to end of one question": startup, **peak}
        alone = figures["1"]["proportional"]
        rows.append([str(number), f"{startup:.1f}", f"{peak['proportional']:.2f}", f"{peak['proportional'] / alone:.2f}", f"{peak['anonymous']:.2f}"])
    size = count * args.width * 2 / 1e9
    title = f"Retrievers over one index of {size:.2f} GB ({count:,} x {args.width}), Contriever-sized encoder"
    header = ["workers", "s for 1 question, start included", "proportional GB", "to one", "anonymous GB"]
    measure.report(title, header, rows, figures, args.output_file)
    print(f"the first start also built the passage store of {count:,} passages: {building:.0f} s")


def memory(args: argparse.Namespace, folder: Path) -> None:
    small, large = made.corpus(folder, 100_000), made.corpus(folder, 1_000_000)
    model, embeddings = made.encoder(folder / "encoder", 64, 2), made.shards(folder / "embeddings", 100_000, 64)
    rows, figures = [], {}

    def line(name: str, command: list[str]) -> None:
        peak, seconds = measure.run_watched([command])
        figures[name] = {**peak, "seconds": seconds}
        rows.append([name, f"{peak['resident']:.3f}", f"{peak['anonymous']:.3f}", f"{seconds:.0f}"])

    for count in (1_000, 1_000, 10_000, 100_000):  # the first run builds the store
        output = folder / f"{count}.jsonl"
        line(f"retriever, {count:,} questions", retriever(model, small, embeddings, made.questions_file(folder, count), output, "--n_docs", "20", "--overwrite"))
    rows.pop(0)
    reading = ("import sys, random; from dynamicrag.search.passages import open_passages; store = open_passages(sys.argv[1]); "
               "[store.docs(random.sample(range(len(store)), 50_000)) for _ in range(5)]; print(len(store))")
    for passages in (small, large):
        line(f"building the store, {passages.stem}", [sys.executable, "-c", reading, str(passages)])
        line(f"reading the store, {passages.stem}", [sys.executable, "-c", reading, str(passages)])
    measure.report("Memory", ["", "resident GB", "anonymous GB", "seconds"], rows, figures, args.output_file)


def main() -> None:
    args = parse_args()
    if {"search", "compressed"} & set(args.parts):
        vectors, questions = load(args)
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            if part == "search":
                search(args, vectors, questions)
            elif part == "compressed":
                compressed(args, vectors, questions, Path(folder))
            elif part == "workers":
                workers(args, Path(folder))
            else:
                memory(args, Path(folder))


if __name__ == "__main__":
    main()

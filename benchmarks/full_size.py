"""Measure exact search and the passage store at the size of Wikipedia: time, bytes read, and peak memory.

    search       ExactIndex over --vectors made-up vectors on disk, for each number of --questions, in a process of its own
    store        the passage store of --passages made-up passages: built, opened, and read at random places

The vectors take 1.5 KB each on disk, the passages 1.5 KB. A part ends before it writes if less than --keep_free GB would be
left. It removes its files at the end, unless --keep is given; the vectors of an earlier run in --folder are used again. Half
of the questions are about known vectors, which the search must find first.

    python benchmarks/full_size.py --parts search store --folder /data/full_size
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import made
import measure
import numpy as np

from dynamicrag.search.exact import ExactIndex
from dynamicrag.search.inner_products import best_first
from dynamicrag.search.passages import open_passages
from dynamicrag.stage import ArgumentParser, UserError, run

WIKIPEDIA = 21_015_324
BASE = 100_000  # vectors that are made from random numbers; the others are these, turned
SHARD = 20 * BASE
PER_PASSAGE = {"corpus": 860, "store": 880}  # bytes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--parts", nargs="+", default=["search", "store"], choices=["search", "store"])
    parser.add_argument("--vectors", type=int, default=WIKIPEDIA)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--questions", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--questions_per_pass", type=int, default=1024)
    parser.add_argument("--checked", type=int, default=4, help="questions that are compared with brute force in float64, which reads everything again")
    parser.add_argument("--passages", type=int, default=WIKIPEDIA)
    parser.add_argument("--folder", help="folder for the files (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="leave the files in --folder")
    parser.add_argument("--keep_free", type=float, default=15, help="GB of disk that stay free")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    parser.add_argument("--of_child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- made-up files


def require_disk(folder: Path, needed: float, keep_free: float) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free - needed / 1e9 < keep_free:
        raise UserError(f"{folder}: {free:.0f} GB are free, {needed / 1e9:.0f} GB are needed and {keep_free:.0f} GB stay free; give smaller sizes or another --folder")


def base_vectors(width: int) -> np.ndarray:
    return measure.vectors_like_passages(BASE, width)


def write_vectors(folder: Path, count: int, width: int) -> None:
    """Write the shards that are missing.

    Every BASE vectors are the same ones with their dimensions turned by one more place.
    """
    base = base_vectors(width)
    for number, first in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - first)
        path, writing = folder / f"passages_{number:02d}.npy", folder / "writing"
        if path.exists() and np.load(path, mmap_mode="r").shape == (size, width):
            continue
        shard = np.lib.format.open_memmap(writing, "w+", np.float16, (size, width))
        for start in range(0, size, BASE):
            some = base[: min(BASE, size - start)]
            shard[start : start + BASE] = np.roll(some, (first + start) // BASE, axis=1)
        shard.flush()
        del shard
        writing.rename(path)


def make_questions(count: int, vectors: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return questions, float32 [count, width], and the number of the vector that each is about; -1 if it is unknown.

    Every second question is close to one vector. The others are about the topic of one.
    """
    rng = np.random.default_rng(1)
    about = rng.integers(0, vectors, count)
    base = base_vectors(width)
    asked = measure.questions_about(base, count)
    close = base[about % BASE] + rng.standard_normal((count, width), dtype=np.float32) * 0.1 / width**0.5
    asked[::2] = (close / np.linalg.norm(close, axis=1, keepdims=True))[::2]
    turned = np.stack([np.roll(row, number // BASE) for row, number in zip(asked, about, strict=True)])
    return turned, np.where(np.arange(count) % 2, -1, about)


def forget(path: Path) -> None:
    """Remove a file from the page cache, so that the next reader reads the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- a process of its own


class Watched:
    """The time, the bytes read from disk and the peak memory of this process while a block runs."""

    def __enter__(self) -> "Watched":
        self.anonymous, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._read, self._began = self._bytes_read(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.read = time.perf_counter() - self._began, (self._bytes_read() - self._read) / 1e9
        self._done.set()
        self._thread.join()
        self.resident = self._status("VmHWM")

    def _watch(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, self._status("RssAnon"))
            if self._done.wait(0.2):
                return

    @staticmethod
    def _status(name: str) -> float:
        return next(int(line.split()[1]) / 1e6 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

    @staticmethod
    def _bytes_read() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))

    def print_row(self, what: str, rate: str) -> None:
        figures = [f"{self.seconds:.0f}" if self.seconds > 10 else f"{self.seconds:.2f}", rate, f"{self.read:.1f}", f"{self.anonymous:.2f}", f"{self.resident:.2f}"]
        print("\t".join([what, *figures]), flush=True)


HEADER = ["", "seconds", "rate", "GB read from disk", "peak GB, anonymous", "peak GB, with mapped pages"]


def in_children(args: argparse.Namespace, title: str, steps: list[list[str]]) -> None:
    """Run the steps one after another, each in a process of its own, and report their rows."""
    rows = []
    for step in steps:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--of_child", *step], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(step)}: exit status {done.returncode}")
        rows += [line.split("\t") for line in done.stdout.splitlines()]
    figures = {row[0]: dict(zip(HEADER[1:], row[1:], strict=True)) for row in rows}
    measure.report(title, HEADER, rows, figures, args.output_file)


# ---------------------------------------------------------------- search


def search(args: argparse.Namespace, folder: Path) -> None:
    written = sum(path.stat().st_size for path in folder.glob("passages_*.npy"))
    require_disk(folder, 2 * args.vectors * args.width - written, args.keep_free)
    began = time.perf_counter()
    write_vectors(folder, args.vectors, args.width)
    print(f"wrote {(2 * args.vectors * args.width - written) / 1e9:.1f} GB of vectors in {time.perf_counter() - began:.0f} s", flush=True)
    for count in args.questions:
        np.savez(folder / f"questions_{count}.npz", *make_questions(count, args.vectors, args.width))
    in_children(args, f"Exact search, {args.vectors:,} x {args.width}, k = {args.k}, {args.questions_per_pass:,} questions per pass",
                [["search", str(folder), str(count)] for count in args.questions])
    if not args.keep:
        for path in (*folder.glob("passages_*.npy"), *folder.glob("questions_*.npz")):
            path.unlink()


def search_child(args: argparse.Namespace, folder: Path, count: int) -> None:
    paths = sorted(folder.glob("passages_*.npy"))
    for path in paths:
        forget(path)
    arrays = [np.load(path, mmap_mode="r") for path in paths]
    questions, about = np.load(folder / f"questions_{count}.npz").values()
    index, results = ExactIndex(arrays), []
    with Watched() as watched:
        for start in range(0, count, args.questions_per_pass):
            results.append(index.search(questions[start : start + args.questions_per_pass], args.k))
    scores, positions = (np.concatenate(parts) for parts in zip(*results, strict=True))
    watched.print_row(f"{count:,} questions", f"{count * args.vectors / watched.seconds:.2g} comparisons/s")
    wrong = int((positions[about >= 0, 0] != about[about >= 0]).sum())
    expected = brute_force(arrays, questions[: args.checked], args.k) if args.checked else (scores[:0], positions[:0])
    same = [bool((mine[: args.checked] == theirs).all()) for mine, theirs in zip((scores, positions), expected, strict=True)]
    print(f"{count:,} questions: {wrong} of {int((about >= 0).sum())} known vectors are not first; of {args.checked} questions, scores and positions "
          f"are those of brute force in float64: {same}", file=sys.stderr)
    if wrong or not all(same):
        sys.exit(1)


def brute_force(arrays: list[np.ndarray], questions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, positions, offset = np.empty((len(questions), 0), np.float32), np.empty((len(questions), 0), np.int64), 0
    for array in arrays:
        for start in range(0, len(array), BASE):
            some = (questions.astype(np.float64) @ array[start : start + BASE].astype(np.float64).T).astype(np.float32)
            numbers = np.broadcast_to(np.arange(some.shape[1]) + offset + start, some.shape)
            scores, positions = best_first(np.hstack([scores, some]), np.hstack([positions, numbers]), k)
        offset += len(array)
    return scores, positions


# ---------------------------------------------------------------- passage store


def store(args: argparse.Namespace, folder: Path) -> None:
    require_disk(folder, args.passages * sum(PER_PASSAGE.values()), args.keep_free)
    began = time.perf_counter()
    corpus = made.corpus(folder, args.passages)
    print(f"wrote {corpus.stat().st_size / 1e9:.1f} GB of passages in {time.perf_counter() - began:.0f} s", flush=True)
    in_children(args, f"Passage store, {args.passages:,} passages", [["build", str(corpus)], ["read", str(corpus)]])
    size = sum(path.stat().st_size for path in Path(f"{corpus}.store").iterdir()) / 1e9
    print(f"\nthe store has {size:.1f} GB")
    if not args.keep:
        corpus.unlink()
        shutil.rmtree(f"{corpus}.store")


def build_child(args: argparse.Namespace, corpus: Path) -> None:
    with Watched() as watched:
        open_passages(corpus)
    watched.print_row("built", f"{args.passages / watched.seconds:,.0f} passages/s")


def read_child(args: argparse.Namespace, corpus: Path) -> None:
    for what in ("opened, after reading the corpus for its hash", "opened again"):
        with Watched() as watched:
            opened = open_passages(corpus)
        watched.print_row(what, "")
    rng = np.random.default_rng(0)
    for path in Path(f"{corpus}.store").iterdir():
        forget(path)
    for what in ("50,000 documents at random", "the same again"):
        places = np.random.default_rng(2).integers(0, len(opened), 50_000).tolist()
        with Watched() as watched:
            docs = opened.docs(places)
        watched.print_row(what, f"{len(docs) / watched.seconds:,.0f} documents/s")
        assert [doc["title"] for doc in docs] == [f"title {place}" for place in places]
    places = rng.integers(0, len(opened), 50_000)
    with Watched() as watched:
        found = opened.positions(map(str, places))
    watched.print_row("50,000 ids looked up", f"{len(places) / watched.seconds:,.0f} ids/s")
    assert (found == places).all()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.of_child:
        what, path, *given = args.of_child
        {"search": search_child, "build": build_child, "read": read_child}[what](args, Path(path), *map(int, given))
        return
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for part in args.parts:
            {"search": search, "store": store}[part](args, Path(folder))


if __name__ == "__main__":
    run(main)

"""The corpus of a server: the documents of one question at a time, as retriever.py retrieves them."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from dynamicrag.models.device import DEVICES, DTYPES, device_flag, pick_device
from dynamicrag.models.encoder_settings import POOLINGS, QUERY, refuse_other_settings
from dynamicrag.rows.row import Doc
from dynamicrag.search.index import CANDIDATES, NPROBE, faiss_can_read
from dynamicrag.stage import UserError

if TYPE_CHECKING:
    import numpy as np

    from dynamicrag.search.passages import PassageStore


def add_corpus_flags(parser: ArgumentParser) -> None:
    """Add the flags of the corpus, which are those of retriever.py. Without --passages, clients send their documents."""
    group = parser.add_argument_group("corpus")
    group.add_argument("--passages", help="corpus: TSV, JSONL or Parquet, or a folder (default: clients send their documents)")
    group.add_argument("--passage-store", help="folder of the memory-mapped corpus (default: <passages>.store)")
    group.add_argument("--index", default="bm25", help="bm25, flat (exact), or a faiss factory string (IVF1024,SQ8)")
    group.add_argument("--passages-embeddings", default="data/wikipedia_embeddings/*", help="shards of the corpus, as a quoted glob")
    group.add_argument("--index-path", help="file of the faiss index (default: next to the shards)")
    group.add_argument("--nprobe", type=int, default=NPROBE, help="clusters that an IVF index searches")
    group.add_argument("--candidates", type=int, default=CANDIDATES, help="candidates of a compressed index per requested document")
    group.add_argument("--encoder", default="models/retriever", help="encoder of the questions: a folder or a hub name")
    group.add_argument("--pooling", choices=POOLINGS, help="pooling of a plain folder, as in the embedding stage (default: mean)")
    group.add_argument("--normalize", action="store_true", help="scale vectors to length 1, as in the embedding stage")
    group.add_argument("--query-prompt", help="prefix of each question (default: as given by the folder)")
    group.add_argument("--encoder-dtype", choices=DTYPES, default="auto", help="auto is bfloat16 if the hardware supports it")
    group.add_argument("--encoder-device", type=device_flag, default="cpu", help=DEVICES)


@dataclass(frozen=True)
class CorpusOptions:
    """A corpus and its index: the flags of add_corpus_flags, which describe them, and --seed."""

    passages: str
    passage_store: str | None = None
    index: str = "bm25"
    passages_embeddings: str = "data/wikipedia_embeddings/*"
    index_path: str | None = None
    nprobe: int = NPROBE
    candidates: int = CANDIDATES
    encoder: str = "models/retriever"
    pooling: str | None = None
    normalize: bool = False
    query_prompt: str | None = None
    encoder_dtype: str = "auto"
    encoder_device: str = "cpu"
    seed: int = 42


class Corpus:
    """A corpus that is searched for one question at a time. Thread-safe."""

    def __init__(self, options: CorpusOptions):
        """Open the corpus and its index, which are built first if they do not exist. Raises UserError."""
        from dynamicrag.search.passages import open_passages

        if options.index not in ("bm25", "flat") and not faiss_can_read(options.index):
            raise UserError(f"--index {options.index}: expected bm25, flat, or a faiss factory string such as IVF1024,SQ8 or HNSW32")
        self._store = open_passages(options.passages, options.passage_store)
        self._search = _bm25_search(self._store) if options.index == "bm25" else _dense_search(options, self._store)
        self._lock = Lock()  # one question takes milliseconds, and the libraries do not promise more

    def __len__(self) -> int:
        return len(self._store)

    def docs(self, question: str, count: int) -> list[Doc]:
        """Return the `count` best documents with their scores, best first."""
        with self._lock:
            scores, positions = self._search(question, count)
            hits = positions[0] >= 0
            docs = self._store.docs(positions[0][hits].tolist())
        return [{**doc, "score": float(score)} for doc, score in zip(docs, scores[0][hits], strict=True)]


Search = Callable[[str, int], "tuple[np.ndarray, np.ndarray]"]  # scores and positions, both [1, k]


def _bm25_search(store: PassageStore) -> Search:
    from dynamicrag.search.bm25 import open_bm25

    index = open_bm25(store)
    return lambda question, count: index.search([question], count)


def _dense_search(options: CorpusOptions, store: PassageStore) -> Search:

    from dynamicrag.models.encoder import Encoder
    from dynamicrag.search.index import open_index, search_corpus
    from dynamicrag.search.shards import check_shards, find_shards, open_shards

    paths, device = find_shards(options.passages_embeddings), pick_device(options.encoder_device)
    shards = open_shards(paths)
    encoder = Encoder(options.encoder, device, options.encoder_dtype, None, options.normalize, options.pooling, options.query_prompt, QUERY)
    refuse_other_settings(paths, options.encoder, encoder.settings)
    corpus = check_shards(shards, encoder.hidden_size, store, options.encoder)
    index = open_index(shards, options.index, options.index_path, device, options.seed, "0/1", options.nprobe, options.candidates)

    return lambda question, count: search_corpus(index, shards, corpus, encoder.encode([question], None), count)

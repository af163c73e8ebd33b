"""The index over embedding shards: exact, or a compressed faiss index that is trained once and stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.locks import exclusive
from dynamicrag.models.device import devices_of
from dynamicrag.rows.manifest import fingerprint, is_content
from dynamicrag.search.exact import ExactIndex
from dynamicrag.search.inner_products import NotFiniteError, rescore
from dynamicrag.search.shards import Shard, name_of
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import numpy as np

ADDED_AT_ONCE = 65536
ANY_WIDTH = 768
# Training a faiss index: vectors per cluster, and the minimum number of vectors.
TRAINING_PER_CLUSTER, TRAINING_LEAST = 64, 100_000
# Index types that faiss supports on GPUs, and its limit there for documents and clusters per query.
ON_GPUS, GPU_MOST = ("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ"), 2048
# Defaults of approximate search: clusters (IVF), nodes (HNSW), and candidates per requested document.
NPROBE, EF_SEARCH, CANDIDATES = 64, 256, 4


class FaissIndex:
    """Approximate search with any index of faiss's factory, memory-mapped.

    The index proposes `candidates` times the number of requested documents. The vectors themselves determine the best
    of them, so scores are exact inner products whichever index is used.
    """

    def __init__(self, index: Any, vectors: list[np.ndarray], candidates: int):
        self.index, self.vectors, self.candidates = index, vectors, candidates
        self.count = index.ntotal

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Like ExactIndex.search; if the index finds fewer than k vectors, the last positions are -1."""
        k = min(k, self.count)
        wanted = min(k * self.candidates, self.count)
        if type(self.index).__name__.startswith(("IndexShards", "GpuIndex")):  # on several GPUs, or on one
            wanted = min(wanted, max(GPU_MOST, k))
        try:
            _, positions = self.index.search(queries, wanted)
        except RuntimeError as error:
            raise UserError(f"--n_docs: the index cannot return {wanted} documents ({_reason(error)}); give a smaller number") from error
        return rescore(self.vectors, queries, positions, k)


def search_corpus(
    index: ExactIndex | FaissIndex, shards: list[Shard], corpus: np.ndarray | range, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Like ExactIndex.search, with positions in the corpus, as check_shards gives them. Raises UserError naming a vector that is not finite."""
    import numpy as np

    try:
        scores, positions = index.search(vectors, k)
    except NotFiniteError as error:
        raise UserError(f"{name_of(shards, error.position)} is not finite; embed this shard again") from error
    return scores, np.where(positions >= 0, positions + corpus.start if isinstance(corpus, range) else corpus[positions], -1)


def open_index(
    shards: list[Shard], factory: str, path: str | None = None, device: str = "cpu", seed: int = 42, part: str = "0/1",
    nprobe: int = NPROBE, candidates: int = CANDIDATES,
) -> ExactIndex | FaissIndex:
    """Open the index over these shards. `flat` is exact; any other factory is a faiss string (`IVF1024,SQ8`, `HNSW32`).

    A faiss index is trained on a seeded sample, filled, and stored at `path` (default: next to the shards), with a
    manifest of the shards, or the part of them, that it contains. Raises UserError if the index at `path` contains
    others.
    """
    if factory.lower() == "flat":
        return ExactIndex([shard.vectors for shard in shards], devices_of(device))
    name = factory if part == "0/1" else f"{factory} {part}"
    index_file = Path(path or shards[0].path.parent / f"index_{''.join(c if c.isalnum() else '_' for c in name)}.faiss")
    holds = {
        "factory": factory, "seed": seed, "part": part,
        "shards": [[shard.path.name, fingerprint(shard.path)] for shard in shards],
    }
    manifest = Path(f"{index_file}.manifest.json")
    try:
        index_file.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(index_file):
            if not (manifest.is_file() and index_file.is_file()):
                _save(_build(shards, factory, seed), index_file, manifest, holds)
    except (OSError, RuntimeError) as error:  # faiss reports a full disk as a RuntimeError
        raise UserError(f"{index_file}: the index cannot be written ({error}); give --index_path") from error
    if not _holds(_made_from(manifest), holds, shards):
        raise UserError(f"{index_file}: was built from different shards or with a different factory string; remove it and "
                        f"{manifest.name} to build it again, or give another --index_path")
    return FaissIndex(_load(index_file, device, nprobe), [shard.vectors for shard in shards], candidates)


def faiss_can_read(factory: str) -> bool:
    """Return whether faiss can parse a factory string.

    Conflicts with the vector width show only when the index is built.
    """
    import faiss

    try:
        faiss.index_factory(ANY_WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        return "could not parse" not in str(error)
    return True


def _holds(made: object, holds: dict, shards: list[Shard]) -> bool:
    """Return whether an index was made for this, by this version or by one that identified large shards by samples."""
    if made == holds or not isinstance(made, dict):
        return made == holds
    kept = made.get("shards")
    return {**made, "shards": holds["shards"]} == holds and isinstance(kept, list) and len(kept) == len(shards) and all(
        isinstance(entry, list) and len(entry) == 2 and entry[0] == shard.path.name and is_content(entry[1], shard.path)
        for entry, shard in zip(kept, shards, strict=True)
    )


def _made_from(manifest: Path) -> object:
    """Return the source of the index from its manifest; None if the manifest is not JSON."""
    try:
        return orjson.loads(manifest.read_bytes())
    except orjson.JSONDecodeError:
        return None


def _build(shards: list[Shard], factory: str, seed: int) -> object:
    import faiss
    import numpy as np
    from tqdm import tqdm

    width = shards[0].vectors.shape[1]
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"--index {factory}: faiss does not accept this factory string for {width} dimensions "
                        f"({_reason(error)}); give another one, or --index flat") from error
    count = sum(len(shard.vectors) for shard in shards)
    if not index.is_trained:
        clusters = getattr(faiss.try_extract_index_ivf(index), "nlist", 0)
        rng = np.random.default_rng(seed)
        wanted = min(count, max(TRAINING_LEAST, TRAINING_PER_CLUSTER * clusters))
        chosen = np.sort(rng.choice(count, wanted, replace=False))
        sample, offset = [], 0
        for shard in shards:
            inside = chosen[(chosen >= offset) & (chosen < offset + len(shard.vectors))] - offset
            sample.append(np.asarray(shard.vectors[inside], dtype=np.float32))
            offset += len(shard.vectors)
        log.info("training %s on %d of %d vectors (once)", factory, wanted, count)
        sample = np.concatenate(sample)
        _require_finite(shards, sample, chosen)
        try:
            index.train(sample)
        except RuntimeError as error:
            raise UserError(f"--index {factory}: cannot be trained on {count} vectors ({_reason(error)}); "
                            "use fewer clusters, or --index flat") from error
    with tqdm(total=count, desc="indexing", unit=" passages", unit_scale=True) as progress:
        for shard in shards:
            for start in range(0, len(shard.vectors), ADDED_AT_ONCE):
                block = np.ascontiguousarray(shard.vectors[start : start + ADDED_AT_ONCE], dtype=np.float32)
                _require_finite(shards, block, np.arange(index.ntotal, index.ntotal + len(block)))
                index.add(block)
                progress.update(len(block))
    return index


def _require_finite(shards: list[Shard], vectors: np.ndarray, positions: np.ndarray) -> None:
    """Raise UserError naming the first vector with NaN or infinity, which would spoil the codes of the other vectors."""
    import numpy as np

    wrong = ~np.isfinite(vectors).all(axis=1)
    if wrong.any():
        raise UserError(f"{name_of(shards, int(positions[wrong][0]))} is not finite; embed this shard again")


def _save(index: Any, path: Path, manifest: Path, holds: dict) -> None:
    import faiss

    writing = f"{path}.writing"
    manifest.unlink(missing_ok=True)
    faiss.write_index(index, writing)
    os.replace(writing, path)
    with atomic_writer(manifest) as file:
        file.write(orjson.dumps(holds, option=orjson.OPT_INDENT_2))


def _load(path: Path, device: str, nprobe: int) -> Any:
    import faiss

    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read as a faiss index ({_reason(error)}); remove it to build it "
                        "again") from error
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = min(nprobe, inverted.nlist)
    inner: Any = faiss.downcast_index(index)
    graph = getattr(faiss.downcast_index(inner.index) if hasattr(inner, "chain") else inner, "hnsw", None)
    if graph is not None:
        graph.efSearch = EF_SEARCH
    return index if device == "cpu" or inverted is None else _on_gpus(index, device)


def _on_gpus(index: Any, device: str) -> Any:
    """Distribute the inverted lists over the GPUs.

    IVF,Flat lists are float32 there, whatever useFloat16 is (GpuClonerOptions.h).
    """
    import faiss

    kind = type(faiss.downcast_index(index)).__name__
    if not hasattr(faiss, "GpuMultipleClonerOptions") or kind not in ON_GPUS:
        log.warning("%s: faiss searches this index on the CPU; it supports GPUs only with faiss-gpu and for %s",
                    kind, ", ".join(ON_GPUS))
        return index
    inverted = faiss.extract_index_ivf(index)
    inverted.nprobe = min(inverted.nprobe, GPU_MOST)
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_gpus_list(index, options, [int(name.partition(":")[2]) for name in devices_of(device)])


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rsplit("Error: ", 1)[-1]

"""Embedding shards: the vectors of a part of the corpus in float16, in the order of their ids.

A shard of this project is `passages_00.npy` ([n, width]) with `passages_00.ids.npy` (UTF-8 bytes, [n]) next to it. Both
are memory-mapped, so that the workers on a machine share one copy. Published Contriever shards are pickles of (list of
ids, float16 array). They are read by pickled.py and converted once to the same form.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.locks import exclusive
from dynamicrag.files.paths import matching
from dynamicrag.rows.manifest import fingerprint, is_content, manifest_path, read_manifest
from dynamicrag.search.passages import PassageStore
from dynamicrag.search.pickled import NPY_ERRORS, NUMPY_TYPES, read_pickled
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import numpy as np

PICKLED = ("", ".pkl", ".pickle")


@dataclass
class Shard:
    """One file of embeddings: ids as bytes [n] and vectors as float16 or float32 [n, width]."""

    path: Path
    ids: np.ndarray
    vectors: np.ndarray


def ids_path(shard: str | Path) -> Path:
    return Path(shard).with_suffix(".ids.npy")


def find_shards(pattern: str) -> list[Path]:
    """Return the shards that match a glob or are in a folder, sorted. Raises UserError if one is unfinished or missing."""
    names = [file for path in matching(pattern) for file in (matching(path / "*") if path.is_dir() and path == Path(pattern) else [path])]
    partial = next((name for name in names if name.suffix == ".partial"), None)
    if partial is not None:
        raise UserError(f"{partial}: this shard is unfinished; run generate_passage_embeddings.py again to complete it")
    own = [name for name in names if name.suffix == ".npy" and not name.name.endswith(".ids.npy")]
    pickled = [name for name in names if name.suffix in PICKLED and name.is_file()]
    converted = {name.with_suffix(".npy") for name in pickled}
    shards = sorted([*pickled, *(name for name in own if name not in converted)])
    if not shards:
        raise UserError(f"{pattern}: no embedding shards; create them with generate_passage_embeddings.py")
    parts_present: set[int] = set()
    expected = 0  # stays 0 for published shards, which have no manifests
    for shard in shards:
        if manifest := read_manifest(shard):
            part, parts = (manifest["arguments"].get(key, default) for key, default in (("shard_id", 0), ("num_shards", 1)))
            if type(part) is not int or type(parts) is not int:
                raise UserError(f"{manifest_path(shard)}: not a manifest of generate_passage_embeddings.py (shard "
                                f"{part!r} of "
                                f"{parts!r}); embed this shard again with --overwrite")
            parts_present.add(part)
            expected = max(expected, parts)
    missing = next((part for part in range(expected) if part not in parts_present), None)
    if missing is not None:
        raise UserError(f"{pattern}: shard {missing} of {expected} is missing; run generate_passage_embeddings.py "
                        f"--shard_id {missing} --num_shards {expected}")
    return shards


def open_shards(paths: list[Path]) -> list[Shard]:
    """Memory-map the shards; pickled ones are converted first."""
    return [_open_npy(path if path.suffix == ".npy" else _convert(path), path) for path in paths]


def _open_npy(path: Path, named: Path) -> Shard:
    import numpy as np

    try:
        with np.errstate(over="ignore"):  # the header may give an impossible shape
            # Not np.load, which would also open archives.
            vectors, ids = (np.lib.format.open_memmap(name, mode="r") for name in (path, ids_path(path)))
    except NPY_ERRORS as error:
        raise UserError(f"{named}: not a shard of embeddings ({error}); embed or download it again") from error
    if vectors.ndim != 2 or vectors.dtype.str not in NUMPY_TYPES.values() or ids.dtype.kind != "S" or ids.shape != vectors.shape[:1]:
        raise UserError(f"{named}: expected float16 or float32 vectors [n, width] and n ids, found {vectors.dtype} "
                        f"{list(vectors.shape)} and {ids.dtype} {list(ids.shape)}")
    return Shard(named, ids, vectors)


def part_of(shards: list[Shard], part: int, parts: int) -> list[Shard]:
    """Return the vectors of one of `parts` contiguous parts of all shards. Part sizes differ by at most one."""
    count = sum(len(shard.ids) for shard in shards)
    start, stop = shard_bounds(count, part, parts)
    chosen, offset = [], 0
    for shard in shards:
        inside = slice(max(start - offset, 0), max(stop - offset, 0))
        if len(shard.ids[inside]):
            chosen.append(Shard(shard.path, shard.ids[inside], shard.vectors[inside]))
        offset += len(shard.ids)
    if not chosen:
        raise UserError(f"{shards[0].path}: {count} vectors cannot fill {parts} corpus shards; use fewer")
    return chosen


def name_of(shards: list[Shard], position: int) -> str:
    """Return a name for the vector at `position`, counted through all shards, for error messages."""
    for shard in shards:
        if position < len(shard.ids):
            return f"{shard.path}: the vector of passage {shard.ids[position].decode()!r}"
        position -= len(shard.ids)
    raise IndexError(position)


def shard_bounds(count: int, shard_id: int, num_shards: int) -> tuple[int, int]:
    """Return the first row of a shard and the row after its last.

    Shards are contiguous; their sizes differ by at most one.
    """
    return count * shard_id // num_shards, count * (shard_id + 1) // num_shards


def check_shards(shards: list[Shard], width: int, store: PassageStore, model: str) -> np.ndarray | range:
    """Return the corpus position of every vector of all shards, int64 [total], or a range if they are consecutive.

    Raises UserError, naming the shard, if its width differs from the model's or it has an id that is not in the corpus.
    """
    import numpy as np

    # Each shard by itself
    positions = []
    for shard in shards:
        if shard.vectors.shape[1] != width:
            raise UserError(f"{shard.path}: its vectors have {shard.vectors.shape[1]} dimensions, those of {model} "
                            f"have {width}; give the model that made the shards")
        try:
            start = store.follow(shard.ids)  # the usual case; ten times faster than one lookup per id
            if start is not None:
                shard_positions = range(start, start + len(shard.ids))
            else:
                shard_positions = store.positions(passage_id.decode() for passage_id in shard.ids.tolist())
                if len(unknown := np.flatnonzero(shard_positions < 0)):
                    raise UserError(f"{shard.path}: {len(unknown)} of its {len(shard_positions)} ids are not in the "
                                    f"passages, the first is {bytes(shard.ids[unknown[0]]).decode()!r}; give the corpus that was embedded")
        except UnicodeDecodeError as error:
            raise UserError(f"{shard.path}: its ids are not UTF-8 ({error.reason}); embed this shard again") from error
        positions.append(shard_positions)
        manifest = read_manifest(shard.path) or {"inputs": {}}
        if Path(model).exists() and manifest["inputs"] and not any(is_content(made_from, model) for made_from in manifest["inputs"].values()):
            log.warning("%s: was not made with the model %s", shard.path, model)
    # All shards together
    if all(isinstance(shard_positions, range) for shard_positions in positions) and all(one.stop == two.start for one, two in itertools.pairwise(positions)):
        # The usual case; saves 168 MB per worker for Wikipedia
        together = range(positions[0].start, positions[-1].stop)
        distinct = len(together)
    else:
        together = np.concatenate(positions)
        ascending = bool((together[1:] > together[:-1]).all())
        distinct = len(together) if ascending else len(np.unique(together))
    if distinct < len(together):
        raise UserError(f"{shards[0].path} and {len(shards) - 1} more: {len(together) - distinct} passages are embedded "
                        "more than once; give each shard once")
    if distinct < len(store):
        log.warning("%s: %d of %d passages have no embedding and cannot be retrieved", shards[0].path.parent, len(store) - distinct, len(store))
    return together


def _convert(path: Path) -> Path:
    """Convert a pickled shard to .npy next to it, once.

    The ids file marks it complete; a file `.from` stores the fingerprint.
    """
    converted = path.with_suffix(".npy")
    done, note = ids_path(converted), Path(f"{converted}.from")
    try:
        with exclusive(path):
            content = fingerprint(path)
            noted = note.read_text() if note.is_file() else None
            # Earlier versions wrote no such file.
            current = noted == content if noted else done.is_file() and done.stat().st_mtime >= path.stat().st_mtime
            if not (done.is_file() and current):
                ids, vectors = read_pickled(path)
                log.info("converting %s to %s (once)", path, converted)
                for stale in (note, done):
                    stale.unlink(missing_ok=True)
                save_array(converted, vectors)
                save_ids(done, ids)
            if noted != content:
                with atomic_writer(note) as file:
                    file.write(content.encode())
    except OSError as error:
        raise UserError(f"{converted}: the converted shard cannot be written ({error}); change the permissions of its folder") from error
    return converted


def save_ids(path: Path, ids: list[str]) -> None:
    """Write ids as an array [n] of UTF-8 bytes of equal width, for memory-mapping."""
    import numpy as np

    save_array(path, np.array([passage_id.encode() for passage_id in ids], dtype=np.bytes_))


def save_array(path: Path, values: np.ndarray) -> None:
    import numpy as np

    with atomic_writer(path) as file:
        np.save(file, values, allow_pickle=False)


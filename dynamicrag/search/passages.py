"""The corpus as a memory-mapped file.

Retrieval needs the text of a few passages out of 21 million. The corpus is therefore converted once into an Arrow file,
which HF `datasets` memory-maps and all workers on a machine share. A sorted table of hashed ids (12 bytes per passage)
replaces a dictionary. The store is in `<corpus>.store/` and is built again when the corpus changes.
"""

from __future__ import annotations

import array
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from dynamicrag.files.locks import exclusive
from dynamicrag.files.paths import written_at
from dynamicrag.rows.manifest import fingerprint, is_content
from dynamicrag.rows.row import Doc
from dynamicrag.search.corpus import Passage, read_passages
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import numpy as np

COMPARED = 1 << 16  # ids compared with the corpus per step
# Maximum size of a record batch: small enough to read one passage from, far below Arrow's limit of 2 GB for strings.
BATCH_ROWS, BATCH_CHARACTERS = 1000, 1 << 24


class PassageStore:
    """The passages of a corpus by position, and the positions of passages by id (always a string)."""

    def __init__(self, folder: str | Path):
        """Open the store in `folder`. Raises UserError if its files are damaged."""
        import numpy as np
        import pyarrow
        from datasets import Dataset

        self.folder = Path(folder)
        try:
            self.table = Dataset.from_file(str(self.folder / "passages.arrow"))
            self._keys, self._order = (np.lib.format.open_memmap(self.folder / name, mode="r") for name in ("keys.npy", "order.npy"))
            if not len(self.table) == len(self._keys) == len(self._order):
                raise ValueError("its files have different lengths")
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"{folder}: the passage store is damaged ({error}); remove it and run the stage "
                            "again") from error

    def __len__(self) -> int:
        return len(self.table)

    def slice(self, start: int, stop: int) -> dict[str, list[str]]:
        """Return the columns id, title and text of the passages at start..stop-1."""
        return self.table[start:stop]

    def ids(self, start: int, stop: int) -> list[str]:
        """Return the ids of the passages at start..stop-1, without reading their text."""
        return self.table.select_columns("id")[start:stop]["id"]

    def docs(self, positions: list[int]) -> list[Doc]:
        """Return the passages at these positions as documents of a row."""
        columns = self.table[positions] if positions else {"id": [], "title": [], "text": []}
        return [
            {"id": doc_id, "title": title, "text": text}
            for doc_id, title, text in zip(columns["id"], columns["title"], columns["text"], strict=True)
        ]

    def positions(self, ids: Iterable[str]) -> np.ndarray:
        """Return the position of each id, int64 [n]; -1 for an id that is not in the corpus."""
        import numpy as np

        keys = np.array([_key(passage_id) for passage_id in ids], dtype=np.uint64)
        if len(self) == 0 or len(keys) == 0:
            return np.full(len(keys), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return np.where(self._keys[places] == keys, self._order[places].astype(np.int64), -1)

    def follow(self, ids: np.ndarray) -> int | None:
        """Return the position at which the corpus has exactly these ids (bytes [n]) in this order; None if there is none."""
        import pyarrow
        import pyarrow.compute

        start = int(self.positions([ids[0].decode()])[0]) if len(ids) else -1
        column = self.table.data.column("id").slice(max(start, 0), len(ids))
        if start < 0 or len(column) < len(ids):
            return None
        for offset in range(0, len(ids), COMPARED):  # small steps, so that memory stays in the allocator's pool
            some = column.slice(offset, COMPARED).cast(pyarrow.binary())
            same = pyarrow.compute.call_function("equal", [some, pyarrow.array(ids[offset : offset + COMPARED], pyarrow.binary())])
            if not pyarrow.compute.call_function("all", [same]).as_py():
                return None
        return start


def _key(passage_id: str) -> int:
    """Return a 64-bit hash of an id. Among 21 million ids, the probability of a collision is 1 in 80,000."""
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")


def open_passages(path: str | Path, store: str | Path | None = None) -> PassageStore:
    """Open the store of a corpus. Build it first if it does not exist or the corpus has changed."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: the corpus does not exist; check the path")
    folder = written_at(store or f"{path}.store")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            if not is_content(_made_from(folder), path):
                _build(path, folder, fingerprint(path))
    except OSError as error:
        raise UserError(f"{folder}: the passage store cannot be written ({error}); give --passage_store") from error
    return PassageStore(folder)


def _made_from(folder: Path) -> object:
    """Return the fingerprint of the corpus that a store was built from; None if there is no complete store."""
    try:
        recorded = orjson.loads((folder / "store.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, orjson.JSONDecodeError):
        return None
    return recorded.get("passages") if isinstance(recorded, dict) else None


def _build(path: Path, folder: Path, content: str) -> None:
    import numpy as np
    import pyarrow
    from tqdm import tqdm

    log.info("building the passage store %s (once)", folder)
    building = Path(f"{folder}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    # The passages, in batches
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "title", "text")])
    keys = array.array("Q")
    batch: list[Passage] = []
    characters = 0
    with pyarrow.OSFile(str(building / "passages.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:

        def flush() -> None:
            columns = [pyarrow.array(column, pyarrow.string()) for column in zip(*batch, strict=True)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            batch.clear()

        for passage in tqdm(read_passages(path), desc="passages", unit=" passages", unit_scale=True):
            keys.append(_key(passage[0]))
            batch.append(passage)
            characters += len(passage[1]) + len(passage[2])
            if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
                flush()
                characters = 0
        if batch:
            flush()
    if not keys:
        raise UserError(f"{path}: contains no passage; check the corpus")
    # The index of ids
    unsorted = np.frombuffer(keys, dtype=np.uint64)
    order = np.argsort(unsorted, kind="stable").astype(np.uint32 if len(unsorted) < 1 << 32 else np.uint64)
    np.save(building / "keys.npy", unsorted[order])
    np.save(building / "order.npy", order)
    repeated = np.flatnonzero(unsorted[order][1:] == unsorted[order][:-1])
    if len(repeated):
        first, second = (int(order[repeated[0] + offset]) for offset in (0, 1))
        shown = PassageStore(building).slice(first, first + 1)["id"][0]
        raise UserError(f"{path}: passages {first + 1} and {second + 1} have the same id {shown!r}; ids must be unique")
    # Complete: move the store to its place
    (building / "store.json").write_bytes(orjson.dumps({"passages": content, "count": len(unsorted)}))
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)

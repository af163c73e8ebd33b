"""Files of `retriever.py --corpus_shard i/n`: searches of the parts of one corpus, merged by score."""

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from dynamicrag.rows.manifest import manifest_path, read_manifest, require_manifest
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.stage import UserError

# Arguments that may differ between machines that search parts of a corpus, because each may store its files elsewhere.
MAY_DIFFER = {"corpus_shard", "index_path", "passage_store", "passages", "passages_embeddings", "query", "model_name_or_path"}


def corpus_shard(path: Path) -> tuple[int, int] | None:
    """Return (i, n) if the file holds the search of part i of n of a corpus; None if the whole corpus was searched."""
    named = (read_manifest(path) or {}).get("arguments", {}).get("corpus_shard", "0/1")
    if not isinstance(named, str) or not re.fullmatch(r"\d{1,6}/\d{1,6}", named):
        raise UserError(f"{manifest_path(path)}: not a manifest of retriever.py (corpus_shard is {named!r}); run "
                        "retriever.py again with --overwrite")
    part, parts = map(int, named.split("/"))
    return (part, parts) if parts > 1 else None


def in_corpus_order(paths: list[Path]) -> list[Path]:
    """Return the files of all parts of one corpus, in order.

    Raises UserError if one is missing or was made differently.
    """
    by_part = {corpus_shard(path): path for path in paths}
    parts = max(shard[1] for shard in by_part if shard)
    missing = [f"{part}/{parts}" for part in range(parts) if (part, parts) not in by_part]
    if missing:
        raise UserError(f"{paths[0].parent}: the file of corpus shard {missing[0]} is missing; run retriever.py "
                        f"--corpus_shard {missing[0]}")
    if len(by_part) != parts or len(paths) != parts:
        raise UserError(f"{paths[0].parent}: {len(paths)} files for {parts} corpus shards; restrict --input_files")
    manifests = [require_manifest(by_part[part, parts]) for part in range(parts)]
    for part, manifest in enumerate(manifests):
        changed = [key for key in manifest["arguments"].keys() | manifests[0]["arguments"].keys()
                   if key not in MAY_DIFFER and manifest["arguments"].get(key) != manifests[0]["arguments"].get(key)]
        if sorted(manifest["inputs"].values()) != sorted(manifests[0]["inputs"].values()):
            changed.append("question file, corpus, encoder or embeddings")
        if changed:
            raise UserError(f"{by_part[part, parts]}: its {min(changed)} differs from that of {by_part[0, parts]}; "
                            "run its retriever.py again with the same one")
    return [by_part[part, parts] for part in range(parts)]


def merge_by_score(paths: list[Path], n_docs: int) -> Iterator[Row]:
    """Merge files with the same questions: each row gets its n_docs best documents; equal scores keep the corpus order."""
    # All files have the ids of the first one.
    files = (read_rows(path, needs=STAGE_KEYS["aggregate"].reads, unique=path == paths[0]) for path in paths)
    for rows in zip_longest(*files):
        first: Row | None = rows[0]
        scored: list[tuple[float, Doc]] = []
        for path, row in zip(paths, rows, strict=True):
            if row is None or first is None or row["id"] != first["id"]:
                problem = "no further row" if row is None else f"row {row['id']!r}"
                raise UserError(f"{path}: has {problem}, unlike another corpus shard; run retriever.py again for all "
                                "of them")
            for doc in row["docs"]:
                if (score := doc.get("score")) is None:
                    raise UserError(f"{path}: row {row['id']!r}: a document has no score; run retriever.py again for this corpus shard")
                scored.append((score, doc))
        if first is not None:
            scored.sort(key=lambda pair: -pair[0])
            yield {**first, "docs": [doc for _, doc in scored[:n_docs]]}

"""TREC files and fusion: runs, the exchange format of retrieval systems (`query_id Q0 doc_id rank score tag`), and their qrels.

Fields are separated by white space, a document a line. trec_eval and ir_measures read no rank: they sort by score and
break ties by document id, each in its own direction. Here equal scores are in the order of the rank field.
"""

from __future__ import annotations

import codecs
import math
from array import array
from collections.abc import Iterable, Iterator, KeysView
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import numpy as np

RUN_FIELDS = "query_id Q0 doc_id rank score tag"
FUSION_CONSTANT = 60  # a document at rank r of a ranking is worth 1 / (60 + r)
MOST = {int: 2**31 - 1, float: 3.402823466385289e38}  # what trec_eval, and a score in float32, can hold
QRELS_FIELDS = "query_id iteration doc_id relevance"


class Run:
    """A run file, left on disk: of each query only the places of its lines are kept.

    Raises UserError naming file and line for a missing or empty file, a line without six fields, invalid UTF-8, a rank
    that is no integer and a score that is no finite number. That a query names a document twice shows in ranking().
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._places: dict[str, array] = {}  # first line, offset, bytes of each stretch of lines, one after the other
        query_id = None
        for number, offset, line, fields in _lines(self.path, RUN_FIELDS):
            _rank_and_score(self.path, number, fields)
            if fields[0] != query_id:
                query_id = fields[0]
                self._places.setdefault(query_id, array("q")).extend((number, offset, 0))
            place = self._places[query_id]
            place[-1] = offset + len(line) - place[-2]

    @property
    def query_ids(self) -> KeysView[str]:
        return self._places.keys()

    def check_questions(self, query_ids: Iterable[str], asked_in: str, without: str) -> None:
        """Check once that these, the questions of the file `asked_in`, are the run's; only their number is kept.

        Raises UserError where it has none of them. Where it lacks some, how many is logged, and what becomes of those
        `without` a ranking.
        """
        count = missing = 0
        for query_id in query_ids:
            count += 1
            missing += query_id not in self._places
        if missing == count:
            raise UserError(f"{self.path}: has none of the {count} questions of {asked_in}; it is a run of others")
        if missing:
            log.warning("%s: %d of %d questions have no ranking in it; %s", self.path, missing, count, without)

    def ranking(self, query_id: str) -> list[tuple[str, float]]:
        """(document id, score) best first, equal scores by rank, then as in the file; empty for an unknown query."""
        found: dict[str, int] = {}
        ranked = []
        place = self._places.get(query_id, ())
        with _open(self.path) as file:
            for first, offset, size in zip(place[::3], place[1::3], place[2::3], strict=True):
                file.seek(offset)
                for number, line in enumerate(file.read(size).split(b"\n"), start=first):
                    if not (fields := line.decode().split()):
                        continue
                    doc_id = fields[2]
                    if doc_id in found:
                        raise UserError(f"{self.path}:{number}: document {doc_id!r} of query {query_id!r} is already "
                                        f"on line {found[doc_id]}; a run names a document once a query")
                    found[doc_id] = number
                    ranked.append((doc_id, *_rank_and_score(self.path, number, fields)))
        ranked.sort(key=lambda entry: (-entry[2], entry[1]))
        return [(doc_id, score) for doc_id, _, score in ranked]


def is_run(path: str | Path) -> bool:
    """Whether a file is a TREC run and not rows, which begin with { or [. Missing and empty files read_rows refuses."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    return bool(head) and not head.startswith((b"{", b"["))


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance (1 or more) by query id and document id; a document judged irrelevant is as one that was not judged.

    Raises UserError naming file and line for what is not a qrels file, and for a document with two relevances.
    """
    path = Path(path)
    judged: dict[str, dict[str, int]] = {}
    for number, _, _, (query_id, _, doc_id, relevance) in _lines(path, QRELS_FIELDS):
        value = _parse(int, path, number, "relevance", relevance)
        if judged.setdefault(query_id, {}).setdefault(doc_id, value) != value:
            raise UserError(f"{path}:{number}: document {doc_id!r} of query {query_id!r} is judged {value} here and "
                            f"{judged[query_id][doc_id]} above; keep one of the lines")
    for query_id in list(judged):
        judged[query_id] = {doc_id: value for doc_id, value in judged[query_id].items() if value > 0}
        if not judged[query_id]:
            del judged[query_id]
    return judged


def write_run(path: str | Path, rows: Iterable[dict], key: str, tag: str) -> int:
    """Write the documents of all rows by falling `key`, atomically; returns how many there were.

    Ranks count from 1; equal scores stay in the row's order, which Run reads back and other readers may not keep.
    Raises UserError naming the row for an id with white space, a document twice or without `key`; and for no document.
    """
    count = 0
    with atomic_writer(path) as file:
        for line in _run_lines(path, rows, key, tag):
            file.write(line.encode())
            count += 1
        if not count:
            raise UserError(f"{path}: no row has a document, and a run without a line is none")
    return count


def _run_lines(path: str | Path, rows: Iterable[dict], key: str, tag: str) -> Iterator[str]:

    def one_word(what: str, text: str, remedy: str) -> None:
        if text.split() != [text]:
            raise UserError(f"{path}: {what} {text!r}: is empty or holds white space, which separates the fields of a "
                            f"TREC run; {remedy}")

    one_word("tag", tag, "give another")
    for row in rows:
        where = f"row {row['id']!r}"
        one_word("row", row["id"], "give it another id")
        seen = set()
        for doc in row["docs"]:
            one_word(f"{where}, document", doc["id"], "give it another id in the corpus")
            if doc.get(key) is None:
                raise UserError(f"{path}: {where}, document {doc['id']!r}: has no {key}, by which a run is ranked; "
                                "retriever.py writes score, reranker.py rerank_score")
            if doc["id"] in seen:
                raise UserError(f"{path}: {where}, document {doc['id']!r}: is there twice; a run names a document once "
                                "a query")
            seen.add(doc["id"])
        for rank, doc in enumerate(sorted(row["docs"], key=lambda doc: -doc[key]), start=1):
            yield f"{row['id']} Q0 {doc['id']} {rank} {float(doc[key])!r} {tag}\n"


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path, form: str) -> Iterator[tuple[int, int, bytes, list[str]]]:
    """(line number from 1, offset, line, fields) of every line that is not blank, of as many fields as `form` has."""
    offset, wanted, empty = 0, len(form.split()), True
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, offset = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            try:
                fields = line.decode().split()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: invalid UTF-8 ({error.reason}); TREC is plain text") from error
            if fields:
                if len(fields) != wanted:
                    raise UserError(f"{path}:{number}: expected the {wanted} fields `{form}`, found {len(fields)}")
                empty = False
                yield number, offset, line, fields
            offset += len(line)
    if empty:
        raise UserError(f"{path}: the file is empty; expected lines of `{form}`")


def _rank_and_score(path: Path, number: int, fields: list[str]) -> tuple[int, float]:
    return _parse(int, path, number, "rank", fields[3]), _parse(float, path, number, "score", fields[4])


def _parse(kind: type, path: Path, number: int, field: str, text: str) -> float:
    try:
        value = kind(text)
    except ValueError:  # of an integer, also where it has thousands of digits
        value = math.nan
    if not abs(value) <= MOST[kind]:
        expected = "an integer" if kind is int else "a finite number"
        raise UserError(f"{path}:{number}: field '{field}': expected {expected}, found {text!r}{'' if value != value else ', which is too large'}")
    return value


def fuse(rankings: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal-rank fusion (Cormack et al., 2009) of rankings, [rows, any] positions each, -1 for none.

    Returns scores float32 and positions int64 [rows, k], best first, equal scores in the order of the corpus; -1
    where there are fewer than k documents.
    """
    import numpy as np

    scores = np.zeros((len(rankings[0]), k), dtype=np.float32)
    positions = np.full(scores.shape, -1, dtype=np.int64)
    for row, ranked in enumerate(zip(*rankings, strict=True)):
        worth: dict[int, float] = {}
        for ranking in ranked:
            for rank, position in enumerate(ranking[ranking >= 0].tolist(), start=1):
                worth[position] = worth.get(position, 0.0) + 1 / (FUSION_CONSTANT + rank)
        best = sorted(worth, key=lambda position: (-worth[position], position))[:k]
        positions[row, : len(best)] = best
        scores[row, : len(best)] = [worth[position] for position in best]
    return scores, positions

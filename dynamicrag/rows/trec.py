"""TREC files: runs (`query_id Q0 doc_id rank score tag`), which retrieval systems exchange, and qrels; rank fusion.

Fields are separated by white space, with one document per line. trec_eval and ir_measures ignore the rank: they sort by
score and break ties by document id, each in its own direction. Here the rank field breaks ties.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import numpy as np

RUN_FIELDS = "query_id Q0 doc_id rank score tag"
FUSION_CONSTANT = 60  # a document at rank r of a ranking contributes 1 / (60 + r)
MAX_VALUES = {int: 2**31 - 1, float: 3.402823466385289e38}  # the largest values of trec_eval's integers and of float32
Number = TypeVar("Number", int, float)
QRELS_FIELDS = "query_id iteration doc_id relevance"


@dataclass(slots=True)
class _Block:
    """Consecutive lines of one query: the number of the first line, and the place of the lines in the file, in bytes."""

    first_line: int
    start: int
    end: int = 0


class Run:
    """A run file that stays on disk. Memory holds only the positions of each query's lines in the file.

    Raises UserError, naming file and line, for a missing or empty file, a line without six fields, invalid UTF-8, a
    rank that is not an integer and a score that is not a finite number. A document that is listed twice for a query is
    reported by ranking().
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._blocks: dict[str, list[_Block]] = {}
        query_id, block = "", _Block(0, 0)  # no field is empty
        for number, offset, line, fields in _lines(self.path, RUN_FIELDS):
            _rank_and_score(self.path, number, fields)
            if fields[0] != query_id:
                query_id, block = fields[0], _Block(number, offset)
                self._blocks.setdefault(query_id, []).append(block)
            block.end = offset + len(line)

    @property
    def query_ids(self) -> KeysView[str]:
        return self._blocks.keys()

    def check_questions(self, query_ids: Iterable[str], asked_in: str, without: str) -> None:
        """Check that the run has rankings for the questions of the file `asked_in`. The ids are streamed, not stored.

        Raises UserError if the run has a ranking for none of them. If some are missing, a warning gives their number
        and `without`, which says what happens to questions without a ranking.
        """
        count = missing = 0
        for query_id in query_ids:
            count += 1
            missing += query_id not in self._blocks
        if missing == count:
            raise UserError(f"{self.path}: has none of the {count} questions of {asked_in}; give the run of this file")
        if missing:
            log.warning("%s: %d of %d questions have no ranking in it; %s", self.path, missing, count, without)

    def ranking(self, query_id: str) -> list[tuple[str, float]]:
        """Return (document id, score) pairs, best first; an empty list for an unknown query.

        Equal scores are ordered by rank, then by their order in the file. Raises UserError for a document listed twice.
        """
        first_lines: dict[str, int] = {}
        ranked = []
        with _open(self.path) as file:
            for block in self._blocks.get(query_id, ()):
                file.seek(block.start)
                for number, line in enumerate(file.read(block.end - block.start).split(b"\n"), start=block.first_line):
                    if not (fields := line.decode().split()):
                        continue
                    doc_id = fields[2]
                    if doc_id in first_lines:
                        raise UserError(f"{self.path}:{number}: document {doc_id!r} of query {query_id!r} is already "
                                        f"on line {first_lines[doc_id]}; remove one of the lines")
                    first_lines[doc_id] = number
                    ranked.append((doc_id, *_rank_and_score(self.path, number, fields)))
        ranked.sort(key=lambda entry: (-entry[2], entry[1]))
        return [(doc_id, score) for doc_id, _, score in ranked]


def is_run(path: str | Path) -> bool:
    """Return whether a file is a TREC run, not rows, which begin with { or [. False for a missing or an empty file."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    return bool(head) and not head.startswith((b"{", b"["))


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Return the relevance by query id and document id. Documents judged irrelevant (0 or less) are left out.

    Raises UserError, naming file and line, for a file that is not in qrels format and for a document with two different
    relevances.
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


def write_run(path: str | Path, rows: Iterable[Mapping], key: str, tag: str) -> int:
    """Write the documents of all rows as a run, ordered by descending `key`, atomically.

    Returns the number of documents. Ranks start at 1. Equal scores keep the row's order; Run preserves this order,
    other readers may not. Raises UserError, naming the row, for an id that contains white space, a repeated document
    and a document without `key`. Raises UserError if no row has a document.
    """
    count = 0
    with atomic_writer(path) as file:
        for line in _run_lines(path, rows, key, tag):
            file.write(line.encode())
            count += 1
        if not count:
            raise UserError(f"{path}: no row has a document, so the run would be empty; give rows with documents")
    return count


def _run_lines(path: str | Path, rows: Iterable[Mapping], key: str, tag: str) -> Iterator[str]:

    def one_word(what: str, text: str, remedy: str) -> None:
        if text.split() != [text]:
            raise UserError(f"{path}: {what} {text!r}: is empty or contains white space, which separates the fields of "
                            f"a TREC run; {remedy}")

    one_word("tag", tag, "give another")
    for row in rows:
        where = f"row {row['id']!r}"
        one_word("row", row["id"], "give it another id")
        seen = set()
        for doc in row["docs"]:
            one_word(f"{where}, document", doc["id"], "give it another id in the corpus")
            if doc.get(key) is None:
                raise UserError(f"{path}: {where}, document {doc['id']!r}: has no {key}, which determines the rank; "
                                "retriever.py writes score, reranker.py writes rerank_score")
            if doc["id"] in seen:
                raise UserError(f"{path}: {where}, document {doc['id']!r}: is listed twice; remove one of the two")
            seen.add(doc["id"])
        for rank, doc in enumerate(sorted(row["docs"], key=lambda doc: -doc[key]), start=1):
            yield f"{row['id']} Q0 {doc['id']} {rank} {float(doc[key])!r} {tag}\n"


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _lines(path: Path, form: str) -> Iterator[tuple[int, int, bytes, list[str]]]:
    """Yield (1-based line number, offset, line, fields) for every non-blank line. Each must have the fields of `form`."""
    offset, wanted, empty = 0, len(form.split()), True
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, offset = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            try:
                fields = line.decode().split()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: invalid UTF-8 ({error.reason}); save it as UTF-8") from error
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


def _parse(kind: type[Number], path: Path, number: int, field: str, text: str) -> Number:
    try:
        value = kind(text)
    except ValueError:  # int() also refuses thousands of digits
        value = None
    if value is None or not abs(value) <= MAX_VALUES[kind]:
        expected = "an integer" if kind is int else "a finite number"
        reason = "" if value is None or value != value else ", which is too large"
        raise UserError(f"{path}:{number}: field '{field}': expected {expected}, found {text!r}{reason}")
    return value


def fuse(rankings: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Fuse rankings by reciprocal rank (Cormack et al., 2009).

    `rankings` holds one array of positions [rows, any] per ranking, with -1 for no document. Returns scores (float32)
    and positions (int64), both [rows, k], best first; equal scores are in corpus order. The position is -1 if there are
    fewer than k documents.
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

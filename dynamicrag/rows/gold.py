"""Gold documents, gold answers and retrieved documents of each question, as the retrieval metrics need them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.rows.seen import Seen
from dynamicrag.rows.stored import Stored
from dynamicrag.rows.trec import Run, is_run
from dynamicrag.stage import UserError, log

Qrels = dict[str, dict[str, int]]  # as returned by trec.read_qrels
GOLD_ID_KEYS = ("passage_id", "psg_id", "id")  # keys in positive_ctxs: DPR's NQ uses the first, its TriviaQA the second
WIKIPEDIA = "wiki:"  # prefix that DPR adds to passage ids in some of its files only


class Question(NamedTuple):
    """The gold data that the documents of a question are scored against; fields are empty if not known."""

    group: str
    gold: dict[str, int]  # relevance (at least 1) by document id
    answers: list[str]  # none blank
    text: str = ""


Ranked = tuple[str, Question, list[Doc]]  # question id, gold data, ranked documents


def gold_documents(row: Row, path: str) -> dict[str, int]:
    """Return relevance 1 for each id in the row's gold_docs or, without that key, in DPR's positive_ctxs.

    Ids become strings. The ids are spelled as in the row's documents (see as_documents). Raises UserError naming file,
    row and key.
    """
    key = "gold_docs" if row.get("gold_docs") is not None else "positive_ctxs"
    gold_ids, expected = row.get(key) or [], "document ids"
    if key == "positive_ctxs" and isinstance(gold_ids, list):
        expected = f"objects with {' or '.join(GOLD_ID_KEYS)}"
        contexts = (doc if isinstance(doc, dict) else {} for doc in gold_ids)
        gold_ids = [next((doc[name] for name in GOLD_ID_KEYS if doc.get(name) is not None), None) for doc in contexts]
    if not isinstance(gold_ids, list) or not all(type(doc_id) in (str, int) for doc_id in gold_ids):
        raise UserError(f"{path}: row {row['id']}: key '{key}': expected a list of {expected}; correct or remove it")
    return as_documents(dict.fromkeys(map(str, gold_ids), 1), document_ids(row))


def document_ids(row: Row) -> set[str]:
    """Return the ids of the row's documents and of the documents that its answer was generated from."""
    chosen = row.get("final_docs")
    return {doc["id"] for doc in row.get("docs", ())} | {str(doc_id) for doc_id in (chosen if isinstance(chosen, list) else ())}


def as_documents(gold: dict[str, int], doc_ids: set[str]) -> dict[str, int]:
    """Return the gold documents with ids spelled as in `doc_ids`: with or without DPR's prefix `wiki:`."""
    if not gold or gold.keys() <= doc_ids:
        return gold
    respelled: dict[str, int] = {}
    for gold_id, relevance in gold.items():
        other = gold_id.removeprefix(WIKIPEDIA) if gold_id.startswith(WIKIPEDIA) else f"{WIKIPEDIA}{gold_id}"
        respelled[other if gold_id not in doc_ids and other in doc_ids else gold_id] = relevance
    return respelled


class Matches:
    """Count, per group, the gold documents and how many of them are among the documents of their rows."""

    def __init__(self):
        self._gold: Counter[str] = Counter()
        self._matched: Counter[str] = Counter()

    def add(self, group: str, gold: int, matched: int) -> None:
        self._gold[group] += gold
        self._matched[group] += matched

    def warn(self, path: str) -> None:
        """Log a warning for the groups none of whose gold ids match a document: ids of another corpus look like poor retrieval."""
        foreign = {group: count for group, count in self._gold.items() if count and not self._matched[group]}
        if foreign:
            where = ", ".join(f"{count} of {group or 'rows without a group'}" for group, count in sorted(foreign.items()))
            log.warning("%s: %d gold document ids match no document of any row (%s); use the ids of the searched "
                        "corpus",
                        path, sum(foreign.values()), where)


def needed_documents(row: Row, path: str) -> set[str] | None:
    """Return the ids of the documents that a question needs; None if the row does not say.

    An empty gold_docs means that the question needs no document. An empty positive_ctxs says nothing. Raises UserError
    as gold_documents does.
    """
    known = row.get("gold_docs") is not None or row.get("positive_ctxs")
    return set(gold_documents(row, path)) if known else None


def question_of(row: Row, path: str, group_by: str, qrels: Qrels | None, asked: Question | None = None) -> Question:
    """Return the gold data of a row. Missing parts come from `asked`, the same question in the evaluation file."""
    asked = asked or Question("", {}, [])
    gold = gold_documents(row, path) if qrels is None else qrels.get(row["id"], {})
    answers = [answer for answer in row.get("answers") or () if answer.strip()]
    group = row.get(group_by)
    return Question(
        asked.group if group is None else str(group), as_documents(gold or asked.gold, document_ids(row)), answers or asked.answers, row["question"]
    )


def read_questions(path: str, group_by: str, qrels: Qrels | None, dataset: str | None) -> Stored[Question]:
    """Return the questions of an evaluation file by id, in file order.

    Raises UserError as read_rows and gold_documents do.
    """
    asked: Stored[Question] = Stored(lambda question: Question(*question))
    for row in read_rows(path, dataset=dataset):
        asked.add(row["id"], list(question_of(row, path, group_by, qrels)))
    return asked


def ranked_questions(
    path: str, group_by: str, qrels: Qrels | None, dataset: str | None, asked: Stored[Question] | None, asked_in: str | None
) -> Iterator[Ranked]:
    """Yield every question of a results file with its documents, then the remaining questions of `asked` without documents.

    `asked` holds the questions of the evaluation file `asked_in`; both are None if there is no evaluation file. Raises
    UserError for a TREC run without an evaluation file, and for a row that is not in `asked`.
    """
    seen, listed = Seen(), 0  # the questions of the results, and how many of the expected ones
    matches = Matches()
    expected = asked if asked is not None else qrels or {}

    # What each question adds
    def ranked(row_id: str, question: Question, docs: list[Doc]) -> Ranked:
        if docs and question.gold:
            matches.add(question.group, len(question.gold), len(question.gold.keys() & {doc["id"] for doc in docs}))
        return row_id, question, docs

    def note(row_id: str) -> None:
        if asked is not None and row_id not in asked:
            raise UserError(f"{path}: row {row_id} is not in {asked_in}; give the results of the same questions")
        nonlocal listed
        if expected:
            listed += seen.add(row_id) is None and row_id in expected

    # The results
    if is_run(path):
        if asked is None:
            raise UserError(f"{path}: is a TREC run, which contains no questions; give them with --eval_file")
        run = Run(path)
        for row_id in run.query_ids:
            note(row_id)
    else:
        run = None
        said = asked.view(lambda question: {"question": Question(*question).text}) if asked else None
        for row in read_rows(path, STAGE_KEYS["evaluate_retrieval"].reads, dataset, asked=said):
            note(row["id"])
            yield ranked(row["id"], question_of(row, path, group_by, qrels, (asked or {}).get(row["id"])), row["docs"])
    # Questions that the results lack
    if missing := len(expected) - listed:
        means = "they count as zero" if asked is not None else "they are not counted without --eval_file"
        log.warning("%s: %d of %d questions are missing; %s", path, missing, len(expected), means)
    for row_id, question in (asked or {}).items():
        # Runs are read in the order of the evaluation file, so that all are resampled alike. They have no text to
        # search for answers.
        if run is not None:
            # Their texts are not known, and no answer is searched for in them.
            docs: list[Doc] = [{"id": doc_id, "title": "", "text": "", "score": score} for doc_id, score in run.ranking(row_id)]
            yield ranked(row_id, question._replace(answers=[], gold=as_documents(question.gold, {doc["id"] for doc in docs})), docs)
        elif seen.add(row_id) is None:
            yield row_id, question, []
    matches.warn(path)

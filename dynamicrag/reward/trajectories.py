"""Rewarded trajectories, as the stages read them that make training sets of them: construct_dpo, construct_best_of_n and construct_kto."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from dynamicrag.reward.terms import correctness
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.rows.shown import labelled_documents
from dynamicrag.stage import UserError, log


def bounds(text: str) -> tuple[float, float]:
    """Parse LO,HI with 0 <= LO <= HI <= 1. Raises ArgumentTypeError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"expected LO,HI with 0 <= LO <= HI <= 1, such as 0.01,0.99, found {text!r}")
    return low, high


def add_keep_mean_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--keep-mean", metavar="LO,HI", type=bounds, default=(0.0, 1.0),
        help="use only questions whose trajectories have a mean correctness (em) in this range, such as 0.01,0.99: "
        "constant success or failure says nothing about the documents",
    )


def read_trajectories(path: str, needs: tuple[str, ...], reject: Callable | None, defaults: Counter) -> Iterator[Row]:
    """Yield the rows of a file, and count in `defaults` those that lack docs_shown or score_terms.

    Raises UserError if sampling showed more documents of a row than were labelled.
    """
    for row in read_rows(path, needs, reject=reject, complete=partial(complete, defaults=defaults)):
        labelled = labelled_documents(row)
        if labelled is not None and row["docs_shown"] > labelled:
            raise UserError(
                f"{path}: row {row['id']}: docs_shown is {row['docs_shown']}, but process_training_data.py labelled "
                f"{labelled} documents; sample again with --topn {labelled}, or label again with --n_docs "
                f"{row['docs_shown']}"
            )
        yield row


def complete(row: Row, defaults: Counter) -> None:
    """Add docs_shown and score_terms if a row of another tool lacks them, and count the rows in `defaults`."""
    if row.get("docs_shown") is None and "docs" in row:
        row["docs_shown"] = min(len(row["docs"]), labelled_documents(row) or len(row["docs"]))
        defaults["docs_shown"] += 1
    responses, answers = row.get("responses"), row.get("answers") or []
    readable = isinstance(responses, list) and all(isinstance(response, str) for response in responses)
    if row.get("score_terms") is None and readable and any(map(str.strip, answers)):
        row["score_terms"] = [{"em": correctness(response, row, "exact")} for response in responses]
        defaults["score_terms"] += 1


def warn_of_defaults(defaults: Counter, path: str) -> None:
    """Log the values used for keys that rows of other tools lack."""
    taken = {
        "docs_shown": "the labelled documents, or else all documents, are used",
        "score_terms": "em is computed from answers and responses, and no other term is available",
    }
    for key, what in taken.items():
        if defaults[key]:
            log.warning("%s: %d rows have no %s: %s", path, defaults[key], key, what)

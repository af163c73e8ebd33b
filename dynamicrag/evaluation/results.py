"""Read result files for scoring: each question once, answered or not, completed from its evaluation file."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynamicrag.evaluation.answers import MISSING
from dynamicrag.llm.completion import CLOSES, OPENS, after_reasoning
from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row, fail_unanswered
from dynamicrag.rows.seen import Seen
from dynamicrag.rows.stored import Stored
from dynamicrag.stage import UserError, log


def read_asked(path: str, group_by: str, dataset: str | None) -> Stored[dict[str, Any]]:
    """Return the questions of an evaluation file by id, in file order, with the keys needed for scoring (not the documents).

    Raises UserError as read_rows does, including for a repeated id.
    """
    asked: Stored[dict[str, Any]] = Stored(dict)
    for row in read_rows(path, dataset=dataset):
        needed = needed_documents(row, path)
        keys = ("question", "retrieved_question", "dataset", "answers", "qa_pairs", "choices", group_by)
        fields = {key: row[key] for key in keys if key in row}
        asked.add(row["id"], fields if needed is None else {**fields, "gold_docs": sorted(needed)})
    return asked


def result_rows(
    results_file: str, remain_file: str | None, eval_file: str | None, dataset: str | None,
    asked: Mapping[str, Mapping[str, Any]] | None = None, repeated: Counter[str] | None = None,
) -> Iterable[Row]:
    """Yield answered rows, then rows of the remain file, then missing questions. The first row of each question counts.

    `asked` is the result of read_asked() for eval_file, if it was read before. `repeated` counts repeated rows, by
    results_file. Reasoning is removed from responses. Raises UserError for a row whose id or question is not in the
    evaluation file, because results of other questions would look like wrong answers, and for a file without any
    response.
    """
    if asked is None and eval_file:
        asked = read_asked(eval_file, "dataset", dataset)
    # Find the remain file
    manifest = read_manifest(results_file)
    if remain_file is None and manifest and len(manifest["outputs"]) > 1:
        named = Path(manifest["outputs"][1])
        remain_file = str(named if named.exists() else Path(results_file).with_name(named.name))
    if remain_file is None and eval_file is None:
        log.warning("%s: no manifest names its remain file, and --eval_file is not given; unanswered questions are "
                    "not counted", results_file)
    # Answered rows and rows of the remain file
    repeated = Counter() if repeated is None else repeated
    seen, first_repeat = Seen(), None
    reasoned, responded, without_response = 0, False, None
    for path in filter(None, [results_file, remain_file]):
        # An output file is empty if all or none of the questions failed.
        if _holds_no_row(Path(path)) and (path != results_file or manifest):
            continue
        for row in read_rows(path, dataset=dataset, unique=False, asked=asked):
            if asked is not None and row["id"] not in asked:
                raise UserError(f"{path}: row {row['id']} is not in {eval_file}; give the evaluation file of these "
                                "results")
            if asked is not None and _plain(row["question"]) != _plain(asked[row["id"]]["question"]):
                raise UserError(f"{path}: row {row['id']} has a different question in {eval_file}; several data sets use the "
                                "same ids, so give the evaluation file of these results")
            responded = responded or (path == results_file and "response" in row)
            if "response" not in row and "error" not in row:
                without_response = without_response or row
            elif isinstance(response := row.get("response"), str) and (OPENS.search(response) or CLOSES.search(response)):
                reasoned += 1
                row = _without_reasoning(row, response)
            if seen.add(row["id"]) is None:
                yield row
            else:
                repeated[results_file] += 1
                first_repeat = first_repeat or f"{row['id']} in {path}"
    # Say what was found
    if without_response:
        told = f"keys of row {without_response['id']}: {', '.join(sorted(without_response))}"
        if not responded:
            raise UserError(f"{results_file}: no row has the key 'response' ({told}); rename the key of the answer to "
                            "it, or score retrieved documents with evaluate_retrieval.py")
        log.warning("%s: some rows have neither 'response' nor 'error' and count as wrong (%s)", results_file, told)
    if reasoned:
        log.warning("%s: %d responses contain reasoning; the text after it is scored", results_file, reasoned)
    if first_repeat:
        log.warning("%s: %d rows repeat a question and are not counted; the first is %s",
                    results_file, repeated[results_file], first_repeat)
    # Missing questions
    if asked is not None and len(seen) < len(asked):
        log.warning("%s: %d of %d questions are missing; they count as wrong", results_file, len(asked) - len(seen), len(asked))
        for row in read_rows(eval_file, dataset=dataset) if eval_file else ():
            if seen.add(row["id"]) is None:
                yield fail_unanswered(row, MISSING)


def _plain(question: str) -> str:
    return " ".join(question.split()).casefold()


def _without_reasoning(row: Row, response: str) -> Row:
    """Return the row with its reasoning removed; as unanswered if nothing follows the reasoning."""
    answer = after_reasoning(response)
    if answer:
        return {**row, "response": answer}
    return {**fail_unanswered(row, "no answer in the response: it ends within its reasoning"), "usage": row.get("usage") or {}}


def _holds_no_row(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 16 and path.read_bytes().strip() in (b"[]", b"")

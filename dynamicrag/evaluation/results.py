"""Result files read for scoring: each question once, with what its evaluation file says of it, answered or not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from dynamicrag.evaluation.answers import MISSING
from dynamicrag.llm.completion import CLOSES, OPENS, after_reasoning
from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.records import Row, fail_unanswered, read_rows
from dynamicrag.stage import UserError, log


def read_asked(path: str, group_by: str, dataset: str | None) -> dict[str, Row]:
    """The questions asked by id, in the order of the file, each with what scores it: everything but its documents' texts.

    Raises UserError as read_rows does, for a question asked twice too.
    """
    asked = {}
    for row in read_rows(path, dataset=dataset):
        needed = needed_documents(row, path)
        kept = {key: row[key] for key in ("question", "retrieved_question", "dataset", "answers", "qa_pairs", "choices", group_by) if key in row}
        asked[row["id"]] = kept if needed is None else {**kept, "gold_docs": sorted(needed)}
    return asked


def result_rows(
    results_file: str, remain_file: str | None, eval_file: str | None, dataset: str | None,
    asked: Mapping[str, Row] | None = None, repeated: Counter[str] | None = None,
) -> Iterable[Row]:
    """Answered rows, then those of the remain file, then what else was asked, each question once: its first row counts.

    `asked` is what read_asked() gives of eval_file, if it was read already. Rows of a question that came before are counted
    in `repeated`, by results_file. Of a response with reasoning, what follows the reasoning is scored. Raises UserError for a row
    that is not among those asked, by id or by question: results of another file would look like missing or wrong answers;
    and for a file none of whose rows has a response.
    """
    if asked is None and eval_file:
        asked = read_asked(eval_file, "dataset", dataset)
    manifest = read_manifest(results_file)
    if remain_file is None and manifest and len(manifest["outputs"]) > 1:
        named = Path(manifest["outputs"][1])
        remain_file = str(named if named.exists() else Path(results_file).with_name(named.name))
    if remain_file is None and eval_file is None:
        log.warning("%s: no manifest names its remain file and no --eval_file was given: questions that got no answer are "
                    "not counted", results_file)
    repeated = Counter() if repeated is None else repeated
    seen, first_repeat = set(), None
    reasoned, responded, without_response = 0, False, None
    for path in filter(None, [results_file, remain_file]):
        if _holds_no_row(Path(path)) and (path != results_file or manifest):  # of a run all or none of whose rows failed
            continue
        for row in read_rows(path, dataset=dataset, unique=False, asked=asked):
            if asked is not None and row["id"] not in asked:
                raise UserError(f"{path}: row {row['id']} is not in {eval_file}; these are not the answers to its questions")
            if asked is not None and _plain(row["question"]) != _plain(asked[row["id"]]["question"]):
                raise UserError(f"{path}: row {row['id']} answers another question than that of {eval_file}; several data sets call their "
                                "rows so: give the evaluation file of this one")
            responded = responded or (path == results_file and "response" in row)
            if "response" not in row and "error" not in row:
                without_response = without_response or row
            elif isinstance(row.get("response"), str) and (OPENS.search(row["response"]) or CLOSES.search(row["response"])):
                reasoned += 1
                row = _without_reasoning(row)
            if row["id"] in seen:
                repeated[results_file] += 1
                first_repeat = first_repeat or f"{row['id']} in {path}"
            else:
                seen.add(row["id"])
                yield row
    if without_response:
        told = f"of row {without_response['id']}: {', '.join(sorted(without_response))}"
        if not responded:
            raise UserError(f"{results_file}: no row has a 'response' (the keys {told}); call the key of the answer so, and score "
                            "retrieved documents with evaluate_retrieval.py")
        log.warning("%s: some rows have neither 'response' nor 'error', and count as wrong (the keys %s)", results_file, told)
    if reasoned:
        log.warning("%s: %d responses hold a model's reasoning; what follows it is scored", results_file, reasoned)
    if first_repeat:
        log.warning("%s: answered again and not counted: %d rows, %s the first; the first row of a question counts",
                    results_file, repeated[results_file], first_repeat)
    if asked is not None and len(seen) < len(asked):
        log.warning("%s: %d of %d questions are missing; they count as wrong", results_file, len(asked) - len(seen), len(asked))
        for row in read_rows(eval_file, dataset=dataset):
            if row["id"] not in seen:
                yield fail_unanswered(row, MISSING)


def _plain(question: str) -> str:
    return " ".join(question.split()).casefold()


def _without_reasoning(row: Row) -> Row:
    """The row with what its response says after the reasoning; unanswered if that is nothing."""
    answer = after_reasoning(row["response"])
    if answer:
        return {**row, "response": answer}
    return {**fail_unanswered(row, "no answer in the response: it ends within its reasoning"), "usage": row.get("usage") or {}}


def _holds_no_row(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 16 and path.read_bytes().strip() in (b"[]", b"")

"""The data sets: the instruction, the metric, and the answer length of each.

To add a data set, add a line to TASKS.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dynamicrag.rows.choices import gold_label, shown_choices
from dynamicrag.stage import log


@dataclass(frozen=True)
class Task:
    """One data set.

    instruction: text that tells the generator the form of the answer.
    metric: default metric of evaluate.py (dynamicrag.evaluation.metrics).
    max_tokens: maximum length of a generated answer in tokens.
    names: other names of the data set, and the exact names (without suffix) of its published files.
    prefixes: prefixes of row ids that belong to the data set.
    whole_answers: answers that share no token with any other answer under f1, as in the data set's official script.
    """

    instruction: str
    metric: str
    max_tokens: int
    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    whole_answers: tuple[str, ...] = ()


SHORT = "Answer with a few words only, no sentence."
VERIFY = "Judge the claim. Answer with exactly one of: SUPPORTS, REFUTES, NOT ENOUGH INFO."
LONG = "Answer with one or two paragraphs."
AMBIGUOUS = "The question can be read in several ways. Answer in one short paragraph that covers every reading."
CHOICE = "Answer with the letter of the right choice only."
YES_NO = ("yes", "no", "noanswer")  # from HotpotQA's hotpot_evaluate_v1.py, which 2WikiMultihopQA adopted

# The metric is the one that the authors of the data set, or later work, report first. Bamboogle: accuracy by equality
# (Press et al. 2023). MuSiQue: answer F1 (Trivedi et al. 2022). WebQuestions: exact match in open-domain question
# answering.
TASKS: dict[str, Task] = {
    "nq": Task(SHORT, "em", 32, ("nq_open", "natural_questions", "nq_top500"), ("nq_",)),
    "triviaqa": Task(SHORT, "em", 32, ("trivia", "triviaqa_top500", "triviaqa_test_w_gs"), ("tc_", "triviaqa_")),
    "webq": Task(SHORT, "em", 32, ("web_questions",), ("webq_",)),
    "hotpotqa": Task(SHORT, "em", 32, ("hotpot",), ("hotpotqa_",), YES_NO),
    "2wikimqa": Task(SHORT, "em", 32, ("2wikimultihopqa", "2wikimultihop", "2wiki"), ("2wikimqa_", "2wikimultihopqa_"), YES_NO),
    "musique": Task(SHORT, "f1", 32, ("musique_ans",), ("musique_",)),
    "bamboogle": Task(SHORT, "em", 32, (), ("bamboogle_",)),
    "svamp": Task(SHORT, "em", 16, (), ("svamp_",)),
    "popqa": Task(SHORT, "match", 32, ("popqa_longtail", "popqa_longtail_w_gs"), ("popqa_",)),
    "fever": Task(VERIFY, "accuracy", 8, (), ("fever_",)),
    "arc": Task(CHOICE, "accuracy", 8, ("arc_challenge", "arc_c", "ai2_arc", "arc_challenge_processed"), ("arc_",)),
    "arc_easy": Task(CHOICE, "accuracy", 8, ("arc_e",), ("arc_easy_",)),
    "eli5": Task(LONG, "rouge", 300, ("eli5_eval_bm25_top100",), ("eli5_",)),
    "asqa": Task(AMBIGUOUS, "str_em", 200, ("asqa_eval_gtr_top100", "asqa_eval_dpr_top100"), ("asqa_",)),
    "factbook": Task(SHORT, "em", 32),
    "factbook_verify": Task(VERIFY, "accuracy", 8),
    "factbook_long": Task(LONG, "rouge", 96),
    "factbook_ambiguous": Task(AMBIGUOUS, "str_em", 64),
}
DEFAULT_TASK = Task(SHORT, "em", 64)
READINGS_TASK = "asqa"  # the task of a question with qa_pairs, whatever its data set
SPLITS = ("train", "dev", "test", "validation")  # file names that do not identify a data set
_SPLIT_AFTER = re.compile(rf"[\s_.-]+({'|'.join(SPLITS)})$", re.IGNORECASE)


def _plain(name: str) -> str:
    """Return a name without case and separators: ARC-Challenge, arc_challenge and "ARC Challenge" give the same."""
    return re.sub(r"[\s_-]+", "", name.casefold())


_BY_NAME = {_plain(alias): name for name, task in TASKS.items() for alias in (name, *task.names)}
_BY_PREFIX = sorted(((prefix, name) for name, task in TASKS.items() for prefix in task.prefixes), key=lambda pair: -len(pair[0]))
_said: set[str | None] = set()  # unknown data sets that were already logged


def dataset_named(name: str | None) -> str | None:
    """Return the data set for a name in any spelling; None for an unknown name."""
    return _BY_NAME.get(_plain(name or ""))


def known_task(dataset: str | None) -> Task | None:
    """Return the task of a data set; None for an unknown data set."""
    return TASKS.get(dataset_named(dataset) or "")


def task_of(dataset: str | None) -> Task:
    """Return the task of a data set.

    An unknown one is treated as short-answer question answering, which is logged once.
    """
    task = known_task(dataset)
    if task is None and dataset not in _said:
        _said.add(dataset)
        which = f"unknown data set {dataset!r}" if dataset else "some rows have no known data set"
        log.warning("%s: these rows use the instruction %r and the metric %s; set their key 'dataset' to a name in "
                    "dynamicrag/rows/tasks.py",
                    which, DEFAULT_TASK.instruction, DEFAULT_TASK.metric)
    return task or DEFAULT_TASK


def task_of_row(row: Mapping) -> Task:
    """Return the task of a row: ASQA's if the question has several readings (`qa_pairs`), otherwise that of its data set."""
    task = known_task(row.get("dataset"))
    if readings_of(row) and (task is None or task.metric != "str_em"):
        return TASKS[READINGS_TASK]
    return task or task_of(row.get("dataset"))


def readings_of(row: Mapping) -> list[list[str]]:
    """Return the non-blank short answers of each reading of the question, from `qa_pairs`."""
    readings = [[answer for answer in pair["short_answers"] if answer.strip()] for pair in row.get("qa_pairs") or ()]
    return [reading for reading in readings if reading]


def derive_dataset(row_id: str, file_name: str = "") -> str | None:
    """Return the data set by exact prefix of the id, or else by exact file name, or None. Substrings never match."""
    return next((name for prefix, name in _BY_PREFIX if row_id.startswith(prefix)), None) or dataset_named(file_name)


def name_of_file(path: str | Path) -> str:
    """Return the part of a file name that may identify a data set: the stem, or the folder name if the stem is just a split.

    FlashRAG publishes asqa/dev.jsonl. A split at the end of the name is dropped, so that asqa_dev.jsonl gives the same.
    """
    path = Path(path).absolute()
    return path.parent.name if path.stem.casefold() in SPLITS else _SPLIT_AFTER.sub("", path.stem)


def name_with_folder(path: str | Path) -> str:
    """Return a unique name that still identifies the data set, for a file whose name occurs twice: nq_test.jsonl for nq/test.jsonl."""
    path = Path(path).absolute()
    return f"{path.parent.name}_{path.name}"


def target_answer(row: Mapping) -> str:
    """Return the gold answer for generator training: the first answer, one per reading, or the label of the right choice."""
    task = task_of_row(row)
    if task.metric == "str_em" and (readings := readings_of(row)):
        return "; ".join(reading[0] for reading in readings)
    answer = next(filter(str.strip, row["answers"]))
    return (gold_label(answer, shown_choices(row)) if task.instruction == CHOICE else None) or answer

"""The data sets: how each is asked, how its answers look, and which metric scores them.

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

    instruction: what the generator is told about the form of the answer.
    metric: the default metric of evaluate.py (dynamicrag.evaluation.metrics).
    max_tokens: upper limit of a generated answer.
    names: other names of the data set, and the exact names (without suffix) of its published files.
    prefixes: an id that starts with one of these belongs to the data set.
    whole_answers: answers that share no token with any other answer under f1, as the data set's own script has it.
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
YES_NO = ("yes", "no", "noanswer")  # HotpotQA's hotpot_evaluate_v1.py, which 2WikiMultihopQA took over

# The metric is the one that the authors of the data set, or the field since then, report first. Bamboogle: accuracy by equality
# (Press et al. 2023). MuSiQue: answer F1 (Trivedi et al. 2022). WebQuestions: exact match in open-domain question answering.
TASKS: dict[str, Task] = {
    "nq": Task(SHORT, "em", 32, ("nq_open", "natural_questions", "nq_top500"), ("nq_",)),
    "triviaqa": Task(SHORT, "em", 32, ("trivia", "triviaqa_top500", "triviaqa_test_w_gs"), ("tc_", "triviaqa_")),
    "webq": Task(SHORT, "em", 32, ("web_questions",), ("webq_",)),
    "hotpotqa": Task(SHORT, "em", 32, ("hotpot",), ("hotpotqa_",), YES_NO),
    "2wikimqa": Task(SHORT, "em", 32, ("2wikimultihopqa", "2wikimultihop", "2wiki"), ("2wikimqa_", "2wikimultihopqa_"), YES_NO),
    "musique": Task(SHORT, "f1", 32, ("musique_ans",), ("musique_",)),
    "bamboogle": Task(SHORT, "em", 32, (), ("bamboogle_",)),
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
READINGS_TASK = "asqa"  # how a question with qa_pairs is asked and scored, whatever its data set is called
SPLITS = ("train", "dev", "test", "validation")  # names of files that say nothing of the data set
_SPLIT_AFTER = re.compile(rf"[\s_.-]+({'|'.join(SPLITS)})$", re.IGNORECASE)


def _plain(name: str) -> str:
    """A name without letter case and separators: ARC-Challenge, arc_challenge and "ARC Challenge" are one."""
    return re.sub(r"[\s_-]+", "", name.casefold())


_BY_NAME = {_plain(alias): name for name, task in TASKS.items() for alias in (name, *task.names)}
_BY_PREFIX = sorted(((prefix, name) for name, task in TASKS.items() for prefix in task.prefixes), key=lambda pair: -len(pair[0]))
_said: set[str | None] = set()  # unknown data sets that the log has named


def dataset_named(name: str | None) -> str | None:
    """The data set that a name, in any spelling, stands for; None for a name that is not in the table."""
    return _BY_NAME.get(_plain(name or ""))


def known_task(dataset: str | None) -> Task | None:
    """The task of a data set, or None for one that is not in the table."""
    return TASKS.get(dataset_named(dataset) or "")


def task_of(dataset: str | None) -> Task:
    """The task of a row's data set. One that is not in the table is short-answer question answering; the log says so once."""
    task = known_task(dataset)
    if task is None and dataset not in _said:
        _said.add(dataset)
        which = f"data set {dataset!r} is not known" if dataset else "no data set is known of some rows"
        log.warning("%s: they are asked %r and scored by %s; give the rows a key 'dataset' with a name of dynamicrag/rows/tasks.py",
                    which, DEFAULT_TASK.instruction, DEFAULT_TASK.metric)
    return task or DEFAULT_TASK


def task_of_row(row: Mapping) -> Task:
    """The task of a row: that of its data set, and ASQA's for a question with several readings (`qa_pairs`)."""
    task = known_task(row.get("dataset"))
    if readings_of(row) and (task is None or task.metric != "str_em"):
        return TASKS[READINGS_TASK]
    return task or task_of(row.get("dataset"))


def readings_of(row: Mapping) -> list[list[str]]:
    """The short answers of each reading of the question, blank ones left out, from `qa_pairs`."""
    readings = [[answer for answer in pair["short_answers"] if answer.strip()] for pair in row.get("qa_pairs") or ()]
    return [reading for reading in readings if reading]


def derive_dataset(row_id: str, file_name: str = "") -> str | None:
    """The data set by exact prefix of the id or exact name of the file, else None. Never by substring: batch_3 is not TriviaQA."""
    return next((name for prefix, name in _BY_PREFIX if row_id.startswith(prefix)), None) or dataset_named(file_name)


def name_of_file(path: str | Path) -> str:
    """What the name of a file says about its data set: the name without suffix, or the folder's if that names a split alone.

    FlashRAG publishes asqa/dev.jsonl. A split after the name does not count: asqa_dev.jsonl says the same.
    """
    path = Path(path).absolute()
    return path.parent.name if path.stem.casefold() in SPLITS else _SPLIT_AFTER.sub("", path.stem)


def name_with_folder(path: str | Path) -> str:
    """A name for a file called as others are, which tells it from those and keeps its data set: nq_test.jsonl of nq/test.jsonl."""
    path = Path(path).absolute()
    return f"{path.parent.name}_{path.name}"


def target_answer(row: Mapping) -> str:
    """The gold answer a generator is trained to write: the first one, every reading's, or the label of the right choice."""
    task = task_of_row(row)
    if task.metric == "str_em" and (readings := readings_of(row)):
        return "; ".join(reading[0] for reading in readings)
    answer = next(filter(str.strip, row["answers"]))
    return (gold_label(answer, shown_choices(row)) if task.instruction == CHOICE else None) or answer

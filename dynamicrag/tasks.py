"""The data sets: how each is asked, how its answers look, and which metric scores them.

Adding a data set is adding a line to TASKS.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One data set.

    instruction: what the generator is told about the form of the answer.
    metric: the default metric of evaluate.py (dynamicrag.metrics).
    max_tokens: upper limit of a generated answer.
    prefix, stem: an id that starts with `prefix`, or a file of exactly this stem, belongs to the data set.
    """

    instruction: str
    metric: str
    max_tokens: int
    prefixes: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()


SHORT = "Answer with a few words only, no sentence."
VERIFY = "Judge the claim. Answer with exactly one of: SUPPORTS, REFUTES, NOT ENOUGH INFO."
LONG = "Answer with one or two paragraphs."
AMBIGUOUS = "The question can be read in several ways. Answer in one short paragraph that covers every reading."
CHOICE = "Answer with the letter of the right choice only."

TASKS: dict[str, Task] = {
    "nq": Task(SHORT, "em", 32, ("nq_",), ("nq", "nq_top500")),
    "triviaqa": Task(SHORT, "em", 32, ("tc_", "triviaqa_"), ("triviaqa", "triviaqa_top500")),
    "hotpotqa": Task(SHORT, "em", 32, ("hotpotqa_",), ("hotpotqa",)),
    "2wikimqa": Task(SHORT, "em", 32, ("2wikimqa_",), ("2wikimqa",)),
    "popqa": Task(SHORT, "match", 32, ("popqa_",), ("popqa",)),
    "fever": Task(VERIFY, "accuracy", 8, ("fever_",), ("fever",)),
    "arc": Task(CHOICE, "accuracy", 8, ("arc_",), ("arc",)),
    "eli5": Task(LONG, "rouge", 300, ("eli5_",), ("eli5",)),
    "asqa": Task(AMBIGUOUS, "str_em", 200, ("asqa_",), ("asqa",)),
    "factbook": Task(SHORT, "em", 32),
    "factbook_verify": Task(VERIFY, "accuracy", 8),
    "factbook_long": Task(LONG, "rouge", 96),
    "factbook_ambiguous": Task(AMBIGUOUS, "str_em", 64),
}
DEFAULT_TASK = Task(SHORT, "em", 64)

_BY_PREFIX = {prefix: name for name, task in TASKS.items() for prefix in task.prefixes}
_BY_STEM = {stem: name for name, task in TASKS.items() for stem in task.stems}


def task_of(dataset: str | None) -> Task:
    """The task of a row's data set; a data set not in the table is short-answer question answering."""
    return TASKS.get(dataset or "", DEFAULT_TASK)


def derive_dataset(row_id: str, file_stem: str = "") -> str | None:
    """The data set by exact prefix of the id or exact file stem, else None. Never by substring: batch_3 is not TriviaQA."""
    for prefix, dataset in _BY_PREFIX.items():
        if row_id.startswith(prefix):
            return dataset
    return _BY_STEM.get(file_stem)


def target_answer(row: dict) -> str:
    """The gold answer a generator is trained to write: the first one, or every reading's where there are several."""
    if task_of(row.get("dataset")).metric == "str_em" and row.get("qa_pairs"):
        readings = [next(filter(str.strip, pair["short_answers"]), None) for pair in row["qa_pairs"]]
        if any(readings):
            return "; ".join(filter(None, readings))
    return next(filter(str.strip, row["answers"]))

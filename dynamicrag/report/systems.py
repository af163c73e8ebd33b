"""A system of the report: who answered, from whose documents, which questions, how well and at what cost."""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from dynamicrag.rows.records import Row

SELECTORS = ("none", "top", "all", "monot5", "adaptive", "pointwise", "dynamic", "windows", "gold")
BY_LLM = ("pointwise", "dynamic", "windows")


@dataclass
class System:
    """One results file.

    selector is inference.py's, or "windows" of top_inference.py; label is the same for people. rows are without their
    documents, and `needed` is how many a question needs, None where not known; scores are in [0, 1], by id; summary and
    kinds are evaluate.py's, on 0 to 100, with groups by data set and by kind (kinds is None where the rows have none).
    wider is whether it read more, or fewer, documents than most systems of its evaluation set, or window by window.
    """

    path: Path
    arguments: dict
    evaluation_set: str
    generator: str
    selector: str
    label: str
    seconds: float
    rows: list[Row]
    scores: dict[str, float]
    summary: dict
    kinds: dict | None
    wider: bool = False

    @property
    def knows(self) -> bool:
        """Whether it was told which documents are needed: a bound, not a competitor."""
        return self.selector == "gold"

    @property
    def name(self) -> str:
        return f"{self.generator} · {self.label}"

    @property
    def rank(self) -> tuple[int, int]:
        """The selector's place among others, in tables and figures."""
        number = self.selector.partition(":")[2]
        place = SELECTORS.index(self.family) if self.family in SELECTORS else len(SELECTORS)
        return place, int(number) if self.family == "top" else self.shown

    @property
    def family(self) -> str:
        """The selector without its number."""
        return self.selector.partition(":")[0]

    @property
    def fixed(self) -> bool:
        """Whether every question gets the same number of documents."""
        return self.family in ("none", "top", "all")

    @property
    def shown(self) -> int:
        """How many documents of a question it read."""
        return int(self.arguments["topn"])

    @property
    def score(self) -> float:
        return self.summary["score"]

    @property
    def documents(self) -> float:
        """Documents answered from, mean of the questions answered."""
        return self.summary["documents"]

    @property
    def calls(self) -> float:
        """Calls a question, as the tokens below; not a number (nan) if they are not known."""
        return self._cost("calls")

    @property
    def prompt_tokens(self) -> float:
        return self._cost("prompt_tokens")

    @property
    def generated_tokens(self) -> float:
        return self._cost("generated_tokens")

    def _cost(self, key: str) -> float:
        value = self.summary.get(key)
        return math.nan if value is None else value

    def said(self, key: str, digits: int = 0) -> str:
        """A cost in words: 12 prompt tokens, or prompt tokens not known."""
        value, what = self._cost(key), key.replace("_", " ")
        return f"{what} not known" if math.isnan(value) else f"{value:.{digits}f} {what}"

    @property
    def speed(self) -> float:
        """Questions a second."""
        return len(self.rows) / max(self.seconds, 0.1)


def by_evaluation_set(systems: list[System]) -> dict[str, list[System]]:
    """The systems of each evaluation set, in order."""
    sets: dict[str, list[System]] = defaultdict(list)
    for system in systems:
        sets[system.evaluation_set].append(system)
    return dict(sets)


def by_generator(systems: list[System]) -> dict[str, list[System]]:
    """The systems of each model that answers, in order."""
    generators: dict[str, list[System]] = defaultdict(list)
    for system in systems:
        generators[system.generator].append(system)
    return dict(generators)

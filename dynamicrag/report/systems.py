"""A system of the report: a generator with a selector on an evaluation set, with its scores and costs."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamicrag.rows.row import Row

SELECTORS = ("none", "top", "all", "monot5", "adaptive", "pointwise", "dynamic", "windows", "gold")
BY_LLM = ("pointwise", "dynamic", "windows")


class AskedRow(Row):
    """A row of a results file, and how many documents its question needs; None if that is not known."""

    needed: int | None


@dataclass
class System:
    """One results file.

    `selector` is inference.py's, or "windows" for top_inference.py; `label` is its display name. `rows` lack their
    documents, and their key `needed` is the number of documents a question needs, or None. `scores` are in [0, 1], by
    id. `summary` and `kinds` are evaluate.py's, from 0 to 100, grouped by data set and by kind (None if rows have no
    kind). `wider` means that its number of documents differs from most systems of its evaluation set, or that it reads by
    windows.
    """

    path: Path
    arguments: dict
    evaluation_set: str
    generator: str
    selector: str
    label: str
    seconds: float
    rows: list[AskedRow]
    scores: dict[str, float]
    summary: dict
    kinds: dict | None
    wider: bool = False

    @property
    def knows(self) -> bool:
        """Whether the system was given the needed documents, so that it is a bound and not a competitor."""
        return self.selector == "gold"

    @property
    def name(self) -> str:
        return f"{self.generator} · {self.label}"

    @property
    def rank(self) -> tuple[int, int]:
        """Position of the selector in tables and figures."""
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
        """Number of documents per question that the system reads."""
        return int(self.arguments["topn"])

    @property
    def score(self) -> float:
        return self.summary["score"]

    @property
    def documents(self) -> float:
        """Mean number of documents used, over the answered questions."""
        return self.summary["documents"]

    @property
    def calls(self) -> float:
        """Mean calls per question; nan if not known. The token counts below are means, too."""
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
        """Format a cost as text: "12 prompt tokens" or "prompt tokens not known"."""
        value, what = self._cost(key), key.replace("_", " ")
        return f"{what} not known" if math.isnan(value) else f"{value:.{digits}f} {what}"

    @property
    def speed(self) -> float:
        """Questions per second."""
        return len(self.rows) / max(self.seconds, 0.1)


def by_evaluation_set(systems: Sequence[System]) -> dict[str, list[System]]:
    """Group systems by evaluation set, in order."""
    sets: dict[str, list[System]] = defaultdict(list)
    for system in systems:
        sets[system.evaluation_set].append(system)
    return dict(sets)


def by_generator(systems: Sequence[System]) -> dict[str, list[System]]:
    """Group systems by generator, in order."""
    generators: dict[str, list[System]] = defaultdict(list)
    for system in systems:
        generators[system.generator].append(system)
    return dict(generators)

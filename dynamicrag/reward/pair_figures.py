"""What reranker pairs teach: figures of each pair, their means by margin, and a warning about pairs of length only."""

import itertools
import math
import struct
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dynamicrag.evaluation.means import Mean
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.reward.preferences import Pair
from dynamicrag.rows.gold import gold_documents
from dynamicrag.rows.row import Row
from dynamicrag.stage import log

# A warning is logged if the chosen selection is shorter in more than the first share of pairs, or only shorter in the
# second.
SHORTER_SHARE, ONLY_SHORTER_SHARE = 2 / 3, 1 / 2
MARGINS = (0.05, 0.1, 0.2, 0.4)  # bounds of the margin in the report's lines
FIGURES = (
    "margin", "k chosen", "k rejected", "None", "shorter", "equally right", "only shorter", "same documents", "gold in chosen", "gold in rejected",
)


def figures(row: Row, pair: Pair, path: str) -> dict[str, float]:
    """Return the figures of a reranker pair; NaN for those that need gold documents if none are known."""
    chosen, rejected = row["id_lists"][pair.chosen], row["id_lists"][pair.rejected]
    shorter = len(chosen) < len(rejected)
    equally_right = row["score_terms"][pair.chosen]["em"] == row["score_terms"][pair.rejected]["em"]
    gold = gold_documents(row, path)

    def holds_gold(ids: list[int]) -> float:
        return float(gold.keys() <= {row["docs"][position - 1]["id"] for position in ids}) if gold else math.nan

    return {
        "margin": pair.margin, "k chosen": len(chosen), "k rejected": len(rejected), "None": not chosen, "shorter": shorter,
        "equally right": equally_right, "only shorter": shorter and equally_right, "same documents": {*chosen} == {*rejected},
        "gold in chosen": holds_gold(chosen), "gold in rejected": holds_gold(rejected),
    }


class Taught:
    """The figures of any number of pairs, as their number and sums over all pairs and by margin."""

    def __init__(self):
        bounds = itertools.pairwise((0.0, *MARGINS, 1.0))
        self._lines = {"all": (-math.inf, math.inf)} | {f"{low:.2f} to {high:.2f}": (low, high) for low, high in bounds}
        self._pairs: Counter[str] = Counter()
        self._means = {(line, figure): Mean() for line in self._lines for figure in FIGURES}

    def add(self, about: Mapping[str, float]) -> None:
        """Add the figures of one pair."""
        margin = _single(about["margin"])
        for line, (low, high) in self._lines.items():
            if _single(low) < margin <= _single(high):
                self._pairs[line] += 1
                for figure in FIGURES:
                    if not math.isnan(value := about[figure]):
                        self._means[line, figure].add(value)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return the number of pairs and the mean of each of FIGURES, over all pairs and by margin; None if not known."""
        return {
            line: {"pairs": pairs} | {figure: self._means[line, figure].value() for figure in FIGURES}
            for line in self._lines if (pairs := self._pairs[line])
        }


def _single(number: float) -> float:
    """Return the number in single precision, in which a difference of rewards such as 0.3 - 0.25 is 0.05."""
    return struct.unpack("f", struct.pack("f", number))[0]


def summary_table(summary: dict[str, dict[str, float | None]]) -> str:
    """Return a table with one line per margin."""
    shown = {name: ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in line.values()] for name, line in summary.items()}
    return markdown_table(["", "pairs", *FIGURES], [[name, *cells] for name, cells in shown.items()])


class Targets(NamedTuple):
    """A number of pairs, and the length of their chosen and rejected targets together."""

    pairs: int = 0
    length: int = 0


class TargetLengths:
    """The number of pairs and the length of their targets, by role and group of the question.

    The loss of DPO sums over the tokens of a target, so that long answers weigh more than identifiers.
    """

    def __init__(self):
        self._found: dict[tuple[str, str], Targets] = {}

    def add(self, role: str, group: str, length: int) -> None:
        """Add one pair."""
        pairs, total = self._found.get((role, group), Targets())
        self._found[role, group] = Targets(pairs + 1, total + length)

    def of_role(self, role: str) -> Targets:
        """Return the sums over the groups of a role."""
        found = [targets for (of, _), targets in self._found.items() if of == role]
        return Targets(sum(one.pairs for one in found), sum(one.length for one in found))

    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return {role: {group: {"pairs", "target length"}}}."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for (role, group), targets in sorted(self._found.items()):
            found.setdefault(role, {})[group] = {"pairs": targets.pairs, "target length": targets.length}
        return found

    def table(self, unit: str) -> str:
        """Return a table with one line per role, and one per group of a role that has several."""
        lines, whole = [], sum(targets.length for targets in self._found.values()) or 1
        for role, groups in self.summary().items():
            several = [(group or "(none)", self._found[role, group]) for group in groups] if len(groups) > 1 else []
            lines += [
                [name, group, f"{pairs:,}", f"{length:,}", f"{100 * length / whole:.1f}", f"{length / max(pairs, 1):.1f}"]
                for name, group, (pairs, length) in [(role, "all", self.of_role(role)), *(("", *one) for one in several)]
            ]
        return markdown_table(["", "group", "pairs", f"target {unit}", "share, %", "per pair"], lines)


def say_what_they_teach(summary: dict, lengths: TargetLengths, unit: str) -> None:
    """Log the figures of the pairs, and a warning if they mainly teach short selections."""
    log.info("reranker pairs by margin, means and shares:\n%s", summary_table(summary))
    log.info("pairs by role and group, with the length of both targets:\n%s", lengths.table(unit))
    every = summary["all"]
    if every["same documents"]:
        log.info("reranker pairs: %.0f %% differ only in the order of the documents; --pair-by set avoids such pairs",
                 100 * every["same documents"])
    shorter, only_shorter = every["shorter"], every["only shorter"]
    if shorter > SHORTER_SHARE or only_shorter > ONLY_SHORTER_SHARE:
        log.warning(
            "reranker pairs: the chosen selection is shorter in %.0f %%, and in %.0f %% of the pairs this is the only "
            "difference, because both answers are equally correct. A model may learn to select no document; raise "
            "--min-margin, give --keep-mean, or lower the weight of length (reward_trajectories.py --reweight)",
            100 * shorter, 100 * only_shorter,
        )

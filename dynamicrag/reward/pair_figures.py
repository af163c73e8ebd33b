"""What reranker pairs teach: figures of each pair, their means by margin, and a warning about pairs of length only."""

import itertools
import math
from array import array
from collections import Counter

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


def summarise(pairs: array) -> dict[str, dict[str, float | None]]:
    """Return the number of pairs and the mean of each of FIGURES, over all pairs and by margin; None if not known."""
    import numpy as np

    table = np.frombuffer(pairs, dtype=np.float32).reshape(-1, len(FIGURES))
    lines = {"all": table}
    for low, high in itertools.pairwise((0.0, *MARGINS, 1.0)):
        lines[f"{low:.2f} to {high:.2f}"] = table[(low < table[:, 0]) & (table[:, 0] <= high)]
    return {
        name: {"pairs": len(line)} | {
            figure: float(known.mean(dtype=np.float64)) if len(known := column[~np.isnan(column)]) else None
            for figure, column in zip(FIGURES, line.T, strict=True)
        }
        for name, line in lines.items() if len(line)
    }


def summary_table(summary: dict[str, dict[str, float | None]]) -> str:
    """Return a table with one line per margin."""
    shown = {name: ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in line.values()] for name, line in summary.items()}
    return markdown_table(["", "pairs", *FIGURES], [[name, *cells] for name, cells in shown.items()])


def say_what_they_teach(summary: dict, pairs: dict[str, int], sizes: Counter, unit: str) -> None:
    """Log the figures of the pairs, and a warning if they mainly teach short selections."""
    log.info("reranker pairs by margin, means and shares:\n%s", summary_table(summary))
    whole = sum(sizes.values()) or 1
    roles = [[role, f"{count:,}", f"{sizes[role]:,}", f"{100 * sizes[role] / whole:.1f}", f"{sizes[role] / max(count, 1):.1f}"] for role, count in pairs.items()]
    log.info("pairs by role, with the length of both targets:\n%s", markdown_table(["", "pairs", f"target {unit}", "share, %", "per pair"], roles))
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

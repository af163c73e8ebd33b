"""The tables of the evidence run: systems, differences, kinds, exact selections, and rounds of DPO."""

import statistics
from typing import NamedTuple

import numpy as np
from evidence_systems import (
    ALL_GOLD,
    BY_KIND,
    BY_QUESTION,
    DYNAMIC,
    DYNAMIC_SFT,
    GOLD,
    LABELS,
    MODELS,
    NAMES,
    TOP3_TRAINED,
    Key,
    System,
)

from dynamicrag.evaluation.crossed import Crossed, balanced, crossed, holm
from dynamicrag.evaluation.tables import markdown_table

# Figure of a round (evidence_seed.py) -> its heading and format.
ROUND_COLUMNS = {
    "score": ("score on dev", "{:.1f}"), "documents": ("documents", "{:.2f}"), "reward": ("reward", "{:.3f}"), "right": ("correct", "{:.3f}"),
    "reward with right": ("correlation of reward and correctness", "{:.2f}"), "reward with k": ("correlation of reward and k", "{:.2f}"),
    "pairs": ("pairs", "{:.0f}"), "margin": ("margin", "{:.2f}"), "k chosen": ("k of chosen", "{:.2f}"), "k rejected": ("k of rejected", "{:.2f}"),
    "only shorter": ("only shorter", "{:.2f}"), "gold in chosen": ("gold in chosen", "{:.2f}"), "gold in rejected": ("gold in rejected", "{:.2f}"),
}


class Difference(NamedTuple):
    """A difference between systems: by question, with kinds of equal weight, and of each seed."""

    by_question: Crossed
    by_kind: Crossed
    seeds: list[float]


def mean(figures: list[dict], key: str) -> float:
    return statistics.fmean(one[key] for one in figures)


def mean_or_blank(figures: list[dict], key: str, form: str) -> str:
    """Return the formatted mean; "" if it is not known for every seed."""
    return "" if any(one[key] is None for one in figures) else form.format(mean(figures, key))


def interval(found: Crossed) -> str:
    return f"{found.low:+.1f} to {found.high:+.1f}"


def signed(found: Crossed) -> str:
    return f"{found.mean:+.1f} ({interval(found)})"


def system_table(systems: dict[Key, System]) -> str:
    lines = [
        [
            MODELS[model], NAMES[shown, selector], f"{system.score:.1f}", f"{system.macro():.1f}", ", ".join(f"{one['score']:.1f}" for one in system.seeds),
            f"{mean(system.seeds, 'documents'):.2f}", *(mean_or_blank(system.seeds, key, "{:.1f}") for key in ("exact", "precision", "recall")),
            mean_or_blank(system.seeds, "prompt_tokens", "{:.0f}"),
        ]
        for (model, shown, selector), system in systems.items()
    ]
    return markdown_table(["model", "selector", "score", "mean of kinds", "score per seed", "documents", "exact set", "precision", "recall", "prompt tokens"], lines)


def differences(systems: dict[Key, System], best: str, kinds: list[str]) -> dict[str, Difference]:
    """Return the differences of DynamicRAG from the other systems that were run, by name.

    A difference in differences is the gain by DPO of one selector minus that of another one: the model answers better
    after DPO from any documents, and only the rest of the gain can be better choice.
    """
    fixed, fixed_sft = ("dpo", "retrieved", best), ("sft", "retrieved", best)
    name = NAMES["retrieved", best]
    pairs: dict[str, tuple[list[Key], list[Key]]] = {
        f"after DPO: DynamicRAG minus {name}": ([DYNAMIC], [fixed]),
        "after DPO: DynamicRAG minus reranker labels": ([DYNAMIC], [LABELS]),
        "after DPO: DynamicRAG minus k from the question": ([DYNAMIC], [BY_QUESTION]),
        "after DPO: DynamicRAG minus k by kind of question": ([DYNAMIC], [BY_KIND]),
        f"DynamicRAG after DPO minus {name} after SFT": ([DYNAMIC], [fixed_sft]),
        "DynamicRAG after DPO minus SFT with top 3": ([DYNAMIC], [TOP3_TRAINED]),
        f"after SFT: DynamicRAG minus {name}": ([DYNAMIC_SFT], [fixed_sft]),
        "gain by DPO: DynamicRAG": ([DYNAMIC], [DYNAMIC_SFT]),
    }
    for label, other in ((name, fixed), ("reranker labels", LABELS), ("gold among those shown", GOLD)):
        pairs[f"gain by DPO: DynamicRAG minus {label}"] = ([DYNAMIC, ("sft", *other[1:])], [DYNAMIC_SFT, other])
    pairs |= {
        "loss by selection: gold among those shown minus DynamicRAG": ([GOLD], [DYNAMIC]),
        "loss by retrieval: all gold minus gold among those shown": ([ALL_GOLD], [GOLD]),
    }
    return {
        label: difference(systems, plus, minus, kinds) for label, (plus, minus) in pairs.items() if all(key in systems for key in (*plus, *minus))
    }


def difference(systems: dict[Key, System], plus: list[Key], minus: list[Key], kinds: list[str]) -> Difference:
    cells = sum((systems[key].scores for key in plus), np.float64(0)) - sum((systems[key].scores for key in minus), np.float64(0))
    return Difference(crossed(cells), crossed(balanced(cells, kinds)), [float(one) for one in cells.mean(axis=1)])


def difference_table(compared: dict[str, Difference]) -> str:
    corrected = holm([found.by_question.p for found in compared.values()])
    lines = [
        [
            name, f"{found.by_question.mean:+.1f}", interval(found.by_question), f"{found.by_question.p:.4f}", f"{p:.3f}",
            ", ".join(f"{one:+.1f}" for one in found.seeds), f"{found.by_kind.mean:+.1f}", interval(found.by_kind),
        ]
        for (name, found), p in zip(compared.items(), corrected, strict=True)
    ]
    return markdown_table(["comparison", "difference", "95 %", "p", "p, Holm", "per seed", "mean of kinds", "95 %, kinds"], lines)


def kind_table(systems: dict[Key, System], best: str, kinds: list[str]) -> str:
    """Return scores and differences of each kind, and the smallest p of these differences after Holm's correction."""
    best_fixed = ("dpo", "retrieved", best)
    columns = {
        "SFT, DynamicRAG": DYNAMIC_SFT, "DPO, DynamicRAG": DYNAMIC, f"DPO, {NAMES['retrieved', best]}": best_fixed,
        "DPO, gold among those shown": GOLD, "DPO, all gold": ALL_GOLD,
    }
    lines, p_values = [], []
    for kind in sorted(set(kinds)):
        asked = [n for n, one in enumerate(kinds) if one == kind]
        of_kind = {name: [one["kinds"][kind] for one in systems[key].seeds] for name, key in columns.items()}
        found = [crossed((systems[DYNAMIC].scores - systems[other].scores)[:, asked]) for other in (best_fixed, DYNAMIC_SFT)] if len(asked) > 1 else []
        p_values += [one.p for one in found]
        lines.append([
            kind, str(len(asked)), *(f"{mean(figures, 'score'):.1f} ({mean(figures, 'documents'):.1f})" for figures in of_kind.values()),
            *(map(signed, found) if found else ("", "")),
        ])
    table = markdown_table(["kind", "n", *columns, f"DynamicRAG minus {NAMES['retrieved', best]}", "DPO minus SFT"], lines)
    smallest = f"\n\nSmallest p of these {len(p_values)} differences, corrected for their number (Holm): {min(holm(p_values)):.2f}." if p_values else ""
    return table + smallest


def choice_table(choices: list[dict]) -> str:
    """Return a table of exact selections if every needed document is shown; one {model: {order: figures}} per seed."""
    lines = []
    for model, orders in choices[0].items():
        for order in orders:
            found = [choice[model][order] for choice in choices]
            kinds = {kind: [one["kinds"][kind] for one in found] for kind in sorted(found[0]["kinds"])}
            every = [one["all"] for one in found]
            lines.append([
                model.upper(), order, f"{mean(every, 'exact'):.1f}", ", ".join(f"{one['exact']:.1f}" for one in every),
                *(f"{mean(every, key):.1f}" for key in ("precision", "recall")), f"{mean(every, 'chosen_k'):.2f}",
                *(f"{mean(figures, 'exact'):.0f} ({mean(figures, 'chosen_k'):.1f})" for figures in kinds.values()),
            ])
    return markdown_table(["model", "order", "exact set", "exact set per seed", "precision", "recall", "k", *kinds], lines)


def rounds_table(rounds: list[list[dict]]) -> str:
    """Return a table of the rewards and pairs of the rounds of scripts/iterate.sh; one list of rounds per seed."""
    lines = []
    for number, of_round in enumerate(zip(*rounds, strict=False)):  # the shortest list determines the number
        lines.append([str(number), *(mean_or_blank(of_round, key, form) if key in of_round[0] else "" for key, (_, form) in ROUND_COLUMNS.items())])
    return markdown_table(["round", *(heading for heading, _ in ROUND_COLUMNS.values())], lines)

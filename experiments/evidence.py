"""Evaluate all seeds of the evidence run: the scores of each selector, and where selection gains and loses.

Every question is answered by the models of every seed. The score of a question is its mean over seeds, and differences
are compared by question (paired bootstrap). The best fixed k is chosen on the test questions themselves, which favours
it.

Reads    SEEDS                              files written by experiments/evidence_seed.py
Writes   OUTPUT_DIR/evidence.md             the tables
         OUTPUT_DIR/evidence.json           the differences, unrounded

    .venv/bin/python experiments/evidence.py \\
        --seeds runs/evidence/seed_1.json runs/evidence/seed_2.json runs/evidence/seed_3.json
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from dynamicrag import stage
from dynamicrag.evaluation.metrics import Comparison, paired_bootstrap
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import UserError, log

FIXED = ("none", "top1", "top2", "top3", "all")
# (documents shown, selector) -> name in the tables.
NAMES = {
    ("retrieved", "none"): "none", ("retrieved", "top1"): "top 1", ("retrieved", "top2"): "top 2", ("retrieved", "top3"): "top 3",
    ("retrieved", "all"): "all five shown", ("retrieved", "monot5"): "reranker labels", ("retrieved", "dynamic"): "DynamicRAG",
    ("retrieved", "gold"): "gold among those shown", ("all needed", "dynamic"): "DynamicRAG, all gold shown", ("all needed", "gold"): "all gold",
}
DYNAMIC, GOLD, ALL_GOLD = ("dpo", "retrieved", "dynamic"), ("dpo", "retrieved", "gold"), ("dpo", "all needed", "gold")
DYNAMIC_SFT = ("sft", "retrieved", "dynamic")
COMPARED = (DYNAMIC_SFT, DYNAMIC, GOLD, ALL_GOLD)  # (model, documents shown, selector) that every seed must have
# Figure of a round (evidence_seed.py) -> its heading and format.
ROUND_COLUMNS = {
    "score": ("score on dev", "{:.1f}"), "documents": ("documents", "{:.2f}"), "reward": ("reward", "{:.3f}"), "right": ("correct", "{:.3f}"),
    "reward with right": ("correlation of reward and correctness", "{:.2f}"), "reward with k": ("correlation of reward and k", "{:.2f}"),
    "pairs": ("pairs", "{:.0f}"), "margin": ("margin", "{:.2f}"), "k chosen": ("k of chosen", "{:.2f}"), "k rejected": ("k of rejected", "{:.2f}"),
    "only shorter": ("only shorter", "{:.2f}"), "gold in chosen": ("gold in chosen", "{:.2f}"), "gold in rejected": ("gold in rejected", "{:.2f}"),
}


class System(NamedTuple):
    """One model with one selector, over all seeds."""

    seeds: list[dict]  # its figures in each seed
    scores: list[float]  # by question, mean over seeds

    @property
    def score(self) -> float:
        return 100 * statistics.fmean(self.scores)

    def mean(self, key: str) -> float:
        return mean(self.seeds, key)

    @property
    def tokens(self) -> str:
        """Return the mean prompt tokens per question; "" if they are not known for every seed."""
        return "" if any(one["prompt_tokens"] is None for one in self.seeds) else f"{self.mean('prompt_tokens'):.0f}"


def mean(figures: list[dict], key: str) -> float:
    return statistics.fmean(one[key] for one in figures)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--seeds", nargs="+", required=True, help="one file per seed")
    parser.add_argument("--output_dir", default="runs/evidence", help="folder of evidence.md and evidence.json")
    parser.add_argument("--bootstrap_seed", type=int, default=42, help="seed of the intervals")
    return parser.parse_args(argv)


def read_seeds(paths: list[str]) -> list[dict]:
    """Return the seeds. Raises UserError naming a file that is invalid or whose questions differ from those of the first one."""
    seeds = []
    for path in paths:
        try:
            seeds.append(orjson.loads(Path(path).read_bytes()))
            questions = seeds[-1]["questions"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: not written by experiments/evidence_seed.py ({error!r}); run "
                            "experiments/evidence.sh again") from error
        if questions != seeds[0]["questions"]:
            raise UserError(f"{path}: its questions differ from those of {paths[0]}; give seeds with the same data/factbook and "
                            "sizes")
    return seeds


def read_systems(seeds: list[dict], paths: list[str]) -> dict[tuple[str, str, str], System]:
    """Return the systems of the first seed by (model, documents shown, selector). Every other seed must have them too."""
    by_seed = [{(one["model"], one["shown"], one["selector"]): one for one in seed["systems"]} for seed in seeds]
    for key in by_seed[0]:
        for path, found in zip(paths, by_seed, strict=True):
            if key not in found:
                raise UserError(f"{path}: lacks answers of the {key[0]} model with the selector {key[2]}, documents "
                                f"{key[1]}, which {paths[0]} has; run this seed again")
    return {
        key: System([found[key] for found in by_seed], [statistics.fmean(marks) for marks in zip(*(found[key]["scores"] for found in by_seed), strict=True)])
        for key in by_seed[0]
    }


def compare(one: System, other: System, asked: list[int], seed: int) -> Comparison:
    """Return figures of the questions at the positions `asked`, from 0 to 100 (except p)."""
    found = paired_bootstrap([one.scores[n] for n in asked], [other.scores[n] for n in asked], seed)
    return Comparison(100 * found.difference, 100 * found.low, 100 * found.high, found.p)


def signed(found: Comparison) -> str:
    return f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def system_table(systems: dict[tuple[str, str, str], System]) -> str:
    lines = [
        [
            model.upper(), NAMES[shown, selector], f"{system.score:.1f}", ", ".join(f"{one['score']:.1f}" for one in system.seeds),
            f"{system.mean('documents'):.2f}", *(f"{system.mean(key):.1f}" for key in ("exact", "precision", "recall")), system.tokens,
        ]
        for (model, shown, selector), system in systems.items()
    ]
    return markdown_table(["model", "selector", "score", "score per seed", "documents", "exact set", "precision", "recall", "prompt tokens"], lines)


def comparisons(systems: dict[tuple[str, str, str], System], best: str, asked: list[int], seed: int) -> dict[str, Comparison]:
    pairs = {
        f"after DPO: DynamicRAG minus the best fixed k ({NAMES['retrieved', best]})": (DYNAMIC, ("dpo", "retrieved", best)),
        "after DPO: DynamicRAG minus reranker labels": (DYNAMIC, ("dpo", "retrieved", "monot5")),
        "DynamicRAG: after DPO minus after SFT": (DYNAMIC, DYNAMIC_SFT),
        "loss by selection: gold among those shown minus DynamicRAG": (GOLD, DYNAMIC),
        "loss by retrieval: all gold minus gold among those shown": (ALL_GOLD, GOLD),
    }
    return {name: compare(systems[one], systems[other], asked, seed) for name, (one, other) in pairs.items() if other in systems}


def kind_table(systems: dict[tuple[str, str, str], System], best: str, kinds: list[str], seed: int) -> str:
    best_fixed = ("dpo", "retrieved", best)
    columns = {
        "SFT, DynamicRAG": DYNAMIC_SFT, "DPO, DynamicRAG": DYNAMIC, f"DPO, {NAMES['retrieved', best]}": best_fixed,
        "DPO, gold among those shown": GOLD, "DPO, all gold": ALL_GOLD,
    }
    lines = []
    for kind in sorted(set(kinds)):
        asked = [n for n, one in enumerate(kinds) if one == kind]
        of_kind = {name: [one["kinds"][kind] for one in systems[key].seeds] for name, key in columns.items()}
        lines.append([
            kind, *(f"{mean(figures, 'score'):.1f} ({mean(figures, 'documents'):.1f})" for figures in of_kind.values()),
            *(signed(compare(systems[DYNAMIC], systems[other], asked, seed)) for other in (best_fixed, DYNAMIC_SFT)),
        ])
    return markdown_table(["kind", *columns, f"DynamicRAG minus {NAMES['retrieved', best]}", "DPO minus SFT"], lines)


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
        lines.append([str(number), *(form.format(mean(of_round, key)) if key in of_round[0] else "" for key, (_, form) in ROUND_COLUMNS.items())])
    return markdown_table(["round", *(heading for heading, _ in ROUND_COLUMNS.values())], lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    seeds = read_seeds(args.seeds)
    systems = read_systems(seeds, args.seeds)
    fixed = [selector for selector in FIXED if ("dpo", "retrieved", selector) in systems]
    if not fixed:
        raise UserError(f"{args.seeds[0]}: contains no answers of the dpo model with a fixed k; set SELECTORS to some "
                        f"of {', '.join(FIXED)}")
    best = max(fixed, key=lambda selector: systems["dpo", "retrieved", selector].score)
    kinds = [*seeds[0]["questions"].values()]
    compared = comparisons(systems, best, [*range(len(kinds))], args.bootstrap_seed)
    differences = [[name, f"{found.difference:+.1f}", f"{found.low:+.1f} to {found.high:+.1f}", f"{found.p:.4f}"] for name, found in compared.items()]
    choices, rounds = [seed["choice"] for seed in seeds], [seed["rounds"] for seed in seeds]
    text = "\n\n".join([
        f"{len(kinds)} questions, seeds: {len(seeds)}; scores are each kind's own metric, 0 to 100.", system_table(systems),
        "Differences, question by question:\n\n" + markdown_table(["comparison", "difference", "95 %", "p"], differences),
        "By kind: score, and documents used in brackets:\n\n" + kind_table(systems, best, kinds, args.bootstrap_seed),
        *([f"Exact selections if every needed document is among the five shown:\n\n{choice_table(choices)}"] if all(choices) else []),
        *([f"Rounds of sampling, reward and DPO; correlations are over trajectories:\n\n{rounds_table(rounds)}"] if all(rounds) else []),
    ])
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_writer(folder / "evidence.md") as file:
        file.write(f"{text}\n".encode())
    with atomic_writer(folder / "evidence.json") as file:
        figures = {"seeds": args.seeds, "best_fixed": best, "compared": {name: found._asdict() for name, found in compared.items()}}
        file.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    print(text)
    log.info("%s and evidence.json", folder / "evidence.md")


if __name__ == "__main__":
    stage.run(main)

"""One reading of the evidence run: what each selector scores over all seeds, and where choosing gains and loses.

Every question is answered by every seed's models, so a question's score is its mean over seeds, and differences are compared
question by question (paired bootstrap). The best fixed k is the best of them on the test questions themselves, which favours it.

Reads    RUN/results/SET_STAGE_SELECTOR.json            of each seed, by scripts/evidence.sh
         RUN/results/SET_oracle_STAGE_SELECTOR.json     the same with every needed passage among the documents shown
         RUN/results/SET_STAGE_choice.json              what is chosen of those, in the retriever's order and shuffled
         RUN/rounds/rounds.json                         what was sampled, rewarded and preferred; each of the two where it is there
Writes   OUTPUT_DIR/evidence.md and evidence.json

    python scripts/evidence.py --runs runs/evidence/seed_1 runs/evidence/seed_2 runs/evidence/seed_3
"""

import functools
import operator
import statistics
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dynamicrag import stage
from dynamicrag.atomic import atomic_writer
from dynamicrag.metrics import Comparison, paired_bootstrap
from dynamicrag.scoring import summarise
from dynamicrag.stage import UserError, log
from dynamicrag.tables import markdown_table
from evaluate import result_rows

ANSWERS, ORACLE = "", "_oracle"  # what file names have after the set's
DYNAMIC, GOLD = "dynamic", "gold"
FIXED = ("none", "top1", "top2", "top3", "all")
SELECTORS = (*FIXED, "monot5", DYNAMIC, GOLD)
# Column, the summary and its keys, and how it is shown.
ROUND_COLUMNS = (
    ("reward", ("reward", "reward", "mean"), "{:.3f}"), ("right", ("reward", "em", "mean"), "{:.3f}"),
    ("reward with right", ("reward", "reward", "correlation_with_em"), "{:.2f}"), ("reward with k", ("reward", "reward", "correlation_with_k"), "{:.2f}"),
    ("pairs", ("pairs", "all", "pairs"), "{:.0f}"), ("margin", ("pairs", "all", "margin"), "{:.2f}"),
    ("k chosen", ("pairs", "all", "k chosen"), "{:.2f}"), ("k rejected", ("pairs", "all", "k rejected"), "{:.2f}"),
    ("only shorter", ("pairs", "all", "only shorter"), "{:.2f}"),
    ("gold in chosen", ("pairs", "all", "gold in chosen"), "{:.2f}"), ("gold in rejected", ("pairs", "all", "gold in rejected"), "{:.2f}"),
)


class System(NamedTuple):
    """One stage's model with one selector, over all seeds."""

    summaries: list[dict]  # one a seed
    scores: dict[str, float]  # mean over seeds, by question
    kinds: dict[str, str]  # of the same questions

    @property
    def score(self) -> float:
        return 100 * statistics.fmean(self.scores.values())

    def mean(self, *keys: str) -> float:
        return mean(self.summaries, *keys)


def mean(summaries: list[dict], *keys: str) -> float:
    """Mean over seeds of one figure of their summaries."""
    return statistics.fmean(functools.reduce(operator.getitem, keys, summary) for summary in summaries)


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="the folders of the seeds")
    parser.add_argument("--set", default="test", help="name of the evaluation set")
    parser.add_argument("--output_dir", default="runs/evidence", help="folder of evidence.md and evidence.json")
    parser.add_argument("--seed", type=int, default=42, help="seed of the bootstrap")
    return parser.parse_args(argv)


def read_system(name: str, runs: list[str], seed: int) -> System:
    """A system of all runs. Raises UserError naming the file that a run lacks, or whose questions are others."""
    summaries, scores, kinds = [], defaultdict(list), {}
    for folder in runs:
        path = f"{folder}/results/{name}.json"
        if not Path(path).is_file():
            raise UserError(f"{path}: is missing; run scripts/evidence.sh again, which does what is not done")
        rows = list(result_rows(path, None, None, None))
        kinds.update((row["id"], row["kind"]) for row in rows)
        summary, of_questions = summarise(rows, None, "kind", seed, path)
        summaries.append(summary)
        for row_id, score in of_questions.items():
            scores[row_id].append(score)
        if scores.keys() != of_questions.keys():
            raise UserError(f"{path}: answers other questions than {runs[0]}; all seeds share data/factbook and the sizes of their questions")
    return System(summaries, {row_id: statistics.fmean(values) for row_id, values in scores.items()}, kinds)


def compare(one: System, other: System, seed: int, kind: str | None = None) -> Comparison:
    """Of the questions of one kind, or of all. On 0 to 100 but for p."""
    asked = [row_id for row_id in one.scores if kind in (None, one.kinds[row_id])]
    found = paired_bootstrap([one.scores[row_id] for row_id in asked], [other.scores[row_id] for row_id in asked], seed)
    return Comparison(100 * found.difference, 100 * found.low, 100 * found.high, found.p)


def read_systems(runs: list[str], name: str, seed: int) -> dict[tuple[str, str, str], System]:
    """(documents, stage, selector) -> system: those compared, and of the others what the first run has."""
    compared = {(ANSWERS, "sft", DYNAMIC), (ANSWERS, "dpo", DYNAMIC), (ANSWERS, "dpo", GOLD), (ORACLE, "dpo", GOLD)}
    found = {}
    for documents, stage_name, selector in product((ANSWERS, ORACLE), ("sft", "dpo"), SELECTORS):
        file = f"{name}{documents}_{stage_name}_{selector}"
        if (documents, stage_name, selector) in compared or Path(runs[0], f"results/{file}.json").is_file():
            found[documents, stage_name, selector] = read_system(file, runs, seed)
    return found


def system_table(systems: dict[tuple[str, str, str], System]) -> str:
    lines = []
    for (documents, stage_name, selector), system in systems.items():
        lines.append([
            stage_name, selector, "all needed shown" if documents == ORACLE else "", f"{system.score:.1f}",
            ", ".join(f"{summary['score']:.1f}" for summary in system.summaries), f"{system.mean('documents'):.2f}",
            *(f"{system.mean('selection', key):.1f}" for key in ("exact", "precision", "recall")), f"{system.mean('prompt_tokens'):.0f}",
        ])
    return markdown_table(["model", "selector", "documents", "score", "of each seed", "documents read", "exact set", "precision", "recall", "prompt tokens"], lines)


def comparisons(systems: dict[tuple[str, str, str], System], best: str, seed: int) -> dict[str, Comparison]:
    dynamic, gold = systems[ANSWERS, "dpo", DYNAMIC], systems[ANSWERS, "dpo", GOLD]
    pairs = {
        f"after DPO, dynamic less best fixed k ({best})": (dynamic, systems[ANSWERS, "dpo", best]),
        "dynamic, after DPO less after SFT": (dynamic, systems[ANSWERS, "sft", DYNAMIC]),
        "lost by selection: gold documents of those shown less dynamic": (gold, dynamic),
        "lost by retrieval: all gold documents less those of the documents shown": (systems[ORACLE, "dpo", GOLD], gold),
    }
    if (ANSWERS, "dpo", "monot5") in systems:
        pairs["after DPO, dynamic less the reranker's labels"] = (dynamic, systems[ANSWERS, "dpo", "monot5"])
    return {name: compare(one, other, seed) for name, (one, other) in pairs.items()}


def kind_table(systems: dict[tuple[str, str, str], System], best: str, seed: int) -> str:
    columns = {
        "SFT, dynamic": (ANSWERS, "sft", DYNAMIC), "DPO, dynamic": (ANSWERS, "dpo", DYNAMIC), f"DPO, {best}": (ANSWERS, "dpo", best),
        "DPO, gold of those shown": (ANSWERS, "dpo", GOLD), "DPO, all gold": (ORACLE, "dpo", GOLD),
    }
    dynamic = systems[ANSWERS, "dpo", DYNAMIC]
    others = {f"dynamic less {best}": (ANSWERS, "dpo", best), "DPO less SFT": (ANSWERS, "sft", DYNAMIC)}
    lines = []
    for kind in sorted(dynamic.summaries[0]["groups"]):
        found = [compare(dynamic, systems[other], seed, kind) for other in others.values()]
        lines.append([
            kind, *(f"{systems[key].mean('groups', kind, 'score'):.1f} ({systems[key].mean('groups', kind, 'documents'):.1f})" for key in columns.values()),
            *(f"{one.difference:+.1f} ({one.low:+.1f} to {one.high:+.1f})" for one in found),
        ])
    return markdown_table(["kind", *columns, *others], lines)


def of_each_seed(runs: list[str], file: str) -> list[dict] | None:
    """What a JSON file of every run holds; None where a run has none."""
    paths = [Path(folder, file) for folder in runs]
    return [orjson.loads(path.read_bytes()) for path in paths] if all(path.is_file() for path in paths) else None


def choice_table(runs: list[str], name: str) -> str | None:
    """Exact selections where every needed document is among those shown; None where a run has not measured them."""
    lines = []
    for stage_name in ("sft", "dpo"):
        found = of_each_seed(runs, f"results/{name}_{stage_name}_choice.json")
        if found is None:
            return None
        for order, measured in found[0].items():
            kinds = sorted(measured["kinds"])
            lines.append([
                stage_name, order, *(f"{mean(found, order, 'all', key):.1f}" for key in ("exact", "precision", "recall")),
                f"{mean(found, order, 'all', 'chosen_k'):.2f}", ", ".join(f"{one[order]['all']['exact']:.1f}" for one in found),
                *(f"{mean(found, order, 'kinds', kind, 'exact'):.0f} ({mean(found, order, 'kinds', kind, 'chosen_k'):.1f})" for kind in kinds),
            ])
    return markdown_table(["model", "order", "exact set", "precision", "recall", "k", "of each seed", *kinds], lines)


def rounds_table(runs: list[str]) -> str | None:
    """What the rounds of scripts/iterate.sh rewarded and preferred; None where a run has no rounds."""
    found = of_each_seed(runs, "rounds/rounds.json")
    if found is None:
        return None
    lines = []
    for number, of_round in enumerate(zip(*(seed["rounds"] for seed in found), strict=False)):  # as many as the shortest has
        line = [str(number), f"{mean(of_round, 'dev', 'score'):.1f}", f"{mean(of_round, 'dev', 'documents'):.2f}"]
        lines.append(line + [form.format(mean(of_round, *keys)) if number else "" for _, keys, form in ROUND_COLUMNS])
    return markdown_table(["round", "score on dev", "documents", *(column for column, _, _ in ROUND_COLUMNS)], lines)


def main(argv=None):
    args = parse_args(argv)
    systems = read_systems(args.runs, args.set, args.seed)
    fixed = [selector for selector in FIXED if (ANSWERS, "dpo", selector) in systems]
    if not fixed:
        raise UserError(f"{args.runs[0]}/results: has no results of the dpo model with a fixed k; set SELECTORS to some of {', '.join(FIXED)}")
    best = max(fixed, key=lambda selector: systems[ANSWERS, "dpo", selector].score)
    compared = comparisons(systems, best, args.seed)
    differences = [[name, f"{found.difference:+.1f}", f"{found.low:+.1f} to {found.high:+.1f}", f"{found.p:.4f}"] for name, found in compared.items()]
    questions = len(systems[ANSWERS, "dpo", DYNAMIC].scores)
    choice, rounds = choice_table(args.runs, args.set), rounds_table(args.runs)
    text = "\n\n".join([
        f"{questions} questions, {len(args.runs)} seeds; scores are each kind's own metric, 0 to 100.", system_table(systems),
        "Differences, question by question:\n\n" + markdown_table(["", "difference", "95 %", "p"], differences),
        "By kind, score and documents read in brackets:\n\n" + kind_table(systems, best, args.seed),
        *([f"Exact selections where every needed document is among the five shown:\n\n{choice}"] if choice else []),
        *([f"Rounds of sampling, reward and DPO; correlations are of the reward, over trajectories:\n\n{rounds}"] if rounds else []),
    ])
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_writer(folder / "evidence.md") as file:
        file.write(f"{text}\n".encode())
    figures = {f"{args.set}{documents}_{stage_name}_{selector}": {"score": system.score, "seeds": system.summaries} for (documents, stage_name, selector), system in systems.items()}
    with atomic_writer(folder / "evidence.json") as file:
        file.write(orjson.dumps({"runs": args.runs, "best_fixed": best, "systems": figures,
                                 "compared": {name: found._asdict() for name, found in compared.items()}}, option=orjson.OPT_INDENT_2))
    print(text)
    log.info("%s and evidence.json", folder / "evidence.md")


if __name__ == "__main__":
    stage.run(main)

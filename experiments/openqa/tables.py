"""Compare all systems of experiments/openqa.sh on the test questions: answers, selections, costs, and the two hypotheses.

The fixed number of documents to compare with is the one with the best token F1 on the dev questions. The hypotheses were
written down before the test questions were answered: H1, DPO has a higher F1 than this fixed number; H2, DPO has a higher
F1, and chooses documents with a higher F1, than more cloning (bc_plus). Their p values are corrected together (Holm).
All other differences are exploratory. Intervals are from crossed random effects over seeds and questions.

Reads    RUN/results/{dev,test}_SYSTEM.json             systems without seeds
         RUN/seed_N/results/{dev,test}_ARM.json         arms, by seed
Writes   OUTPUT_FILE    figures; per system and question, in the order of "questions", F1, EM and the chosen documents
         TABLE_FILE     the tables

    .venv/bin/python experiments/openqa/tables.py --run runs/openqa --output_file runs/openqa/openqa.json --table_file runs/openqa/openqa.md
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
from lists import set_f1

from dynamicrag import stage
from dynamicrag.evaluation.crossed import balanced, crossed, holm
from dynamicrag.evaluation.metrics import score_row
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.jsonio import read_json
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.records import read_rows
from dynamicrag.stage import UserError, log

NAMES = {
    "none": "no document", **{f"top{k}": f"first {k}" for k in range(1, 21)}, "monot5": "reranker's labels", "adaptive": "largest gap",
    "question_k": "k from the question alone", "zero_shot": "selector, untrained", "gold": "needed documents in the list",
    "bc": "cloning", "bc_plus": "more cloning", "dpo": "DPO, F1 reward", "dpo_likelihood": "DPO, likelihood reward", "best_of_n": "best of n",
    "grpo": "GRPO", "kto": "KTO", "gold_sft": "cloning of the needed documents",
}
ARMS = {"gold": "gold_sft"}  # arms whose name is that of a system without seeds
FIXED = re.compile(r"none|top\d+")


class Cells(NamedTuple):
    """What one system did, each [seeds, questions]; `documents` has the ids of the chosen documents.

    A system without training has no `seeds`, and one line of cells.
    """

    seeds: list[int]
    f1: np.ndarray
    em: np.ndarray
    selection_f1: np.ndarray
    exact: np.ndarray
    k: np.ndarray
    prompt_tokens: np.ndarray
    documents: list[list[list[str]]]


class Questions(NamedTuple):
    """The questions of a split, in order."""

    ids: list[str]
    sets: list[str]
    needed: list[int]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--run", required=True, help="folder of the run")
    parser.add_argument("--output_file", required=True, help="figures")
    parser.add_argument("--table_file", required=True, help="tables")
    return parser.parse_args(argv)


def files_of(run: Path, split: str) -> dict[str, list[Path]]:
    """Return the result files of a split by system, those of an arm in the order of the seeds."""
    files = {path.stem.removeprefix(f"{split}_"): [path] for path in sorted(run.glob(f"results/{split}_*.json"))}
    for path in sorted(run.glob(f"seed_*/results/{split}_*.json"), key=lambda path: int(path.parts[-3].removeprefix("seed_"))):
        name = path.stem.removeprefix(f"{split}_")
        files.setdefault(ARMS.get(name, name), []).append(path)
    return {name: files[name] for name in sorted(files, key=lambda name: (list(NAMES).index(name) if name in NAMES else len(NAMES), name))}


def read_systems(run: Path, split: str) -> tuple[Questions, dict[str, Cells]]:
    """Return the questions of a split and the cells of every system. Raises UserError if two files have other questions."""
    questions: Questions | None = None
    systems = {}
    for name, paths in files_of(run, split).items():
        seeds = []
        for path in paths:
            rows = {row["id"]: row for row in read_rows(path, ("answers", "gold_docs"))}
            if questions is None:
                questions = Questions(list(rows), [row["dataset"] for row in rows.values()], [len(set(row["gold_docs"])) for row in rows.values()])
            if rows.keys() != set(questions.ids):
                raise UserError(f"{path}: its questions differ from those of other results of {split}; remove it and run experiments/openqa.sh again")
            of_seed = []
            for row in map(rows.__getitem__, questions.ids):
                chosen, needed = set(row["final_docs"]), set(row["gold_docs"])
                of_seed.append((score_row("f1", row["response"], row) or 0.0, score_row("em", row["response"], row) or 0.0, set_f1(chosen, needed),
                                float(chosen == needed), len(chosen), row["usage"]["prompt_tokens"], row["final_docs"]))
            seeds.append(of_seed)
        *numbers, documents = zip(*(zip(*of_seed, strict=True) for of_seed in seeds), strict=True)
        numbered = [int(path.parts[-3].removeprefix("seed_")) for path in paths if path.parts[-3].startswith("seed_")]
        systems[name] = Cells(numbered, *(np.array(number, dtype=float) for number in numbers), [list(of_seed) for of_seed in documents])
    if questions is None:
        raise UserError(f"{run}: has no results of the split {split}; run experiments/openqa.sh")
    return questions, systems


def best_fixed(systems: dict[str, Cells]) -> str:
    """Return the fixed number of documents with the best mean F1; of equal ones, the fewest documents."""
    fixed = [name for name in systems if FIXED.fullmatch(name)]
    if not fixed:
        raise UserError("dev: has no result of a fixed number of documents; run experiments/openqa.sh")
    return max(fixed, key=lambda name: (systems[name].f1.mean(), -systems[name].k.mean()))


def macro(cells: np.ndarray, sets: Sequence[str]) -> float:
    """Return the mean over the data sets of their means."""
    names = np.asarray(sets)
    return float(np.mean([cells[:, names == name].mean() for name in sorted(set(sets))]))


def figures_of(cells: Cells, questions: Questions) -> dict:
    """Return the figures of a system; scores are from 0 to 100."""
    sets, needed = np.asarray(questions.sets), np.asarray(questions.needed)
    f1 = crossed(100 * cells.f1)
    return {
        "seeds": cells.seeds, "F1": f1.mean, "low": f1.low, "high": f1.high, "macro F1": 100 * macro(cells.f1, questions.sets),
        "EM": 100 * float(cells.em.mean()), "macro EM": 100 * macro(cells.em, questions.sets),
        "documents": float(cells.k.mean()), "prompt tokens": float(cells.prompt_tokens.mean()),
        "selection F1": 100 * float(cells.selection_f1.mean()), "exact": 100 * float(cells.exact.mean()),
        "F1 by set": {name: 100 * float(cells.f1[:, sets == name].mean()) for name in sorted(set(questions.sets))},
        "EM by set": {name: 100 * float(cells.em[:, sets == name].mean()) for name in sorted(set(questions.sets))},
        "k by needed": {str(number): float(cells.k[:, needed == number].mean()) for number in sorted(set(questions.needed))},
    }


def differences(first: Cells, second: Cells, measure: str) -> tuple[list[int], np.ndarray]:
    """Return the seeds, and first minus second in points, [seeds, questions].

    Two arms are compared at the seeds that both have, any other system with every seed of an arm.
    """
    seeds = sorted({*first.seeds} & {*second.seeds}) if first.seeds and second.seeds else first.seeds or second.seeds

    def cells(system: Cells) -> np.ndarray:
        values = getattr(system, measure)
        return values[[system.seeds.index(seed) for seed in seeds]] if system.seeds else values

    return seeds, 100 * (cells(first) - cells(second))


def comparisons(systems: dict[str, Cells], fixed: str, sets: Sequence[str]) -> dict[str, list[dict]]:
    """Return the differences: the hypotheses, with Holm's correction, and the exploratory ones."""
    tests = [("H1", "dpo", fixed, "f1"), ("H2", "dpo", "bc_plus", "f1"), ("H2", "dpo", "bc_plus", "selection_f1")]
    others = [("", arm, other, "f1") for arm, cells in systems.items() if not FIXED.fullmatch(arm)
              for other in ((fixed, "question_k", "bc_plus") if cells.seeds else (fixed,)) if other != arm]
    compared: dict[str, list[dict]] = {"hypotheses": [], "exploratory": []}
    for name, arm, other, measure in (*tests, *others):
        if arm not in systems or other not in systems or (not name and (arm, other, measure) in [test[1:] for test in tests]):
            continue
        seeds, points = differences(systems[arm], systems[other], measure)
        if not len(points):
            continue
        result = crossed(points)
        compared["hypotheses" if name else "exploratory"].append({
            "name": name, "system": arm, "minus": other, "measure": measure, "seeds": seeds,
            **{key: getattr(result, key) for key in ("mean", "low", "high", "p")},
            "macro": crossed(balanced(points, sets)).mean,
        })
    for row, p in zip(compared["hypotheses"], holm([row["p"] for row in compared["hypotheses"]]), strict=True):
        row["holm"] = p
    return compared


def trainings(run: Path) -> list[dict]:
    """Return, per seed and arm, the rows and sequences that were trained on, and the tokens that the generator read and wrote for them."""
    found = []
    for folder in sorted(run.glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_"))):
        answered = folder / "answered.jsonl"
        samples = sum(row["generator_tokens"] for _, row in read_json(answered)) if answered.is_file() else 0
        scored = (read_manifest(folder / "likelihood.jsonl") or {}).get("counts", {}).get("likelihood_tokens", 0)
        for rows_file in sorted(folder.glob("*/training_data/*reranker*.json")):
            if rows_file.name.endswith(".manifest.json"):
                continue
            arm, rows = rows_file.parts[-3], [row for _, row in read_json(rows_file)]
            settings = "".join(path.read_text(encoding="utf-8") for path in folder.glob(f"{arm}/model/*/settings.txt"))
            rows = rows[: int(limit[1])] if (limit := re.search(r"max_samples=(\d+)", settings)) else rows
            rewarded = not rows_file.name.startswith("reranker_bc")
            tokens = (scored if "likelihood" in arm else samples) if rewarded else 0
            found.append({"seed": folder.name.removeprefix("seed_"), "arm": arm, "rows": len(rows), "sequences": sum(2 if "chosen" in row else 1 for row in rows),
                          "generator tokens": tokens})
        if manifest := read_manifest(folder / "grpo/model/grpo/grpo.jsonl"):
            counts = manifest["counts"]
            groups = counts["groups"] - counts["left_out"]
            found.append({"seed": folder.name.removeprefix("seed_"), "arm": "grpo", "rows": groups, "sequences": groups * manifest["arguments"]["num_samples"],
                          "generator tokens": (counts["generator_prompt_tokens"] or 0) + (counts["generator_generated_tokens"] or 0)})
    return found


def tables(figures: dict) -> str:
    """Return the tables in Markdown."""
    systems, fixed = figures["systems"], figures["fixed"]
    sets = list(next(iter(systems.values()))["F1 by set"])
    needed = list(next(iter(systems.values()))["k by needed"])

    def label(name: str) -> str:
        return NAMES.get(name, name) + (" (chosen on dev)" if name == fixed else "")

    main_table = markdown_table(
        ["system", "seeds", "F1", "macro F1", "EM", "documents", "prompt tokens", "selection F1", "exact"],
        [[label(name), str(len(of["seeds"]) or ""), f"{of['F1']:.1f} ({of['low']:.1f} to {of['high']:.1f})", f"{of['macro F1']:.1f}", f"{of['EM']:.1f}",
          f"{of['documents']:.2f}", f"{of['prompt tokens']:.0f}", f"{of['selection F1']:.1f}", f"{of['exact']:.1f}"] for name, of in systems.items()])
    by_set = markdown_table(["F1 / EM by data set", *sets],
                            [[label(name), *(f"{of['F1 by set'][one]:.1f} / {of['EM by set'][one]:.1f}" for one in sets)] for name, of in systems.items()])
    by_k = markdown_table(["documents, by number needed", *needed], [[label(name), *(f"{of['k by needed'][one]:.2f}" for one in needed)] for name, of in systems.items()])
    parts = [main_table, by_set, by_k]
    for kind, columns in (("hypotheses", ["p", "holm"]), ("exploratory", ["p"])):
        rows = [[row["name"] or "", f"{label(row['system'])} minus {label(row['minus'])}", row["measure"].replace("_", " "), str(len(row["seeds"]) or ""),
                 f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})", f"{row['macro']:+.2f}", *(f"{row[column]:.3f}" for column in columns)]
                for row in figures[kind]]
        parts.append(markdown_table([kind, "difference", "of", "seeds", "points", "macro", *("p, corrected" if column == "holm" else column for column in columns)], rows))
    columns = ["arm", "seed", "rows", "sequences", "generator tokens"]
    parts.append(markdown_table(["trained", *columns[1:]], [[label(ARMS.get(row["arm"], row["arm"])), *(str(row[column]) for column in columns[1:])]
                                                            for row in figures["trainings"]]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    run = Path(args.run)
    _, dev = read_systems(run, "dev")
    questions, systems = read_systems(run, "test")
    fixed = best_fixed(dev)
    if fixed not in systems:
        raise UserError(f"{run / 'results'}/test_{fixed}.json: does not exist; run experiments/openqa.sh again, which continues")
    figures = {
        "fixed": fixed, "dev F1": {name: 100 * float(cells.f1.mean()) for name, cells in dev.items()},
        "systems": {name: figures_of(cells, questions) for name, cells in systems.items()},
        **comparisons(systems, fixed, questions.sets), "trainings": trainings(run),
        "questions": dict(zip(questions.ids, questions.sets, strict=True)),
        "cells": {name: {"f1": cells.f1.round(4).tolist(), "em": cells.em.tolist(), "documents": cells.documents} for name, cells in systems.items()},
    }
    text = tables(figures)
    for path, content in ((args.output_file, orjson.dumps(figures)), (args.table_file, f"{text}\n".encode())):
        with atomic_writer(path) as file:
            file.write(content)
    log.info("%s: %d systems on %d questions; %s was chosen on dev", args.output_file, len(systems), len(questions.ids), NAMES.get(fixed, fixed))


if __name__ == "__main__":
    stage.run(main)

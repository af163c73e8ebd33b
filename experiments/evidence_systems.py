"""The systems of the evidence run: the figures of one model with one selector over all seeds, read from the seeds' files."""

import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from dynamicrag.stage import UserError

Key = tuple[str, str, str]  # model, documents shown, selector

FIXED = ("none", "top1", "top2", "top3", "all")
QUESTION = "k from the question"
# (documents shown, selector) -> name in the tables.
NAMES = {
    ("retrieved", "none"): "none", ("retrieved", "top1"): "top 1", ("retrieved", "top2"): "top 2", ("retrieved", "top3"): "top 3",
    ("retrieved", "all"): "all five shown", ("retrieved", "monot5"): "reranker labels", ("retrieved", "dynamic"): "DynamicRAG",
    ("retrieved", "gold"): "gold among those shown", (QUESTION, "monot5"): QUESTION, ("retrieved", "kind"): "k by kind of question",
    ("all needed", "dynamic"): "DynamicRAG, all gold shown", ("all needed", "gold"): "all gold",
}
MODELS = {"sft": "SFT", "dpo": "DPO", "sft_top3": "SFT with top 3"}  # folder -> name in the tables
DYNAMIC, GOLD, ALL_GOLD = ("dpo", "retrieved", "dynamic"), ("dpo", "retrieved", "gold"), ("dpo", "all needed", "gold")
LABELS, BY_KIND, BY_QUESTION = ("dpo", "retrieved", "monot5"), ("dpo", "retrieved", "kind"), ("dpo", QUESTION, "monot5")
DYNAMIC_SFT, TOP3_TRAINED = ("sft", "retrieved", "dynamic"), ("sft_top3", "retrieved", "top3")
COMPARED = (DYNAMIC_SFT, DYNAMIC, GOLD, ALL_GOLD)  # every seed must have these
# Number of documents by the kind of a question. It is known to whoever wrote the questions, and needs no document.
SELECTOR_OF_KIND = {
    "none": "none", "one": "top1", "verify": "top1", "two": "top2", "bridge": "top2", "ambiguous": "top2", "long": "top2", "many": "top3",
}


class System(NamedTuple):
    """One model with one selector, over all seeds."""

    seeds: list[dict]  # its figures in each seed
    scores: np.ndarray  # [seeds, questions], 0 to 100

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    def macro(self) -> float:
        """Return the mean over kinds of equal weight."""
        return statistics.fmean(statistics.fmean(of_kind["score"] for of_kind in one["kinds"].values()) for one in self.seeds)


def read_seeds(paths: list[str]) -> list[dict]:
    """Return the seeds. Raises UserError naming a file that is invalid or whose questions or labels differ from those of the first one."""
    seeds = []
    for path in paths:
        try:
            seeds.append(orjson.loads(Path(path).read_bytes()))
            seeds[-1] = {"labels": "gold", "dev": {}} | seeds[-1]  # the first files lack both
            questions = seeds[-1]["questions"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: not written by experiments/evidence_seed.py ({error!r}); run "
                            "experiments/evidence.sh again") from error
        if questions != seeds[0]["questions"]:
            raise UserError(f"{path}: its questions differ from those of {paths[0]}; give seeds with the same data/factbook and "
                            "sizes")
        if seeds[-1]["labels"] != seeds[0]["labels"]:
            raise UserError(f"{path}: trained from {seeds[-1]['labels']} labels, but {paths[0]} from {seeds[0]['labels']} labels; give "
                            "seeds of one kind")
    return seeds


def read_systems(seeds: list[dict], paths: list[str]) -> dict[Key, System]:
    """Return the systems of the first seed. Every other seed must have them too. "k by kind" is added if it can be computed."""
    by_seed = [{(one["model"], one["shown"], one["selector"]): one for one in seed["systems"]} for seed in seeds]
    for key in by_seed[0]:
        for path, found in zip(paths, by_seed, strict=True):
            if key not in found:
                raise UserError(f"{path}: lacks answers of the {key[0]} model with the selector {key[2]}, documents "
                                f"{key[1]}, which {paths[0]} has; run this seed again")
    systems = {key: System(figures := [found[key] for found in by_seed], 100 * np.array([one["scores"] for one in figures])) for key in by_seed[0]}
    kinds = [*seeds[0]["questions"].values()]
    for model in ("sft", "dpo"):
        if added := by_kind(systems, model, kinds):
            systems[model, "retrieved", "kind"] = added
    order = [(model, shown, selector) for of in (("retrieved", QUESTION), ("all needed",)) for model in MODELS for shown, selector in NAMES if shown in of]
    return {key: systems[key] for key in order if key in systems}


def by_kind(systems: dict[Key, System], model: str, kinds: list[str]) -> System | None:
    """Return the system that takes SELECTOR_OF_KIND's fixed number of documents; None if a kind or an answer is missing.

    Its answers are those of the fixed numbers. The quality of its selections and its prompt tokens are not known.
    """
    wanted = {kind: (model, "retrieved", SELECTOR_OF_KIND.get(kind, "")) for kind in kinds}
    if not all(key in systems for key in wanted.values()):
        return None
    scores = np.stack([systems[wanted[kind]].scores[:, at] for at, kind in enumerate(kinds)], axis=1)
    figures = []
    for seed, marks in enumerate(scores):
        of_kind = {kind: systems[key].seeds[seed]["kinds"][kind] for kind, key in sorted(wanted.items())}
        documents = statistics.fmean(of_kind[kind]["documents"] for kind in kinds)
        figures.append({"score": float(marks.mean()), "documents": documents, "kinds": of_kind} | dict.fromkeys(("exact", "precision", "recall", "prompt_tokens")))
    return System(figures, scores)


def fixed_number(seeds: list[dict], systems: dict[Key, System], path: str) -> tuple[str, str]:
    """Return the fixed selector with the highest score of the DPO model, and the questions that decided: dev or test.

    The score is the mean over seeds. Dev questions decide if every seed has answers to them.
    """
    asked = {"dev": [seed["dev"].get("systems", []) for seed in seeds], "test": [seed["systems"] for seed in seeds]}
    for decided_by, of_seeds in asked.items():
        scores = [{one["selector"]: one["score"] for one in of_seed if (one["model"], one["shown"]) == ("dpo", "retrieved")} for of_seed in of_seeds]
        common = [selector for selector in FIXED if all(selector in found for found in scores) and ("dpo", "retrieved", selector) in systems]
        if common:
            return max(common, key=lambda selector: statistics.fmean(found[selector] for found in scores)), decided_by
    raise UserError(f"{path}: contains no answers of the dpo model with a fixed k; set SELECTORS to some of {', '.join(FIXED)}")

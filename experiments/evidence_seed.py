"""Summarise one seed of experiments/evidence.sh in a small file: figures of every system, and its score and selection for
every question.

The file contains no times or paths. The same seed therefore gives the same bytes, and seeds from different machines can
be combined (experiments/evidence.py).

Reads    RUN/results/SET_MODEL_SELECTOR.json            answers from the retrieved documents
         RUN/results/SET_question_MODEL_monot5.json     the same from k documents, with k from the question alone
         RUN/results/SET_oracle_MODEL_SELECTOR.json     the same with every needed passage among the documents shown
         RUN/results/SET_MODEL_choice.json              selections from those, in the retriever's order and shuffled
         RUN/rounds/rounds.json                         samples, rewards and pairs; the last two files are optional
Writes   OUTPUT_FILE    {"labels", "questions": {id: kind}, "systems": [{"model", "selector", "shown", figures, and in the questions'
                        order "scores" and "chosen": positions among the documents shown}], "dev": {"questions", "systems"},
                        "choice": {model: {order: ...}}, "rounds": [figures of a round]}

    .venv/bin/python experiments/evidence_seed.py --run runs/evidence_reranker/seed_1 --output_file runs/evidence_reranker/seed_1.json
"""

import argparse
import functools
import operator
from collections.abc import Sequence
from pathlib import Path

import orjson
from evidence_systems import COMPARED, MODELS, NAMES, QUESTION

from dynamicrag import stage
from dynamicrag.evaluation.answers import summarise
from dynamicrag.evaluation.results import result_rows
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import UserError, log

SHOWN = {"retrieved": "", QUESTION: "_question", "all needed": "_oracle"}  # documents shown -> suffix of the set in file names
CHOOSERS = ("sft", "dpo")  # models that select documents
# Figure of a round -> its source: the summary of a stage, then keys.
ROUND = {
    "reward": ("reward", "reward", "mean"), "right": ("reward", "em", "mean"),
    "reward with right": ("reward", "reward", "correlation_with_em"), "reward with k": ("reward", "reward", "correlation_with_k"),
    **{figure: ("pairs", "all", figure) for figure in ("pairs", "margin", "k chosen", "k rejected", "only shorter", "gold in chosen", "gold in rejected")},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--run", required=True, help="folder of the seed")
    parser.add_argument("--set", default="test", help="name of the evaluation set")
    parser.add_argument("--dev_set", default="dev", help="name of the set on which the fixed number of documents is chosen, if it was answered")
    parser.add_argument("--labels", default="gold", choices=["gold", "reranker"], help="labels from which the models were trained")
    parser.add_argument("--output_file", required=True, help="figures of the seed")
    parser.add_argument("--bootstrap_seed", type=int, default=42, help="seed of the intervals")
    return parser.parse_args(argv)


def system_figures(path: Path, seed: int) -> tuple[dict, dict[str, float], dict[str, dict]]:
    """Return, for a result file, its figures from 0 to 100, and by question the score in [0, 1] and the row."""
    rows = list(result_rows(str(path), None, None, None))
    summary, scores = summarise(rows, None, "kind", seed, str(path))
    return {
        **{key: summary[key] for key in ("score", "low", "high", "documents", "prompt_tokens", "unanswered")},
        **{key: summary["selection"][key] for key in ("exact", "precision", "recall")},
        "kinds": {kind: {"score": of_kind["score"], "documents": of_kind["documents"]} for kind, of_kind in summary["groups"].items()},
    }, scores, {row["id"]: row for row in rows}


def all_systems(run: Path, name: str, seed: int, required: Sequence[tuple[str, str, str]]) -> tuple[dict[str, str], list[dict]]:
    """Return the questions' kinds and all systems that answered the set `name`.

    Raises UserError naming a file that has other questions, or that is missing although its system is `required`.
    """
    questions: dict[str, str] = {}
    systems = []
    for model, shown, selector in ((model, shown, selector) for shown in SHOWN for model in MODELS for of, selector in NAMES if of == shown):
        path = run / f"results/{name}{SHOWN[shown]}_{model}_{selector}.json"
        if not path.is_file():
            if (model, shown, selector) in required:
                raise UserError(f"{path}: does not exist; run experiments/evidence.sh again, which continues")
            continue
        figures, scores, rows = system_figures(path, seed)
        questions = questions or {row_id: row["kind"] for row_id, row in rows.items()}
        if scores.keys() != questions.keys():
            raise UserError(f"{path}: its questions differ from those of the other results; remove it and run "
                            "experiments/evidence.sh again")
        systems.append({
            "model": model, "selector": selector, "shown": shown, **figures, "scores": [scores[row_id] for row_id in questions],
            "chosen": [rows[row_id].get("id_list") for row_id in questions],  # None if the question was not answered
        })
    return questions, systems


def read_figures(path: Path) -> dict:
    """Read a JSON file of the run; empty if there is none."""
    return orjson.loads(path.read_bytes()) if path.is_file() else {}


def round_figures(summaries: dict) -> dict[str, float]:
    """Return a round's dev score and documents, and, except for round 0, its rewards and pairs."""
    found = {"score": summaries["dev"]["score"], "documents": summaries["dev"]["documents"]}
    if "reward" in summaries:
        found |= {figure: functools.reduce(operator.getitem, keys, summaries) for figure, keys in ROUND.items()}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    run, output = Path(args.run), Path(args.output_file)
    questions, systems = all_systems(run, args.set, args.bootstrap_seed, COMPARED)
    dev = dict(zip(("questions", "systems"), all_systems(run, args.dev_set, args.bootstrap_seed, ()), strict=True))
    choice = {model: read_figures(run / f"results/{args.set}_{model}_choice.json") for model in CHOOSERS}
    rounds = [round_figures(summaries) for summaries in read_figures(run / "rounds/rounds.json").get("rounds", [])]
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(output) as file:
        file.write(orjson.dumps({
            "labels": args.labels, "questions": questions, "systems": systems, "dev": dev if dev["systems"] else {},
            "choice": choice if all(choice.values()) else {}, "rounds": rounds,
        }, option=orjson.OPT_APPEND_NEWLINE))
    log.info("%s: %d systems, %d questions", output, len(systems), len(questions))


if __name__ == "__main__":
    stage.run(main)

"""Compare ways to teach a small model to select documents: exact selections on held-out countries by minutes of
training.

Each direction changes one setting of the warm-up (warm_up.py, recipes/smollm2_135m/warm_up.yaml) and trains on the same
number of tokens, which takes the same time on a CPU. Intermediate checkpoints select documents for test questions about
countries that are not in the training data (choice.py).

Reads    --train, --test    retriever.py's output for questions.py's train.jsonl and test.jsonl
Writes   --output_dir       DIRECTION.json, the curve of a direction; a direction with a curve is not trained again
         --table, --plot    all finished directions

    python examples/factbook/learning_curve.py --train runs/learning_curve/train.jsonl --test runs/learning_curve/test.jsonl

Without names after --directions, it writes table and plot only:

    python examples/factbook/learning_curve.py --output_dir docs/evidence/learning_curve --directions
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from oracle import ORDERS
from warm_up import ConversationOptions, conversations, read_questions

from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.llm.prompt_texts import DEFAULT_PROMPTS
from dynamicrag.llm.prompts import Prompts
from dynamicrag.stage import ArgumentParser, UserError, log, run

RECIPE = "recipes/smollm2_135m/warm_up.yaml"
DOCUMENT = {
    "before": "[{n}] {title}\n{text}",
    "both sides": DEFAULT_PROMPTS["reranker"]["document"],
    "after": "{title}\n{text} [{n}]",
}


@dataclass(frozen=True)
class Direction:
    """One direction. Settings that are not given are those of the warm-up."""

    about: str
    questions: int = 10  # per conversation
    shuffled: float = 0.5
    first_docs: int = 5  # documents per conversation in the first half of the tokens; later 5
    identifier: str = "both sides"
    tokens: float = 1  # as a multiple of --tokens
    settings: dict = field(default_factory=dict)  # LLaMA-Factory settings that override the recipe
    trainer: tuple[str, ...] = ("-m", "llamafactory.cli", "train")


DIRECTIONS = {
    "warm-up": Direction("ten questions about the same five documents, half of them shuffled"),
    "twice as long": Direction("the same, on twice the tokens", tokens=2),
    "single": Direction("one question per sequence", questions=1, settings={"gradient_accumulation_steps": 4}),
    "single, higher rate": Direction("one question per sequence, 1e-3", questions=1, settings={"gradient_accumulation_steps": 4, "learning_rate": 1e-3}),
    "all shuffled": Direction("no document order", shuffled=1),
    "none shuffled": Direction("always the retriever's order", shuffled=0),
    "curriculum": Direction("two documents at first, then five", first_docs=2, settings={"disable_shuffling": True}),
    "identifier before": Direction("[1] before the document", identifier="before"),
    "identifier after": Direction("[1] after the document", identifier="after"),
    "rate 2e-4": Direction("learning rate 2e-4", settings={"learning_rate": 2e-4}),
    "rate 1e-3": Direction("learning rate 1e-3", settings={"learning_rate": 1e-3}),
    "batch of 8": Direction("eight conversations per step", settings={"gradient_accumulation_steps": 8, "learning_rate": 1e-3}),
    "loss on everything": Direction("loss on questions and documents too", settings={"train_on_prompt": True}),
    "loss on identifiers": Direction("loss on digits, None and the end only", trainer=("examples/factbook/identifier_loss.py",)),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--train", default="runs/learning_curve/train.jsonl",
                       help="questions with retrieved docs about training countries")
    group.add_argument("--test", default="runs/learning_curve/test.jsonl",
                       help="questions with retrieved docs about other countries")
    group.add_argument("--passages", default="data/factbook/passages.jsonl", help="passages written by corpus.py")
    group.add_argument("--model", default="models/smollm2-135m", help="checkpoint to start from")
    group.add_argument("--output_dir", default="runs/learning_curve", help="folder of the curves")
    group.add_argument("--table", default="runs/learning_curve/table.md", help="table of all finished directions")
    group.add_argument("--plot", default="runs/learning_curve/curves.png", help="plot of all finished directions")
    group = parser.add_argument_group("directions")
    group.add_argument("--directions", nargs="*", choices=DIRECTIONS, default=[*DIRECTIONS], metavar="NAME", help=", ".join(DIRECTIONS))
    group.add_argument("--tokens", type=int, default=120_000, help="training tokens per direction")
    group.add_argument("--points", type=int, default=2, help="number of checkpoints measured, including the last")
    group.add_argument("--questions", type=int, default=150, help="number of test questions")
    group.add_argument("--n_docs", type=int, default=5, help="number of documents shown in the test")
    group.add_argument("--trainer", default=".venv-train/bin/python", help="Python of LLaMA-Factory's environment")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    return parser.parse_args(argv)


def training_rows(direction: Direction, rows: list[dict], passages: dict, prompts: Prompts, args: argparse.Namespace) -> tuple[list[dict], int]:
    """Return as many conversations as fit the direction's tokens, and their number of tokens."""
    from transformers import AutoTokenizer

    wanted = direction.tokens * args.tokens
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made: list[dict] = []
    read = 0
    for n_docs, until in ((direction.first_docs, wanted / 2), (5, wanted)):
        options = ConversationOptions("reranker", n_docs, direction.questions, direction.shuffled, args.seed)
        for row in conversations(rows[len(made):], passages, options, prompts):
            if read >= until:
                break
            made.append(row)
            turns = [text for turn in row["history"] for text in turn]
            read += sum(map(len, tokenizer([row["system"], *turns, row["instruction"], row["output"]])["input_ids"]))
    if read < wanted:
        raise UserError(f"{args.train}: {len(rows)} questions give {read} tokens, fewer than {wanted:.0f}; create "
                        "more with questions.py --train")
    return made, read


def train(folder: Path, direction: Direction, made: list[dict], args: argparse.Namespace) -> list[Path]:
    """Run LLaMA-Factory once. Returns its checkpoints in order. Raises UserError if it fails."""
    write_json(folder / "factbook_warm_up.json", made)
    info = json.loads(Path("recipes/dataset_info.json").read_text())["factbook_warm_up"] | {"file_name": "factbook_warm_up.json"}
    (folder / "dataset_info.json").write_text(json.dumps({"factbook_warm_up": info}))
    settings = yaml.safe_load(Path(RECIPE).read_text()) | direction.settings
    steps = -(-len(made) // settings["gradient_accumulation_steps"])
    settings |= {
        "model_name_or_path": args.model, "dataset_dir": str(folder), "output_dir": str(folder / "model"), "overwrite_output_dir": True,
        "save_steps": -(-steps // args.points), "save_total_limit": None, "save_only_model": True, "plot_loss": False, "seed": args.seed,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    shutil.rmtree(folder / "model", ignore_errors=True)
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "train.log").open("wb") as output:
        done = subprocess.run([args.trainer, *direction.trainer, str(folder / "settings.yaml")], stdout=output, stderr=output, env=environment)
    if done.returncode:
        raise UserError(f"{folder / 'train.log'}: LLaMA-Factory failed; see this log")
    return sorted((folder / "model").glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def follow(name: str, args: argparse.Namespace, rows: list[dict], passages: dict) -> None:
    """Train one direction and measure each checkpoint in a separate process, because a process can hold one vLLM engine only."""
    direction, folder = DIRECTIONS[name], curve_file(args.output_dir, name).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%s: %s", name, direction.about)
    words = folder / "prompts.yaml"
    words.write_text(yaml.safe_dump({"reranker": {"document": DOCUMENT[direction.identifier]}}))
    made, tokens = training_rows(direction, rows, passages, Prompts(str(words)), args)
    checkpoints = train(folder, direction, made, args)
    elapsed = {line["current_steps"]: line["elapsed_time"] for line in map(json.loads, (folder / "model/trainer_log.jsonl").open())}
    steps, points = step_of(checkpoints[-1]), []
    for checkpoint in checkpoints:
        measured = folder / f"{checkpoint.name}.json"
        files = ["--model", str(checkpoint), "--input_file", args.test, "--passages", args.passages, "--prompts", str(words), "--output_file", str(measured)]
        asked = ["--questions", str(args.questions), "--n_docs", str(args.n_docs), "--seed", str(args.seed)]
        subprocess.run([sys.executable, str(Path(__file__).with_name("choice.py")), *files, *asked], check=True)
        share = step_of(checkpoint) / steps
        hours, minutes, seconds = map(int, elapsed[max(step for step in elapsed if step <= step_of(checkpoint))].split(":"))
        points.append({
            "step": step_of(checkpoint), "minutes": hours * 60 + minutes + seconds / 60, "tokens": round(share * tokens),
            "conversations": round(share * len(made)), "selections": round(share * sum(len(row["history"]) + 1 for row in made)),
            **json.loads(measured.read_bytes()),
        })
        shutil.rmtree(checkpoint)
    write_json(curve_file(args.output_dir, name), [{"name": name, "about": direction.about, "points": points}])


def curve_file(folder: str, name: str) -> Path:
    return Path(folder) / f"{name.replace(' ', '_').replace(',', '')}.json"


def finished(folder: str) -> list[dict]:
    """Return the existing curves, in the order of DIRECTIONS."""
    return [curve for path in (curve_file(folder, name) for name in DIRECTIONS) if path.exists() for _, curve in read_json(path)]


def table(curves: list[dict]) -> str:
    header = ["direction", "description", "minutes", "selections", *(f"{what}, {order}" for order in ORDERS for what in ("exact", "precision", "recall", "k"))]
    lines = []
    for curve in curves:
        for number, point in enumerate(curve["points"]):
            figures = [point[order]["all"] for order in ORDERS]
            lines.append([
                *(["", ""] if number else [curve["name"], DIRECTIONS[curve["name"]].about]), f"{point['minutes']:.1f}", f"{point['selections']:,}",
                *(form.format(one[key]) for one in figures for key, form in (("exact", "{:.1f}"), ("precision", "{:.1f}"), ("recall", "{:.1f}"), ("chosen_k", "{:.2f}"))),
            ])
    return markdown_table(header, lines)


def kind_table(curves: list[dict], order: str) -> str:
    """Return, by kind, the exact selections of each direction's last checkpoint, with the chosen k in brackets."""
    kinds = [*curves[0]["points"][-1][order]["kinds"]]
    lines = []
    for curve in curves:
        found = [curve["points"][-1][order]["kinds"][kind] for kind in kinds]
        lines.append([curve["name"], *(f"{one['exact']:.0f} ({one['chosen_k']:.1f})" for one in found)])
    return markdown_table([f"exact (k), {order}", *kinds], lines)


def plot(curves: list[dict], path: str) -> None:
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    lines = cycler(linestyle=("-", "--")) * rcParams["axes.prop_cycle"]  # there are more directions than colours
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, order in zip(figure.subplots(1, 2, sharey=True), ORDERS, strict=True):
        axes.set_prop_cycle(lines)
        for curve in curves:
            points = curve["points"]
            axes.plot([point["tokens"] / 1000 for point in points], [point[order]["all"]["exact"] for point in points], marker="o", label=curve["name"])
        axes.set(title=f"documents in {'the retriever’s' if order == 'retrieval' else 'random'} order", xlabel="thousand tokens read", ylim=(0, 100))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("exact selections, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=144, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if missing := [name for name in args.directions if not curve_file(args.output_dir, name).exists()]:
        rows, passages = read_questions(args.train, args.passages)
        for name in missing:
            follow(name, args, rows, passages)
    if not (curves := finished(args.output_dir)):
        raise UserError(f"{args.output_dir}: contains no finished direction; give --directions to train")
    Path(args.table).parent.mkdir(parents=True, exist_ok=True)
    Path(args.table).write_text("\n\n".join([table(curves), *(kind_table(curves, order) for order in ORDERS)]) + "\n")
    plot(curves, args.plot)
    log.info("%s and %s: %d directions", args.table, args.plot, len(curves))


if __name__ == "__main__":
    run(main)

"""Write one table of all rounds of scripts/iterate.sh: sampling, reward, pairs, and the score on held-out questions.

Reads    ROUNDS_DIR/N/                 manifests of sampling, reward and pairs, and results/dev.metrics.json; 0: SFT
Writes   ROUNDS_DIR/rounds.md          the table
         ROUNDS_DIR/rounds.json        the same numbers, and the stages' complete summaries
         ROUNDS_DIR/best               the number of the round with the highest score; the earliest if several are equal

    python scripts/rounds.py --rounds_dir runs/demo_default/rounds --last 3 --model smollm2_135m
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson

from dynamicrag import stage
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.rows.identifiers import summarise_selections
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.records import read_rows
from dynamicrag.stage import UserError

# Column, its source (the summary of a stage, then keys), and its format.
COLUMNS = (
    ("score", ("dev", "score"), "{:.1f}"), ("low", ("dev", "low"), "{:.1f}"), ("high", ("dev", "high"), "{:.1f}"),
    ("documents", ("dev", "documents"), "{:.2f}"), ("None", ("dev", "none_share"), "{:.2f}"),
    ("sampled k", ("sampling", "k_mean"), "{:.2f}"), ("distinct", ("sampling", "distinct_selections"), "{:.2f}"),
    ("reward", ("reward", "reward", "mean"), "{:.3f}"), ("right", ("reward", "em", "mean"), "{:.3f}"),
    ("pairs", ("pairs", "all", "pairs"), "{}"), ("k chosen", ("pairs", "all", "k chosen"), "{:.2f}"),
    ("k rejected", ("pairs", "all", "k rejected"), "{:.2f}"), ("shorter", ("pairs", "all", "shorter"), "{:.2f}"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--rounds_dir", required=True, help="folder of the rounds")
    parser.add_argument("--last", type=int, required=True, help="number of the last round to compare")
    parser.add_argument("--model", required=True,
                        help="MODEL of the settings file, as in the names of the stages' files")
    return parser.parse_args(argv)


def read_round(folder: Path, model: str) -> dict[str, dict]:
    """Return the summaries of a round's stages. Raises UserError if one has not finished."""
    made = (folder / f"training_data/{model}_reranker_{kind}.json" for kind in ("best_of_n", "kto"))  # of other trainers, without figures of pairs
    outputs = {
        "sampling": folder / "results/training_data_dpo_sampling.json",
        "reward": folder / f"training_data/{model}_output_dpo.jsonl",
        "pairs": next((path for path in made if read_manifest(path)), folder / f"training_data/{model}_reranker_dpo.json"),
    }
    found = {}
    for name, path in outputs.items() if folder.name != "0" else ():
        manifest = read_manifest(path)
        if manifest is None:
            raise UserError(f"{path}: is not finished; run scripts/iterate.sh again")
        # Sharded sampling has no summary
        found[name] = manifest.get("summary") or (summarise_selections(read_rows(path)) if name == "sampling" else {})
    metrics = folder / "results/dev.metrics.json"
    if not metrics.is_file():
            raise UserError(f"{metrics}: does not exist; run scripts/iterate.sh again")
    try:
        [found["dev"]] = orjson.loads(metrics.read_bytes())["results"].values()
        float(found["dev"]["score"])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{metrics}: not written by evaluate.py ({error!r}); remove it and run scripts/iterate.sh "
                            "again") from error
    return found


def figure(summaries: dict, keys: tuple[str, ...]) -> float | None:
    """Return the figure under `keys`; None if the round has none."""
    for key in keys:
        summaries = summaries.get(key) if isinstance(summaries, dict) else None
    return summaries


def best_round(scores: list[float]) -> int:
    """Return the number of the round with the highest score; of equal rounds the earliest, because it needs least training."""
    return max(range(len(scores)), key=lambda number: (scores[number], -number))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(args.rounds_dir)
    rounds = [read_round(folder / str(number), args.model) for number in range(args.last + 1)]
    best = best_round([summaries["dev"]["score"] for summaries in rounds])
    cells = [
        [f"{number}{' (best)' if number == best else ''}"]
        + ["" if (value := figure(summaries, keys)) is None else form.format(value) for _, keys, form in COLUMNS]
        for number, summaries in enumerate(rounds)
    ]
    table = markdown_table(["round", *(column for column, _, _ in COLUMNS)], cells)
    for name, content in (
        ("rounds.md", f"{table}\n".encode()),
        ("rounds.json", orjson.dumps({"best": best, "rounds": rounds}, option=orjson.OPT_INDENT_2)),
        ("best", str(best).encode()),
    ):
        with atomic_writer(folder / name) as file:
            file.write(content)


if __name__ == "__main__":
    stage.run(main)

"""Measure speed and peak memory of LLaMA-Factory on a CPU for two implementations of attention and three ways to free memory.

Every combination trains on the same rows. The combinations take turns, --repeats times, and the best time and the
largest memory of each count. If there is no GPU, scripts/training.sh keeps freed blocks of up to 256 MiB and gives larger
blocks back. The recipes of the small model set `flash_attn: disabled`.

Reads    runs/demo_default/training_data/factbook_warm_up.json     LLaMA-Factory rows in Alpaca's format
Writes   standard output                                           a table of ratios in Markdown

    python benchmarks/training.py
    python benchmarks/training.py --model models/qwen2.5-coder-0.5b --recipe recipes/qwen25_coder_05b/sft.yaml \\
        --data runs/openqa/generator/training_data/generator_sft_training.json --dataset generator_sft --attention sdpa --rows 64
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import yaml

from dynamicrag import stage
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.stage import UserError, log

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = re.search(r"glibc\.malloc\.[\w.=:]+", (ROOT / "scripts/training.sh").read_text())[0]
ALL = re.sub(r"(?<=mmap_threshold=)\d+", str(4 << 30), CHOSEN)
ATTENTION = {"sdpa": "sdpa", "eager": "disabled"}
MEMORY = {"given back": {}, "large blocks given back": {"GLIBC_TUNABLES": CHOSEN}, "kept": {"GLIBC_TUNABLES": ALL}}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--data", default="runs/demo_default/training_data/factbook_warm_up.json", help="rows to train on")
    parser.add_argument("--dataset", default="factbook_warm_up", help="name of --data in recipes/dataset_info.json")
    parser.add_argument("--model", default="models/smollm2-135m", help="checkpoint to start from")
    parser.add_argument("--recipe", default="recipes/smollm2_135m/warm_up.yaml", help="recipe; its data set and folders are replaced")
    parser.add_argument("--trainer", default=".venv-train/bin/llamafactory-cli", help="LLaMA-Factory")
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION), help="implementations to compare")
    parser.add_argument("--rows", type=int, default=24, help="rows per run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each combination")
    return parser.parse_args(argv)


def measured(attention: str, memory: dict[str, str], folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Return LLaMA-Factory's train_runtime in seconds, which excludes its start and reading the data, and its peak memory in GiB."""
    settings = yaml.safe_load(Path(args.recipe).read_text()) | {
        "model_name_or_path": args.model, "dataset_dir": str(folder), "dataset": args.dataset, "output_dir": str(folder / "model"),
        "overwrite_output_dir": True, "flash_attn": attention, "max_samples": args.rows, "plot_loss": False,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    environment = {**os.environ, **memory, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log_file:
        trainer = subprocess.Popen([args.trainer, "train", str(folder / "settings.yaml")], stdout=log_file, stderr=log_file, env=environment)
        _, status, usage = os.wait4(trainer.pid, 0)
    if status:
        raise UserError(f"{args.trainer}: failed: {(folder / 'log').read_text()[-1500:]}; check --trainer, --recipe and --model")
    return json.loads((folder / "model/train_results.json").read_text())["train_runtime"], usage.ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not Path(args.data).is_file():
        raise UserError(f"{args.data}: no such file; create it with bash scripts/demo.sh or "
                        "examples/factbook/warm_up.py")
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        info = json.loads((ROOT / "recipes/dataset_info.json").read_text())[args.dataset] | {"file_name": str(Path(args.data).resolve())}
        (folder / "dataset_info.json").write_text(json.dumps({args.dataset: info}))
        for _ in range(args.repeats):
            for way in product(args.attention, MEMORY):
                taken.setdefault(way, []).append(measured(ATTENTION[way[0]], MEMORY[way[1]], folder, args))
                log.info("%s, memory %s: %.1f s, %.1f GiB", *way, *taken[way][-1])
    base = min(taken[args.attention[0], "given back"])[0]
    print(markdown_table(["attention", "freed memory", "rows per second", "ratio", "peak GiB"], [
        [*way, f"{args.rows / min(runs)[0]:.2f}", f"{base / min(runs)[0]:.2f}", f"{max(peak for _, peak in runs):.1f}"] for way, runs in taken.items()
    ]))


if __name__ == "__main__":
    stage.run(main)

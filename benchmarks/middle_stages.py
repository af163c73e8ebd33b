"""Measure memory and speed of the stages between the models, at two sizes, compared with a loop of json.loads and
json.dumps.

One artificial file has the keys that all stages read: questions with --docs documents of 100 words, the reranker's
scores and labels, trajectories, rewards and an answer. Each stage reads it in a process of its own, with its default
recipe and without a model: rewards are exact match, ROUGE-L and brevity. aggregate.py reads the parts that split_data.py
wrote. Token limits are estimated, or counted with --tokenizer, which takes longer.

"MB read" and "written" are what the process asked of the system, so that a file that is read twice counts twice. "MB/s"
is the size of the input per second of the processor, which depends less on other programs. "peak" is the largest
resident memory, and "anonymous" its part without a file. The last column is the growth of anonymous memory per
additional row. Each output is removed once it is measured: at most three times the size of both inputs is on disk, 20
GB for 15,000 and 150,000 rows of 50 documents.

    python benchmarks/middle_stages.py --rows 15000 150000 --docs 50
"""

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import measure
import orjson

from dynamicrag.stage import ArgumentParser

SHOWN, TRAJECTORIES = 40, 8
DIFFERENT, NUMBER = 2000, "@@@@@@@"  # rows that are made, and the place of a row's number in them
LOOP = """
import {module}, sys
with open(sys.argv[1], "rb") as read, open(sys.argv[2], "wb") as write:
    for line in read:
        write.write({dumps} + b"\\n")
"""
LOOPS = {  # the alternatives, for comparison
    "json.loads, json.dumps": LOOP.format(module="json", dumps="json.dumps(json.loads(line), ensure_ascii=False).encode()"),
    "orjson.loads, orjson.dumps": LOOP.format(module="orjson", dumps="orjson.dumps(orjson.loads(line))"),
}
STAGES = {  # the flags of each stage; {rows} is the artificial file
    "split_data": "--input_file {rows} --output_dir {out}/splits --num_splits 8",
    "aggregate": "--input_files {out}/splits/split_*.json --splits_dir {out}/none --output_file {out}/aggregated.jsonl",
    "evaluate_retrieval": "--results_file {rows} --output_file {out}/retrieval.json",
    "process_training_data": "--input_file {rows} --sequence_file {out}/sequence.jsonl --normal_file {out}/normal.jsonl",
    "split_for_sft_dpo": "--input_file {rows} --sft_file {out}/sft.jsonl --dpo_file {out}/dpo.jsonl",
    "reranker_sequence": "--input_file {rows} --output_file {out}/reranker_bc_training.json {length}",
    "construct_generator_sft": "--input_file {rows} --output_file {out}/generator_sft_training.json {length}",
    "reward_trajectories": "--input_file {rows} --output_file {out}/rewarded.jsonl --weights em=.4,rouge=.3,length=.3",
    "construct_dpo": "--input_file {rows} --reranker_file {out}/llama3_8b_reranker_dpo.json --generator_file {out}/llama3_8b_generator_dpo.json {length}",
    "evaluate": "--results_file {rows} --metric match --output_file {out}/metrics.json",
}
FIRST = "split_data.py"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--rows", type=int, nargs=2, default=[15_000, 150_000], help="two numbers of rows, the smaller one first")
    parser.add_argument("--docs", type=int, default=50, help="documents per row")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--no_loops", action="store_true", help="omit the comparison with loops over the file")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; token limits are then counted")
    parser.add_argument("--template", default="template/smollm2.jinja", help="chat template of that tokenizer")
    parser.add_argument("--folder", help="folder of the temporary files (default: that of the system)")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    args = parser.parse_args(argv)
    if not 0 < args.rows[0] < args.rows[1] or args.docs < SHOWN:
        parser.error(f"--rows must be two increasing numbers, and --docs at least {SHOWN}")
    return args


def made_rows(count: int, docs: int) -> Iterator[bytes]:
    """Yield rows with the keys of every stage, as lines: DIFFERENT ones in turn, each time with other ids and another question."""
    rng = random.Random(0)
    words = ["".join(rng.choices("bcdfglmnprst", k=1) + rng.choices("aeiou", k=1)) * rng.randint(1, 4) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    texts = [orjson.Fragment(orjson.dumps(" ".join(rng.choices(words, weights, k=100)))) for _ in range(2000)]
    made = []
    for number in range(count):
        if len(made) < DIFFERENT:
            made.append(orjson.dumps(_row(rng, words, texts, docs), option=orjson.OPT_APPEND_NEWLINE))
        yield made[number % DIFFERENT].replace(NUMBER.encode(), b"%07d" % number)


def _row(rng: random.Random, words: list[str], texts: list[orjson.Fragment], docs: int) -> dict:
    scores = sorted((rng.random() for _ in range(docs)), reverse=True)
    labels = [rng.random() < 0.1 for _ in scores]
    true_id = [position for position in range(1, SHOWN + 1) if labels[position - 1]]
    chosen = [rng.sample(range(1, SHOWN + 1), rng.randint(1, 6)) for _ in range(TRAJECTORIES)]
    answers = [" ".join(rng.choices(words, k=3)) for _ in range(2)]
    terms = [{"em": float(rng.random() < 0.5), "rouge": rng.random(), "length": 1 / (1 + len(ids))} for ids in chosen]
    return {
        "id": f"nq_{NUMBER}", "question": f"{' '.join(rng.choices(words, k=9))} {NUMBER}", "dataset": "nq", "answers": answers,
        "gold_docs": [f"{NUMBER}-{rng.randrange(docs)}"],
        "docs": [
            {"id": f"{NUMBER}-{place}", "title": words[rng.randrange(5000)], "text": texts[rng.randrange(2000)], "score": 2 - place / docs,
             "rerank_score": score, "rerank_label": str(label).lower()}
            for place, (score, label) in enumerate(zip(scores, labels, strict=True))
        ],
        "true_id": true_id, "false_id": [position for position in range(1, SHOWN + 1) if not labels[position - 1]],
        "true_count": len(true_id), "sequence": true_id[:14], "sequence_length": len(true_id[:14]), "docs_shown": SHOWN,
        "id_lists": chosen, "responses": [answers[0] if term["em"] else " ".join(rng.choices(words, k=3)) for term in terms],
        "response_tokens": [3] * TRAJECTORIES, "response_scores": [sum(term.values()) / 3 for term in terms], "score_terms": terms,
        "id_list": chosen[0], "final_docs": [f"{NUMBER}-{place - 1}" for place in chosen[0]], "response": answers[rng.randrange(2)],
        "usage": {"calls": 2, "prompt_tokens": 6000, "generated_tokens": 30},
    }


def measured(command: list[str], folder: Path, size: int) -> dict[str, float]:
    """Run a command; return its figures: seconds, those of the processor, MB read and written, and the peaks of memory in MB.

    Fingerprints of earlier stages are not used, because each file of a real run is new to its stage.
    """
    environment = {**os.environ, "PYTHONPATH": str(measure.REPOSITORY), "XDG_CACHE_HOME": str(folder / "cache")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would fill up with progress
        process = subprocess.Popen(command, cwd=measure.REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        peak = measure.watch_peak(process)
        seconds = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode()[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return {"seconds": seconds, "busy": busy, "MB/s": size / 1e6 / busy, **peak}


def commands(args: argparse.Namespace, folder: Path, rows: Path, out: Path) -> dict[str, list[str]]:
    """Return the command of every loop and stage, by name."""
    loops = {} if args.no_loops else LOOPS
    length = f"--tokenizer {args.tokenizer} --template {args.template}" if args.tokenizer else f"--tokenizer {folder}/none"
    return {
        **{name: [sys.executable, "-c", code, str(rows), str(out / "loop.jsonl")] for name, code in loops.items()},
        **{f"{name}.py": [sys.executable, f"{name}.py", *STAGES[name].format(rows=rows, out=out, length=length).split()] for name in args.stages},
    }


def measure_sizes(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the figures of every loop and stage for both numbers of rows."""
    (folder / "none").mkdir()
    files, sizes = [folder / f"rows_{count}.jsonl" for count in args.rows], []
    for rows, count in zip(files, args.rows, strict=True):
        with rows.open("wb") as file:
            file.writelines(made_rows(count, args.docs))
        sizes.append(rows.stat().st_size)
    outs = [folder / f"out_{count}" for count in args.rows]
    by_size = [commands(args, folder, rows, out) for rows, out in zip(files, outs, strict=True)]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in by_size[0]}
    for name in figures:
        for out, size, count, command in zip(outs, sizes, args.rows, by_size, strict=True):
            out.mkdir(exist_ok=True)
            figures[name].append({"rows": count, "input": size / 1e6, **measured(command[name], folder, size)})
            print(name, orjson.dumps(figures[name][-1]).decode(), file=sys.stderr, flush=True)
            if name != FIRST:  # the next stage reads its output
                shutil.rmtree(out)
    return figures


def main() -> None:
    args = parse_args()
    if "aggregate" in args.stages and args.stages[args.stages.index("aggregate") - 1] != "split_data":
        sys.exit("error: --stages: aggregate reads the parts of split_data; give split_data before it")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure_sizes(args, Path(folder))
    # Report
    lines = []
    for name, (few, many) in figures.items():
        grown = (many["anonymous"] - few["anonymous"]) / (many["rows"] - few["rows"])
        lines.append([
            name, *(f"{many[what]:,.0f}" for what in ("read", "written", "seconds", "busy", "MB/s")),
            *(f"{one[what]:.0f}" for what in ("peak", "anonymous") for one in (few, many)), f"{1e6 * grown:.0f}",
        ])
    few_rows, many_rows = (f"{count:,}" for count in args.rows)
    header = ["", "MB read", "MB written", "seconds", "of the processor", "MB/s", f"peak MB, {few_rows} rows", many_rows,
              f"anonymous MB, {few_rows}", many_rows, "bytes per row"]
    size, cores = next(iter(figures.values()))[1]["input"] / 1e3, len(os.sched_getaffinity(0))
    title = f"Stages between the models, {many_rows} rows of {args.docs} documents, {size:.2f} GB, {cores} core{'s' * (cores > 1)}"
    measure.report(title, header, lines, figures, args.output_file)


if __name__ == "__main__":
    main()

"""Measure the speed of sampling, compared with single requests without prefix reuse, and whether samples depend on the
batch.

    speed       the stage's two engine calls, compared with a loop that sends every sample and every answer alone and
                empties the prefix cache before each; and the floor: reading every prompt once and writing one token
    identical   share of trajectories that are unchanged, for one seed, if questions are sent one at a time, in chunks,
                or backwards: greedy and sampled, in bfloat16 and float32

Model and questions are those of the demo by default (`bash scripts/demo.sh`).

    python benchmarks/sampling.py --parts speed identical
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import measure

import sampling_dpo_trajectories
from dynamicrag.llm.engine import Request
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import RequestBuilder, load_builders
from dynamicrag.rows.identifiers import parse_ids
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.stage import ArgumentParser, UserError, options_from

DEMO = "runs/demo_default"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--parts", nargs="+", default=["speed", "identical"])
    parser.add_argument("--llm_model", default=f"{DEMO}/DynamicRAG_smollm2_135m/sft")
    parser.add_argument("--template", default="template/smollm2.jinja")
    parser.add_argument("--input_file", default=f"{DEMO}/training_data/training_data_dpo.jsonl")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--topn", type=int, default=5, help="documents shown")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"],
                        help="precisions of part identical; speed uses the first")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def stage_args(args: argparse.Namespace, *more: str) -> argparse.Namespace:
    flags = ["--llm-model", args.llm_model, "--template", args.template, "--topn", str(args.topn), "--max-model-len", "2048"]
    return sampling_dpo_trajectories.parse_args([*flags, *more])


def one_at_a_time(rows: list[Row], builder: RequestBuilder, settings: argparse.Namespace) -> list[list[list[int]]]:
    """Send every sample and every answer as a separate request without reuse, like a loop over a server's API."""
    def alone(request: Request) -> str:
        builder.engine._llm.reset_prefix_cache()
        return builder.engine.complete([request])[0].texts[0]

    chosen = []
    for row in rows:
        docs = builder.shown(row["question"], row["docs"][: settings.topn])
        chosen.append([])
        for sample in range(settings.num_samples):
            text = alone(builder.select(row, docs, f"sample {sample}", temperature=settings.temperature))
            ids = parse_ids(text, len(docs)).ids
            alone(builder.answer(row, [docs[position - 1] for position in ids]))
            chosen[-1].append(ids)
    return chosen


def speed(args: argparse.Namespace, rows: list[Row]) -> None:
    settings = stage_args(args, "--dtype", args.dtypes[0])
    builders = load_builders(options_from(settings, EngineOptions), options_from(settings, CallOptions))
    builder, engine = builders[0], builders[0].engine
    counted: dict[str, int] = {}

    def ours() -> float:
        engine._llm.reset_prefix_cache()
        results = sampling_dpo_trajectories.sample_trajectories(rows, builders, settings)
        counted["trajectories"] = sum(len(row["id_lists"]) for row in results)
        counted["answers"] = sum(len(set(map(tuple, row["id_lists"]))) for row in results)
        ours.results = results
        return len(rows)

    def loop() -> float:
        some = rows[: max(len(rows) // 3, 1)]
        one_at_a_time(some, builder, settings)
        return len(some)

    def floor() -> float:
        """Read every distinct prompt once, in one batch, and write one token for each."""
        engine._llm.reset_prefix_cache()
        prompts = []
        for row, result in zip(rows, ours.results, strict=True):
            docs = row["docs"][: result["docs_shown"]]
            prompts.append(builder.select(row, docs))
            prompts += [builder.answer(row, [docs[position - 1] for position in ids]) for ids in set(map(tuple, result["id_lists"]))]
        engine.complete([Request(request.messages, seed=0, max_tokens=1) for request in prompts])
        return len(rows)

    systems = {"one request at a time, nothing reused": loop, "sampling_dpo_trajectories.py": ours, "reading the prompts (prefill)": floor}
    order = {name: systems[name] for name in ("sampling_dpo_trajectories.py", "reading the prompts (prefill)", "one request at a time, nothing reused")}
    seconds = measure.in_turns(order, args.rounds)
    slow, fast, read = (seconds[name] for name in systems)
    lines = [[name, f"{1 / seconds[name]:.2f}", f"{slow / seconds[name]:.2f}"] for name in systems]
    title = f"Sampling, {len(rows)} questions, {settings.num_samples} trajectories each, {counted['answers'] / len(rows):.1f} distinct"
    measure.report(title, ["", "questions/s", "to one at a time"], lines, {name: 1 / s for name, s in seconds.items()}, args.output_file)
    print(f"prefill is {read / fast:.0%} of the stage's time")


def identical(args: argparse.Namespace, rows: list[Row]) -> None:
    lines, figures = [], {}
    for dtype in args.dtypes:
        loaded = stage_args(args, "--dtype", dtype)
        builders = load_builders(options_from(loaded, EngineOptions), options_from(loaded, CallOptions))
        for name, flags in (("greedy", ["--temperature", "0", "--num-samples", "1"]), ("sampled", [])):
            settings = stage_args(args, "--dtype", dtype, *flags)

            def sampled(chunks: list[list[Row]], settings=settings, builders=builders) -> dict[str, tuple]:
                results = [row for chunk in chunks for row in sampling_dpo_trajectories.sample_trajectories(chunk, builders, settings)]
                return {row["id"]: list(zip(map(tuple, row["id_lists"]), row["responses"], strict=True)) for row in results}

            whole = sampled([rows])
            others = {
                "again": [rows], "one at a time": [[row] for row in rows], "in chunks of 5": [rows[n : n + 5] for n in range(0, len(rows), 5)],
                "backwards": [rows[::-1]],
            }
            for how, chunks in others.items():
                found = sampled(chunks)
                pairs = [(one, other) for row_id, of_row in whole.items() for one, other in zip(of_row, found[row_id], strict=True)]
                selections = sum(one[0] == other[0] for one, other in pairs) / len(pairs)
                answers = sum(one == other for one, other in pairs) / len(pairs)
                lines.append([dtype, name, how, f"{selections:.1%}", f"{answers:.1%}"])
                figures[f"{dtype}, {name}, {how}"] = [selections, answers]
    title = f"Trajectories that stay the same, {len(rows)} questions"
    measure.report(title, ["precision", "decoding", "asked", "selections", "selections and answers"], lines, figures, args.output_file)


def main() -> None:
    args = parse_args()
    for path in (args.llm_model, args.input_file):
        if not Path(path).exists():
            sys.exit(f"error: {path}: does not exist; bash scripts/demo.sh creates the default file")
    try:
        rows = list(read_rows(args.input_file, STAGE_KEYS["sampling_dpo_trajectories"].reads))[: args.questions]
    except UserError as error:
        sys.exit(f"error: {error}")
    for part in args.parts:
        began = time.perf_counter()
        {"speed": speed, "identical": identical}[part](args, rows)
        gc.collect()  # an engine collected later would close vLLM's process groups of the next one
        print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

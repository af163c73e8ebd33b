"""Let a model choose among the documents of every list: once by greedy decoding, or --num_samples times.

The answers come from another model, and equal sets are answered once (answer.py). This script therefore asks for the
selections only, with the requests of inference.py and sampling_dpo_trajectories.py.

Reads    INPUT_FILE      lists
Writes   OUTPUT_FILE     + docs_shown, usage, and id_list; with --num_samples id_lists, selections, invalid_selections, from_expert

    .venv/bin/python experiments/openqa/choose.py --input_file runs/openqa/lists/dev.jsonl --llm_model runs/openqa/seed_1/bc/model/sft \\
        --output_file runs/openqa/seed_1/bc/dev.jsonl
"""

import argparse
from collections.abc import Sequence
from functools import partial

from dynamicrag import stage
from dynamicrag.llm.answering import place_of
from dynamicrag.llm.choosing import choose_among
from dynamicrag.llm.completion import Usage
from dynamicrag.llm.engine import add_engine_flags, engine_inputs
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import RequestBuilder, add_call_flags, load_builders
from dynamicrag.rows.identifiers import summarise_selections
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import log, options_from
from sampling_dpo_trajectories import read_selections, selection_requests

CHUNK = 128  # questions between two writes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--input_file", required=True, help="lists")
    parser.add_argument("--output_file", required=True, help="rows with selections")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num_samples", type=int, default=0, help="selections per question; 0 is one greedy selection")
    sampling.add_argument("--temperature", type=float, default=1.0, help="temperature of the samples")
    sampling.add_argument("--top_p", type=float, default=1.0, help="nucleus of the samples")
    sampling.add_argument("--permute", action="store_true", help="shuffle the documents for each sample")
    add_engine_flags(parser)
    add_call_flags(parser, in_chunks=False)
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def choose(rows: list[Row], chooser: RequestBuilder) -> list[Row]:
    """Return the rows with one greedy selection. A selection that cannot be read is empty."""
    shown = [chooser.shown(row["question"], row["docs"]) for row in rows]
    choices, usages = choose_among(rows, shown, chooser)
    results = []
    for row, docs, choice, usage in zip(rows, shown, choices, usages, strict=True):
        if isinstance(choice, str):
            log.warning("row %s: %s; no document is chosen", row["id"], choice)
        ids = [] if isinstance(choice, str) else choice
        results.append({**row, "docs_shown": len(docs), "id_list": ids, "usage": vars(usage)})
    return results


def sample(rows: list[Row], chooser: RequestBuilder, args: argparse.Namespace) -> list[Row]:
    """Return the rows with their sampled selections. A selection that cannot be read is left out."""
    shown = [chooser.shown(row["question"], row["docs"]) for row in rows]
    requests = [(number, *pair) for number, (row, docs) in enumerate(zip(rows, shown, strict=True)) for pair in selection_requests(row, docs, chooser, args)]
    samples: list[list] = [[] for _ in rows]
    usages = [Usage() for _ in rows]
    for (number, _, order), completion in zip(requests, chooser.ask([request for _, request, _ in requests]), strict=True):
        samples[number].append((completion, order))
        usages[number].add(completion)
    results = []
    for row, docs, of_row, usage in zip(rows, shown, samples, usages, strict=True):
        valid, invalid, _ = read_selections(of_row, chooser.prompts.notation)
        results.append({
            **row, "docs_shown": len(docs), "id_lists": [ids for _, ids in valid], "selections": [text for text, _ in valid],
            "invalid_selections": invalid, "from_expert": [False] * len(valid), "usage": vars(usage),
        })
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    engine, calls = options_from(args, EngineOptions), options_from(argparse.Namespace(**vars(args), chunk_size=CHUNK), CallOptions)
    output = Output(vars(args), [args.output_file], [args.input_file, *engine_inputs(engine, calls)])
    if output.finished:
        return
    total = count_rows(args.input_file, ("docs",))
    builders = load_builders(engine, calls, both=False)
    output.record(**place_of(builders))
    work = partial(sample, chooser=builders[0], args=args) if args.num_samples else partial(choose, chooser=builders[0])
    output.process(read_rows(args.input_file, ("docs",)), CHUNK, work, total, "choosing")
    if args.num_samples:
        seen = summarise_selections(({**row, "responses": [""] * len(row["id_lists"])} for row in output.written()), builders[0].prompts.notation)
        log.info("%(trajectories)d selections: %(malformed)d malformed; share of None %(none_share).2f, mean k %(k_mean).2f (spread %(k_spread).2f)", seen)
    output.finish()


if __name__ == "__main__":
    stage.run(main)

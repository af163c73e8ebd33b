"""Sample trajectories from the SFT model: several selections per question, each with an answer (DynamicRAG, RL stage).

All selections of a chunk of questions are sampled in one engine call; the samples of a question share the prefill of
their prompt. A second call answers every distinct selection once, greedily. --include-expert adds the expert's
selection (true_id, from the reranker or the gold documents) as one more trajectory. --permute shows the documents of
each sample in another order, so that positions carry no information. --baseline-top K also answers from the first K
documents; this answer is no trajectory, but the baseline of the gain term (reward_trajectories.py).

Reads    training_data/training_data_dpo.jsonl           rows with docs (and true_id, for --include-expert)
Writes   results/training_data_dpo_sampling.json         + id_lists, responses, response_tokens, from_expert, selections
                                                           (as written), invalid_selections, docs_shown, usage; with
                                                           --baseline-top also baseline_k, baseline_response

    python sampling_dpo_trajectories.py --template template/llama3.jinja --llm-model DynamicRAG_llama3_8b \\
        --input-jsonl training_data/training_data_dpo.jsonl --output-json results/training_data_dpo_sampling.json
"""

import argparse
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

from dynamicrag import stage
from dynamicrag.llm.answering import place_of
from dynamicrag.llm.completion import Completion, Request, Usage
from dynamicrag.llm.completion_cache import CompletionCache
from dynamicrag.llm.engine import add_engine_flags, engine_inputs
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import (
    Builders,
    RequestBuilder,
    add_call_flags,
    asking,
    load_builders,
    read_selection,
    work_on_fitting,
)
from dynamicrag.llm.templates import in_threads
from dynamicrag.rows.expert import expert_sequence, unjudged_position
from dynamicrag.rows.identifiers import Notation, format_ids, summarise_selections
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.rows.shown import DOCUMENTS_HELP, DOCUMENTS_SHOWN, check_shown
from dynamicrag.stage import UserError, derive_seed, log, options_from

KEYS = STAGE_KEYS["sampling_dpo_trajectories"]
BASELINE = ("baseline_k", "baseline_response")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input-jsonl", "--input-json", dest="input_json", default="training_data/training_data_dpo.jsonl", help="DPO part"
    )
    files.add_argument(
        "--output-json", "--output-jsonl", dest="output_json", default="results/training_data_dpo_sampling.json",
        help="rows with trajectories",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num-samples", type=int, default=8, help="trajectories per question")
    sampling.add_argument("--temperature", type=float, default=1.0, help="temperature of the selections; answers are greedy")
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus of the selections")
    sampling.add_argument("--topn", "--n-docs", dest="topn", type=int, default=DOCUMENTS_SHOWN, help=DOCUMENTS_HELP)
    sampling.add_argument("--include-expert", action="store_true", help="add the expert's selection (true_id) as a trajectory")
    sampling.add_argument(
        "--permute", action="store_true",
        help="shuffle the documents for each sample; this costs one prefill per sample; `selections` stay as the "
             "model wrote them, `id_lists` refer to the order of docs",
    )
    sampling.add_argument("--baseline-top", type=int, metavar="K", help="also answer from the first K documents, for the gain term")
    add_engine_flags(parser)
    add_call_flags(parser)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.baseline_top is not None and args.baseline_top < 1:
        parser.error("--baseline-top must be at least 1")
    if args.num_samples < 1 or not 0 <= args.temperature <= 2 or not 0 < args.top_p <= 1:  # vLLM samples at most at 2
        parser.error("--num-samples must be at least 1, --temperature from 0 to 2, and --top-p above 0 and at most 1")
    if args.temperature == 0 and args.num_samples > 1 and not args.permute:
        parser.error("--temperature 0 samples the same selection every time; give --num-samples 1 or --permute")
    return args


def selection_requests(row: Row, docs: list[Doc], chooser: RequestBuilder, args: argparse.Namespace) -> list[tuple[Request, list[int]]]:
    """Return the requests for one question, each with its order of the documents (1-based positions in `docs`)."""
    settings = {"temperature": args.temperature, "top_p": args.top_p}
    in_order = list(range(1, len(docs) + 1))
    if not args.permute:
        return [(chooser.select(row, docs, "sample", n=args.num_samples, **settings), in_order)]
    requests = []
    for sample in range(args.num_samples):
        order = random.Random(derive_seed(args.seed, row["id"], "order", sample)).sample(in_order, len(docs))
        permuted = [docs[position - 1] for position in order]
        if len(chooser.shown(row["question"], permuted)) < len(docs):  # another order may give a longer prompt
            order, permuted = in_order, docs
        requests.append((chooser.select(row, permuted, f"sample {sample}", **settings), order))
    return requests


def read_selections(samples: list[tuple[Completion, list[int]]], notation: Notation) -> tuple[list[tuple[str, list[int]]], list[str], str]:
    """Return the valid samples as (text, positions in docs), the texts of the others, and a reason if no sample is valid."""
    valid, invalid, reason = [], [], ""
    for completion, order in samples:
        for number, text in enumerate(completion.texts):
            selection = read_selection(completion, number, len(order), notation)
            if selection.valid:
                valid.append((text, [order[position - 1] for position in selection.ids]))
            else:
                invalid.append(text)
                reason = reason or completion.reason("selection", number)
    return valid, invalid, "" if valid else reason


def expert_selection(row: Row, shown: int) -> list[int]:
    """Return the expert's selection (true_id) among the documents shown."""
    return expert_sequence(row["docs"], [position for position in row["true_id"] if position <= shown])


def check_judged(path: str, rows: Iterable[Row]) -> None:
    """Check the scores needed for --include-expert.

    Raises UserError if only some have one; published data has labels only.
    """
    unscored = 0
    for row in rows:
        if (unjudged := unjudged_position(row["docs"], row["true_id"])) is not None:
            raise UserError(f"{path}: row {row['id']}: docs[{unjudged - 1}] has no rerank_score, which "
                            "--include-expert needs; run reranker.py first")
        unscored += bool(row["true_id"]) and row["docs"][row["true_id"][0] - 1].get("rerank_score") is None
    if unscored:
        log.warning("%s: %d rows have relevant documents without rerank_score; the expert's trajectory uses the order "
                    "of the documents", path, unscored)


def sample_trajectories(rows: list[Row], builders: Builders, args: argparse.Namespace) -> list[Row]:
    """Return the rows with their trajectories. A trajectory whose selection or answer cannot be read is left out."""
    chooser, generator = builders
    notation = chooser.prompts.notation

    def key(ids: Sequence[int]) -> tuple[int, ...]:  # of selections that have the same answer
        return tuple(sorted(ids) if args.answer_order == "retrieval" else ids)

    shown = in_threads(lambda row: chooser.shown(row["question"], row["docs"][: args.topn]), rows)
    # Sample the selections of all questions in one batch
    jobs = [
        (number, request, order)
        for number, of_row in enumerate(in_threads(lambda pair: selection_requests(pair[0], pair[1], chooser, args), zip(rows, shown, strict=True)))
        for request, order in of_row
    ]
    samples: list[list[tuple[Completion, list[int]]]] = [[] for _ in rows]
    for (number, _, order), completion in zip(jobs, chooser.ask([r for _, r, _ in jobs]), strict=True):
        samples[number].append((completion, order))

    # Read them into trajectories
    results: list[dict[str, Any]] = []
    distinct: dict[tuple[str, tuple[int, ...]], tuple[Row, list[Doc]]] = {}  # (row id, selection): row, documents of the answer
    for row, docs, sampled in zip(rows, shown, samples, strict=True):
        trajectories, invalid, reason = read_selections(sampled, notation)
        if reason:
            log.warning("row %s: %s", row["id"], reason)
        from_expert = [False] * len(trajectories)
        if args.include_expert:
            expert = expert_selection(row, len(docs))
            trajectories.append((format_ids(expert, notation), expert))
            from_expert.append(True)
        usage = Usage()
        for completion, _ in sampled:
            usage.add(completion)
        results.append({
            **row,
            "docs_shown": len(docs),
            "id_lists": [ids for _, ids in trajectories],
            "from_expert": from_expert,
            "selections": [text for text, _ in trajectories],
            "invalid_selections": invalid,
            "usage": usage,
        })
        baseline = list(range(1, min(args.baseline_top or 0, len(docs)) + 1))
        results[-1] = with_baseline(results[-1], len(baseline) if args.baseline_top else None)
        for ids in [*(ids for _, ids in trajectories), *([baseline] if args.baseline_top else [])]:
            if (row["id"], key(ids)) not in distinct:
                distinct[row["id"], key(ids)] = row, [docs[position - 1] for position in ids]

    # Answer every distinct selection in one batch
    requests = in_threads(lambda pair: generator.answer(*pair), distinct.values())
    answers = dict(zip(distinct, generator.ask(requests), strict=True))
    # Leave out trajectories without an answer
    for result in results:
        mine = {key(ids): answers[result["id"], key(ids)] for ids in result["id_lists"]}
        if args.baseline_top:
            baseline = tuple(range(1, result["baseline_k"] + 1))
            mine |= {baseline: answers[result["id"], baseline]}
            result["baseline_response"] = mine[baseline].texts[0]  # "" if it cannot be read, as evaluate.py scores it
        for completion in mine.values():
            result["usage"].add(completion)
        readable = [n for n, ids in enumerate(result["id_lists"]) if not mine[key(ids)].reason("answer")]
        if lost := len(result["id_lists"]) - len(readable):
            why = next(filter(None, (mine[key(ids)].reason("answer") for ids in result["id_lists"])))
            log.warning("row %s: %d trajectories are left out: %s", result["id"], lost, why)
        for name in ("id_lists", "from_expert", "selections"):
            result[name] = [result[name][n] for n in readable]
        result["responses"] = [mine[key(ids)].texts[0] for ids in result["id_lists"]]
        tokens = [mine[key(ids)].generated_tokens for ids in result["id_lists"]]
        result.pop("response_tokens", None)  # from an earlier run
        # Omitted if the server does not report tokens, because 0 would give the best length reward
        if None not in tokens:
            result["response_tokens"] = tokens
        result["usage"] = vars(result["usage"])
    return cast(list[Row], results)


def with_baseline(row: dict[str, Any], k: int | None) -> dict[str, Any]:
    """Return the row with an empty answer from the first `k` documents; None removes the answer of an earlier run."""
    kept = {key: value for key, value in row.items() if key not in BASELINE}
    return kept if k is None else {**kept, "baseline_k": k, "baseline_response": ""}


def no_trajectory(row: Row, reason: str, baseline_top: int | None = None) -> Row:
    """Return a row without trajectories, because its question does not fit the window."""
    log.warning("row %s: %s", row["id"], reason)
    lists = {key: [] for key in KEYS.writes if key not in ("docs_shown", "usage", *BASELINE)}
    return cast(Row, with_baseline({**row, "docs_shown": 0, **lists, "usage": vars(Usage())}, 0 if baseline_top else None))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    engine, calls = options_from(args, EngineOptions), options_from(args, CallOptions)
    output = Output(vars(args), [args.output_json], [args.input_json, *engine_inputs(engine, calls)])
    if output.finished:
        CompletionCache(output.path).remove()  # left by an interruption just after the manifest was written
        return
    needs = KEYS.reads_with["--include-expert"] if args.include_expert else KEYS.reads
    total = count_rows(args.input_json, needs, skip_malformed=bool(output.reject))
    check_shown(args.input_json, read_rows(args.input_json, needs, reject=output.ignore), "--topn", args.topn)
    if args.include_expert:
        check_judged(args.input_json, read_rows(args.input_json, needs, reject=output.ignore))
    builders = load_builders(engine, calls)
    output.record(**place_of(builders))
    rows = read_rows(args.input_json, needs, args.dataset, output.reject)
    sample = partial(sample_trajectories, builders=builders, args=args)

    def work(chunk: list[Row]) -> list[Row]:
        return work_on_fitting(chunk, builders, sample, partial(no_trajectory, baseline_top=args.baseline_top))

    with asking(builders, args.output_json, args.overwrite):
        output.process(rows, args.chunk_size, work, total, "sampling")
        seen = summarise_selections(output.written(), builders[0].prompts.notation)
        log.info(
            "%(trajectories)d selections: %(malformed)d malformed, %(out_of_range)d identifiers out of range, "
            "%(repeated)d repeated; share of None %(none_share).2f, mean k %(k_mean).2f (spread %(k_spread).2f); per "
            "question %(distinct_selections).2f distinct selections and %(distinct_answers).2f distinct answers", seen,
        )
        output.finish(seen, trajectories=seen["trajectories"], malformed=seen["malformed"])


if __name__ == "__main__":
    stage.run(main)

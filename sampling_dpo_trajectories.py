"""Sample trajectories from the SFT model: several selections of documents a question, each answered (DynamicRAG, RL stage).

All selections of a batch are sampled in one engine call, the samples of a question sharing their prompt; then every
distinct set of chosen documents is answered once, greedily, in a second call.

Reads    training_data/training_data_dpo.jsonl           rows with docs
Writes   results/training_data_dpo_sampling.json         + id_lists, responses, selections (as written), docs_shown,
                                                           invalid_selections, usage

    python sampling_dpo_trajectories.py --template template/llama3.jinja --llm-model DynamicRAG_llama3_8b \\
        --input-jsonl training_data/training_data_dpo.jsonl --output-json results/training_data_dpo_sampling.json
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial

from dynamicrag import stage
from dynamicrag.calls import Caller, add_call_flags, work_on_fitting
from dynamicrag.engine import Usage, add_engine_flags, engine_inputs, load_engine
from dynamicrag.output import Output
from dynamicrag.records import Row, count_rows, read_rows
from dynamicrag.selection import parse_ids
from dynamicrag.stage import log


def parse_args(argv=None):
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
    sampling.add_argument("--num-samples", type=int, default=8, help="trajectories a question")
    sampling.add_argument("--temperature", type=float, default=1.0, help="of the selections; answers are greedy")
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus the selections are sampled from")
    sampling.add_argument("--topn", "--n-docs", dest="topn", type=int, default=20, help="documents shown")
    add_engine_flags(parser)
    add_call_flags(parser)
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def sample_trajectories(rows: list[Row], caller: Caller, args) -> list[Row]:
    """Each row with its trajectories; an unreadable selection costs that trajectory, not the question."""
    shown = [caller.shown(row["question"], row["docs"][: args.topn]) for row in rows]
    sampled = caller.engine.complete([
        caller.select(row, docs, "sample", n=args.num_samples, temperature=args.temperature, top_p=args.top_p)
        for row, docs in zip(rows, shown, strict=True)
    ])
    results, distinct = [], {}
    for row, docs, completion in zip(rows, shown, sampled, strict=True):
        selections = [(text, parse_ids(text, len(docs))) for text in completion.texts]
        valid = [(text, selection.ids) for text, selection in selections if selection.valid]
        usage = Usage()
        usage.add(completion)
        results.append({
            **row,
            "docs_shown": len(docs),
            "id_lists": [ids for _, ids in valid],
            "selections": [text for text, _ in valid],
            "invalid_selections": [text for text, selection in selections if not selection.valid],
            "usage": usage,
        })
        for _, ids in valid:
            if (row["id"], tuple(ids)) not in distinct:
                distinct[row["id"], tuple(ids)] = caller.answer(row, [docs[position - 1] for position in ids])
    answers = dict(zip(distinct, caller.engine.complete(list(distinct.values())), strict=True))
    for result in results:
        mine = {tuple(ids): answers[result["id"], tuple(ids)] for ids in result["id_lists"]}
        for completion in mine.values():
            result["usage"].add(completion)
        result["responses"] = [mine[tuple(ids)].texts[0] for ids in result["id_lists"]]
        result["usage"] = vars(result["usage"])
    return results


def no_trajectory(row: Row, reason: str) -> Row:
    """A row whose question does not fit the window: it teaches nothing, and is kept."""
    log.warning("row %s: %s", row["id"], reason)
    nothing = {key: [] for key in ("id_lists", "selections", "invalid_selections", "responses")}
    return {**row, "docs_shown": 0, **nothing, "usage": vars(Usage())}


def summarise(rows: Iterable[Row]) -> Counter:
    """Counts over all trajectories: how long, how many None, how many malformed."""
    seen: Counter = Counter()
    for row in rows:
        texts = row["selections"] + row["invalid_selections"]
        parsed = [parse_ids(text, row["docs_shown"]) for text in texts]
        seen["trajectories"] += len(texts)
        seen["malformed"] += len(row["invalid_selections"])
        seen["out_of_range"] += sum(selection.out_of_range for selection in parsed)
        seen["repeated"] += sum(selection.repeated for selection in parsed)
        seen["none"] += sum(not ids for ids in row["id_lists"])
        seen["documents"] += sum(map(len, row["id_lists"]))
        seen["distinct"] += len(set(map(tuple, row["id_lists"])))
        seen["questions"] += 1
    return seen


def main(argv=None):
    args = parse_args(argv)
    out = Output(args, [args.output_json], [args.input_json, *engine_inputs(args)])
    if out.finished:
        return
    total = count_rows(args.input_json, ("docs",), skip_malformed=bool(out.reject))
    caller = Caller(load_engine(args), args)
    rows = read_rows(args.input_json, ("docs",), args.dataset, out.reject)
    work = partial(work_on_fitting, caller=caller, work=partial(sample_trajectories, caller=caller, args=args), fail=no_trajectory)
    out.process(rows, args.chunk_size, work, total, "sampling")
    seen = summarise(out.written())
    valid = max(1, seen["trajectories"] - seen["malformed"])
    log.info(
        "mean k %.2f, None %.0f %%, distinct selections a question %.2f",
        seen["documents"] / valid, 100 * seen["none"] / valid, seen["distinct"] / seen["questions"],
    )
    out.finish(**seen)


if __name__ == "__main__":
    stage.run(main)

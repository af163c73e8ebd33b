"""Answer the questions of a file from the sets that a rule or a model chose, with the answers of the store.

With --selectors, the sets are those of inference.py's rules (none, top:K, all, monot5, adaptive, gold), and {selector} in
OUTPUT_FILE stands for the rule. Otherwise the rows have them: id_list, or id_lists for sampled trajectories. The result
has the form of inference.py's, or of sampling_dpo_trajectories.py's, so that evaluate.py and the reward stages read it.

Reads    INPUT_FILE      lists, or rows of choose.py
         STORE           answers of the generator; missing ones are generated
Writes   OUTPUT_FILE     + id_list, final_docs, response, usage;
                         or responses, response_tokens, and generator_tokens: read and written for the distinct sets of the question

    .venv/bin/python experiments/openqa/answer.py --input_file runs/openqa/lists/dev.jsonl --selectors none top:1 gold \\
        --output_file 'runs/openqa/results/dev_{selector}.json' --store runs/openqa/answers/1.jsonl --generator runs/openqa/generator/model/sft
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from store import Answer, AnswerStore, Set, add_store_flags, open_store

from dynamicrag import stage
from dynamicrag.files.jsonio import write_json
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row, unanswered
from dynamicrag.stage import UserError, log
from inference import select_by_rule, select_gold, selector_flag


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--input_file", required=True, help="lists, or rows with selections")
    parser.add_argument("--output_file", required=True, help="answered rows")
    parser.add_argument("--selectors", nargs="+", type=selector_flag, help="rules that choose the documents")
    add_store_flags(parser)
    args = parser.parse_args(argv)
    if args.selectors and "{selector}" not in args.output_file:
        parser.error("--output_file must contain {selector} if --selectors are given")
    return args


def answered(row: Row, positions: Set, answer: Answer) -> Row:
    """Return the row with its answer from the documents at these positions, and the cost of choice and answer together."""
    own = row.get("usage") or {}
    usage = {"calls": (own.get("calls") or 0) + 1, **{key: (own.get(key) or 0) + getattr(answer, key) for key in ("prompt_tokens", "generated_tokens")}}
    final = [row["docs"][position - 1]["id"] for position in positions]
    return {**unanswered(row), "docs_shown": len(row["docs"]), "id_list": list(positions), "final_docs": final, "response": answer.response, "usage": usage}


def answer_sets(rows: list[Row], choice: Callable[[Row], Sequence[int]], store: AnswerStore) -> list[Row]:
    """Return the rows with the answers from the set that `choice` gives for each."""
    sets = [tuple(sorted(set(choice(row)))) for row in rows]
    return [answered(row, positions, answer) for row, positions, answer in zip(rows, sets, store.answers(zip(rows, sets, strict=True)), strict=True)]


def answer_trajectories(rows: list[Row], store: AnswerStore) -> list[Row]:
    """Return the rows with the answer of each sampled selection. The selections become sets, in the order of the list."""
    sets = [[tuple(sorted(set(ids))) for ids in row["id_lists"]] for row in rows]
    pairs = [(row, positions) for row, of_row in zip(rows, sets, strict=True) for positions in of_row]
    of_pair = {(row["id"], positions): answer for (row, positions), answer in zip(pairs, store.answers(pairs), strict=True)}
    results = []
    for row, of_row in zip(rows, sets, strict=True):
        answers = [of_pair[row["id"], positions] for positions in of_row]
        distinct = dict(zip(of_row, answers, strict=True)).values()
        results.append({
            **row, "id_lists": [list(positions) for positions in of_row], "responses": [answer.response for answer in answers], "response_tokens": [answer.generated_tokens for answer in answers],
            "generator_tokens": sum(answer.prompt_tokens + answer.generated_tokens for answer in distinct),
        })
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows = list(read_rows(args.input_file, ("docs",)))
    if not rows:
        raise UserError(f"{args.input_file}: contains no row; make it with experiments/openqa.sh")
    store = open_store(args)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    if args.selectors:
        choices = {
            selector: [select_gold(row, row["docs"], args.input_file) if selector == "gold" else select_by_rule(selector, row["docs"]) for row in rows]
            for selector in args.selectors
        }
        # All sets of a question in one batch, so that their common beginnings are computed once
        store.answers((row, tuple(sorted(chosen[number]))) for number, row in enumerate(rows) for chosen in choices.values())
        for selector, chosen in choices.items():
            of_row = dict(zip((row["id"] for row in rows), chosen, strict=True))
            write_json(args.output_file.replace("{selector}", selector.replace(":", "")), answer_sets(rows, lambda row, of_row=of_row: of_row[row["id"]], store))
    elif "id_lists" in rows[0]:
        results = answer_trajectories(rows, store)
        write_json(args.output_file, results)
        log.info("%s: the generator read and wrote %d tokens for the distinct sets", args.output_file, sum(row["generator_tokens"] for row in results))
    else:
        write_json(args.output_file, answer_sets(rows, lambda row: row["id_list"], store))


if __name__ == "__main__":
    stage.run(main)

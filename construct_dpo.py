"""Make preference pairs from rewarded trajectories, for the reranker and for the generator (DynamicRAG, DPO stage).

Reranker: the question and its documents -> the best trajectory against the worst. Generator: the question and the best
trajectory's documents -> the gold answer against the lowest-scoring wrong response.

Reads    training_data/llama3_8b_output_dpo.jsonl        rows with id_lists, responses, response_scores, score_terms
Writes   training_data/llama3_8b_reranker_dpo.json       LLaMA-Factory rows: instruction, input, chosen, rejected, system
         training_data/llama3_8b_generator_dpo.json      likewise

    python construct_dpo.py
"""

import random
import statistics

from dynamicrag import stage
from dynamicrag.output import Output
from dynamicrag.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.records import Row, read_rows
from dynamicrag.selection import format_ids
from dynamicrag.stage import UserError, log
from dynamicrag.tasks import target_answer, task_of

# Above this share of pairs whose chosen selection is the shorter one, a model may learn to choose nothing at all.
BREVITY_SHARE = 2 / 3
NEEDS = ("docs", "docs_shown", "answers", "id_lists", "responses", "response_scores", "score_terms")


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/llama3_8b_output_dpo.jsonl", help="rewarded trajectories")
    files.add_argument("--reranker_file", default="training_data/llama3_8b_reranker_dpo.json", help="reranker pairs")
    files.add_argument("--generator_file", default="training_data/llama3_8b_generator_dpo.json", help="generator pairs")
    add_prompts_flag(files)
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--min-margin", type=float, default=0.0, help="least difference in reward of a reranker pair")
    pairs.add_argument(
        "--generator-chosen", choices=["gold", "best"], default="gold", help="chosen answer: the gold one, or the best sampled one"
    )
    pairs.add_argument("--max-reranker-pairs", type=int, help="most reranker pairs, a random sample (default: all)")
    pairs.add_argument("--max-generator-pairs", type=int, help="most generator pairs, likewise")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def best_and_worst(row: Row) -> tuple[int, int] | None:
    """Positions of the best and the worst trajectory, the earlier one of equals; None where there is no trajectory."""
    scores = row["response_scores"]
    if not scores:
        return None
    order = range(len(scores))
    return max(order, key=lambda t: (scores[t], -t)), min(order, key=lambda t: (scores[t], t))


def reranker_pair(row: Row, prompts: Prompts, min_margin: float) -> dict[str, str] | None:
    """Best against worst selection; None where their rewards are equal or no further apart than min_margin."""
    ends = best_and_worst(row)
    if ends is None:
        return None
    best, worst = ends
    margin = row["response_scores"][best] - row["response_scores"][worst]
    chosen, rejected = format_ids(row["id_lists"][best]), format_ids(row["id_lists"][worst])
    if margin <= min_margin or chosen == rejected:
        return None
    shown = row["docs"][: row["docs_shown"]]
    return training_row(prompts.reranker(row["question"], shown), chosen=chosen, rejected=rejected)


def generator_pair(row: Row, prompts: Prompts, chosen_from: str) -> dict[str, str] | None:
    """Gold (or best) answer against the lowest-scoring wrong response; None where no response is wrong."""
    ends = best_and_worst(row)
    wrong = [t for t, terms in enumerate(row["score_terms"]) if terms["em"] < 1 and row["responses"][t].strip()]
    if ends is None or not wrong:
        return None
    best, _ = ends
    worst = min(wrong, key=lambda t: (row["response_scores"][t], t))
    rejected = row["responses"][worst]
    chosen = target_answer(row) if chosen_from == "gold" else row["responses"][best]
    if chosen.strip() == rejected.strip() or not chosen.strip():
        return None
    if chosen_from == "best" and row["response_scores"][best] == row["response_scores"][worst]:
        return None
    docs = [row["docs"][position - 1] for position in row["id_lists"][best]]
    messages = prompts.generator(row["question"], docs, task_of(row.get("dataset")).instruction)
    return training_row(messages, chosen=chosen, rejected=rejected)


def capped(pairs: list[dict], most: int | None, seed: int) -> list[dict]:
    """A random sample of at most `most` pairs, in their own order."""
    if most is None or len(pairs) <= most:
        return pairs
    kept = sorted(random.Random(seed).sample(range(len(pairs)), most))
    return [pairs[number] for number in kept]


def main(argv=None):
    args = parse_args(argv)
    inputs = [args.input_file, *filter(None, [args.prompts])]
    out = Output(args, [args.reranker_file, args.generator_file], inputs)
    if out.finished:
        return
    prompts = Prompts(args.prompts)
    reranker, generator, k_best, k_worst, rows = [], [], [], [], 0
    for row in read_rows(args.input_file, NEEDS, reject=out.reject):
        rows += 1
        pair = reranker_pair(row, prompts, args.min_margin)
        if pair:
            reranker.append(pair)
            best, worst = best_and_worst(row)
            k_best.append(len(row["id_lists"][best]))
            k_worst.append(len(row["id_lists"][worst]))
        pair = generator_pair(row, prompts, args.generator_chosen)
        if pair:
            generator.append(pair)
    if not reranker or not generator:
        raise UserError(
            f"{args.input_file}: {len(reranker)} reranker pairs and {len(generator)} generator pairs from {rows} questions; "
            "DPO needs both. Sample at a higher --temperature, or from more questions"
        )
    shorter = sum(best < worst for best, worst in zip(k_best, k_worst, strict=True)) / len(k_best)
    log.info(
        "reranker pairs: mean k %.2f chosen, %.2f rejected; chosen is shorter in %.0f %%",
        statistics.fmean(k_best), statistics.fmean(k_worst), 100 * shorter,
    )
    if shorter > BREVITY_SHARE:
        log.warning("these pairs teach brevity above all; raise --min-margin, or lower the weight of length in the reward")
    reranker, generator = (
        capped(reranker, args.max_reranker_pairs, args.seed), capped(generator, args.max_generator_pairs, args.seed)
    )
    out.publish(args.reranker_file, reranker)
    out.publish(args.generator_file, generator)
    out.finish(questions=rows, reranker_pairs=len(reranker), generator_pairs=len(generator))


if __name__ == "__main__":
    stage.run(main)

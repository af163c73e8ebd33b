"""Score every trajectory by the answer it led to (DynamicRAG, reward from generator feedback).

The reward is a weighted mean of five terms in [0, 1]: exact match, BERTScore, ROUGE-L, brevity 1/(1+k), and an LLM
judge. Each distinct (question, answer) is scored once. Without a judge the other weights are rescaled.

Reads    results/training_data_dpo_sampling.json         rows with answers, id_lists and responses
Writes   training_data/llama3_8b_output_dpo.jsonl        + response_scores, score_terms

    python reward_trajectories.py --input_file results/training_data_dpo_sampling.json \\
        --output_file training_data/llama3_8b_output_dpo.jsonl
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dynamicrag import stage
from dynamicrag.judge import Judge
from dynamicrag.metrics import rouge_l
from dynamicrag.output import Output
from dynamicrag.prompts import Prompts, add_prompts_flag
from dynamicrag.records import Row, count_rows, read_rows
from dynamicrag.rewards import ANSWER_MATCHES, BertScore, combine, correctness, length_term, parse_weights
from dynamicrag.stage import UserError, log

NEEDS = ("answers", "id_lists", "responses")


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="results/training_data_dpo_sampling.json", help="sampled trajectories")
    files.add_argument("--output_file", default="training_data/llama3_8b_output_dpo.jsonl", help="rewarded trajectories")
    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--weights", default="em=.2,bert=.2,rouge=.2,length=.2,judge=.2", help="weight of each term; one left out weighs nothing"
    )
    reward.add_argument(
        "--answer-match", choices=ANSWER_MATCHES, default="exact", help="em term: equality, or containment for long answers"
    )
    reward.add_argument("--bert_model", default="roberta-large", help="encoder of BERTScore: a folder, or a hub name")
    reward.add_argument("--bert_layer", type=int, help="its layer (default: bert-score's own for a model it knows, else the last)")
    reward.add_argument("--device", default="auto", help="where the encoder runs: auto, cuda, cpu")
    reward.add_argument("--chunk_size", type=int, default=2000, help="questions scored between two writes to disk")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge-base-url", metavar="URL", help="OpenAI-compatible endpoint; the key is JUDGE_API_KEY's")
    judge.add_argument("--judge-model", help="model name at that endpoint")
    judge.add_argument("--judge-cache", default="results/judge_cache.sqlite", help="grades already given")
    judge.add_argument("--judge-concurrency", type=int, default=16, help="calls at a time")
    add_prompts_flag(judge)
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def score_chunk(
    rows: list[Row], bert: BertScore | None, judge: Judge | None, prompts: Prompts, weights: dict, answer_match: str
) -> list[Row]:
    """The rows with the terms and the reward of each of their trajectories."""
    answered = [(row, response) for row in rows for response in dict.fromkeys(row["responses"])]
    keys = [(row["id"], response) for row, response in answered]
    of_answer = {
        (row["id"], response): {
            "em": correctness(response, row, answer_match), "rouge": rouge_l(response, row["answers"]),
        }
        for row, response in answered
    }
    if bert:
        for key, score in zip(keys, bert.score([(response, row["answers"]) for row, response in answered]), strict=True):
            of_answer[key]["bert"] = score
    if judge:
        grades = judge.grade([prompts.judge(row["question"], row["answers"], response) for row, response in answered])
        for key, grade in zip(keys, grades, strict=True):
            of_answer[key]["judge"] = grade
    scored = []
    for row in rows:
        terms = [
            {**of_answer[row["id"], response], "length": length_term(len(ids))}
            for ids, response in zip(row["id_lists"], row["responses"], strict=True)
        ]
        scored.append({**row, "response_scores": [combine(term, weights) for term in terms], "score_terms": terms})
    return scored


def collect(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Every term, the reward and k, over all trajectories."""
    collected: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for ids, reward, terms in zip(row["id_lists"], row["response_scores"], row["score_terms"], strict=True):
            for name, value in {**terms, "reward": reward, "k": len(ids)}.items():
                collected[name].append(value)
    return collected


def main(argv=None):
    args = parse_args(argv)
    weights = parse_weights(args.weights)
    if bool(args.judge_base_url) != bool(args.judge_model):
        raise UserError("--judge-base-url and --judge-model belong together")
    encoder = [args.bert_model] if Path(args.bert_model).is_dir() else []
    out = Output(args, [args.output_file], [args.input_file, *encoder, *filter(None, [args.prompts])])
    if out.finished:
        return
    total = count_rows(args.input_file, NEEDS, skip_malformed=bool(out.reject))
    judge = None
    if args.judge_base_url:
        judge = Judge(args.judge_base_url, args.judge_model, args.judge_cache, args.judge_concurrency)
    elif weights.get("judge"):
        log.warning("no judge (--judge-base-url): the weights of the other terms are rescaled to sum to one")
    bert = None
    if weights.get("bert"):
        from dynamicrag.device import pick_device

        bert = BertScore(args.bert_model, args.bert_layer, pick_device(args.device))
    prompts = Prompts(args.prompts)
    rows = read_rows(args.input_file, NEEDS, reject=out.reject)
    out.process(
        rows, args.chunk_size, lambda chunk: score_chunk(chunk, bert, judge, prompts, weights, args.answer_match), total, "reward"
    )
    collected = collect(out.written())
    for name, values in collected.items():
        log.info("%-7s mean %.3f  spread %.3f", name, statistics.fmean(values), statistics.pstdev(values))
    out.finish(trajectories=len(collected.get("reward", ())), judge_calls=judge.calls if judge else 0)


if __name__ == "__main__":
    stage.run(main)

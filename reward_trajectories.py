"""Score every trajectory by its answer (DynamicRAG, reward from generator feedback).

The reward is a weighted mean of five terms in [0, 1]: exact match, BERTScore, ROUGE-L, brevity 1/(1+k), and an LLM
judge. Each distinct (question, answer) is scored once. Without a judge, the other weights are rescaled. The terms are
stored: --reweight combines the terms of an earlier run with other --weights, in seconds and without a model.

Four more terms are computed only if --weights names them: score (the data set's metric), gain (over a fixed list, see
--baseline-top of sampling_dpo_trajectories.py), likelihood (of the gold answer under --llm-model, without decoding), and
boundary, which weights a question by the share of right answers. dynamicrag/reward/terms.py defines them.

Reads    results/training_data_dpo_sampling.json         rows with answers, id_lists and responses
Writes   training_data/llama3_8b_output_dpo.jsonl        + response_scores, score_terms

    python reward_trajectories.py --input_file results/training_data_dpo_sampling.json \\
        --output_file training_data/llama3_8b_output_dpo.jsonl
"""

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.evaluation.metrics import METRIC_NAMES, rouge_l
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.llm.engine import resolve_model
from dynamicrag.llm.prompts import Prompts, add_prompts_flag
from dynamicrag.llm.templates import AUTO
from dynamicrag.models.device import DEVICES, device_flag, place
from dynamicrag.reward.bertscore import BertScore
from dynamicrag.reward.judge import MAX_REPLIES, REPLY_FORMATS, Judge
from dynamicrag.reward.moments import Moments
from dynamicrag.reward.terms import ANSWER_MATCHES, READS, combine, correctness, length_term, parse_weights, with_scores
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.stage import UserError, log

KEYS = STAGE_KEYS["reward_trajectories"]
ROWS_PER_BLOCK = 256  # rows of the output in memory while they are summarised


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="results/training_data_dpo_sampling.json", help="sampled trajectories")
    files.add_argument("--output_file", default="training_data/llama3_8b_output_dpo.jsonl", help="rewarded trajectories")
    reward = parser.add_argument_group("reward")
    reward.add_argument(
        "--weights", default="em=.2,bert=.2,rouge=.2,length=.2,judge=.2",
        help="weight of each term; 0 for terms that are left out"
    )
    reward.add_argument("--reweight", action="store_true",
                        help="combine the score_terms of the input, without computing any term")
    terms = parser.add_argument_group("terms")
    terms.add_argument("--answer-match", choices=ANSWER_MATCHES, default="exact", help="em term: equality, or containment (for long answers)")
    terms.add_argument(
        "--length-of", choices=["documents", "response"], default="documents",
        help="length term: 1/(1 + documents chosen), or 1/(1 + tokens of the response)",
    )
    terms.add_argument("--metric", choices=METRIC_NAMES, help="metric of the terms score and gain (default: that of each data set)")
    terms.add_argument("--llm-model", help="frozen generator of the likelihood term: checkpoint folder, training output or hub name")
    terms.add_argument("--template", default=AUTO, help="chat template of that generator: a file, or auto for its own")
    terms.add_argument("--answer-order", choices=["selection", "retrieval"], default="selection", help="order of the documents in that generator's prompt")
    terms.add_argument("--bert_model", default="roberta-large", help="encoder of BERTScore: a folder or a hub name")
    terms.add_argument("--bert_layer", type=int,
                       help="layer of the encoder (default: bert-score's choice for a known model, otherwise the last)")
    terms.add_argument(
        "--bert_baseline", default="auto",
        help="model whose bert-score baseline is mapped to 0; auto uses the encoder's own baseline if there is one; "
             "none uses no baseline",
    )
    terms.add_argument("--device", type=device_flag, default="auto", help=f"device of the encoder: {DEVICES}")
    terms.add_argument("--chunk_size", type=int, default=2000, help="questions scored between two writes to disk")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge-base-url",
                       metavar="URL", help="OpenAI-compatible endpoint; its key is read from JUDGE_API_KEY")
    judge.add_argument("--judge-model", help=f"model name at that endpoint; an answer costs at most {MAX_REPLIES} "
                                             "replies if none can be read")
    judge.add_argument("--judge-format", choices=REPLY_FORMATS, default="json_schema",
                       help="structured output that the endpoint supports; grades are always parsed strictly")
    judge.add_argument("--judge-limit", type=int, help="maximum number of calls in this run; grades are cached")
    judge.add_argument("--judge-cache", default="results/judge_cache.sqlite", help="file of cached grades")
    judge.add_argument("--judge-concurrency", type=int, default=16, help="number of concurrent calls")
    add_prompts_flag(judge)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    # Flags that need or exclude each other
    if bool(args.judge_base_url) != bool(args.judge_model):
        parser.error("--judge-base-url and --judge-model must be given together")
    if args.reweight and (args.judge_model or args.answer_match != "exact" or args.length_of != "documents"):
        parser.error("--reweight uses stored terms; omit --judge-model, --answer-match and --length-of, which compute "
                     "terms")
    if not args.reweight and parse_weights(args.weights).get("likelihood") and not args.llm_model:
        parser.error("--weights likelihood=...: needs the frozen generator; give it as --llm-model")
    return args


def terms_of_answers(
    rows: list[Row], bert: BertScore | None, judge: Judge | None, prompts: Prompts, answer_match: str
) -> list[list[dict[str, float]]]:
    """Return the terms that depend on the answer, for every trajectory of every row. Equal answers are scored once."""
    answered = [(row, response) for row in rows for response in dict.fromkeys(row["responses"])]
    keys = [(row["id"], response) for row, response in answered]
    of_answer = {
        key: {"em": correctness(response, row, answer_match), "rouge": rouge_l(response, row["answers"])}
        for key, (row, response) in zip(keys, answered, strict=True)
    }
    if bert:
        for key, score in zip(keys, bert.score([(response, row["answers"]) for row, response in answered]), strict=True):
            of_answer[key]["bert"] = score
    if judge:
        grades = judge.grade([(row["id"], prompts.judge(row["question"], row["answers"], response)) for row, response in answered])
        for key, grade in zip(keys, grades, strict=True):
            of_answer[key]["judge"] = grade
    return [[of_answer[row["id"], response] for response in row["responses"]] for row in rows]


def with_length(row: Row, terms: list[dict[str, float]], length_of: str) -> list[dict[str, float]]:
    """Return the terms of a row's trajectories with the length term added."""
    lengths = map(len, row["id_lists"]) if length_of == "documents" else row["response_tokens"]
    return [{**term, "length": length_term(length)} for term, length in zip(terms, lengths, strict=True)]


def rewarded(row: Row, terms: list[dict[str, float]], weights: dict[str, float]) -> Row:
    """Return the row with the terms and the reward of each trajectory."""
    return {**row, "response_scores": [combine(term, weights) for term in terms], "score_terms": terms}


def check_terms(path: str, rows: Iterable[Row], weights: dict[str, float]) -> bool:
    """Return whether the trajectories have grades of a judge.

    Raises UserError, naming the row, if a weighted term is missing or rows have different terms.
    """
    needed = {term for term, weight in weights.items() if weight} - {"judge"}
    first_terms: set[str] | None = None
    for row in rows:
        for terms in row["score_terms"][:1]:  # the reader has checked that the others have the same terms
            if lacking := sorted(needed - terms.keys()):
                raise UserError(
                    f"{path}: row {row['id']}: score_terms lacks {lacking[0]}; omit its weight, or run without "
                    "--reweight to compute it"
                )
            first_terms = first_terms or set(terms)
            if first_terms != terms.keys():
                raise UserError(f"{path}: row {row['id']}: score_terms has {', '.join(terms)}, but other rows have "
                                f"{', '.join(sorted(first_terms))}; score all rows with the same terms")
    return "judge" in (first_terms or ())


def summarise(rows: Iterable[Row]) -> tuple[int, dict[str, dict[str, float | None]]]:
    """Return the number of trajectories; and mean, spread and correlation with em and k of every term, the reward and k.

    A correlation is None if one of the two values is constant.
    """
    import numpy as np

    columns: list[str] = []
    moments: Moments | None = None
    rows = iter(rows)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        values = [
            (terms, reward, len(ids)) for row in block
            for ids, reward, terms in zip(row["id_lists"], row["response_scores"], row["score_terms"], strict=True)
        ]
        if values:
            columns = columns or [*values[0][0], "reward", "k"]
            moments = moments or Moments(len(columns))
            moments.add(np.array([[*(terms[term] for term in columns[:-2]), reward, k] for terms, reward, k in values], dtype=np.float64))
    if moments is None:
        return 0, {}
    mean, covariance = moments.mean, moments.products / moments.count
    spread = np.sqrt(covariance.diagonal())

    def correlation(a: int, b: int) -> float | None:
        return float(covariance[a, b] / spread[a] / spread[b]) if min(spread[a], spread[b]) > 1e-9 else None

    return moments.count, {
        name: {
            "mean": float(mean[number]), "spread": float(spread[number]),
            **{f"correlation_with_{other}": correlation(number, columns.index(other)) for other in ("em", "k")},
        }
        for number, name in enumerate(columns)
    }


def summary_table(summary: dict[str, dict[str, float | None]]) -> str:
    """Return a table with one line per term."""
    header = ["", "mean", "spread", "with correctness", "with k"]
    return markdown_table(header, [[name, *("" if v is None else f"{v:.3f}" for v in line.values())] for name, line in summary.items()])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    weights = parse_weights(args.weights)
    if args.judge_model and not weights.get("judge"):
        raise UserError("--judge-model: --weights gives its grades no weight, but each costs money; add judge=... or "
                        "omit --judge-model")
    # Check all rows before the long work
    flag = "--reweight" if args.reweight else f"--length-of {args.length_of}"
    needs = KEYS.reads_with.get(flag, KEYS.reads)
    models = []
    if not args.reweight:
        needs = tuple(dict.fromkeys([*needs, *(key for term, weight in weights.items() if weight for key in READS.get(term, ()))]))
        models = [args.bert_model, *([resolve_model(args.llm_model)] if weights.get("likelihood") else [])]
    files = [*(model for model in models if Path(model).is_dir()), *filter(None, [args.prompts, args.template if args.template != AUTO else None])]
    output = Output(vars(args), [args.output_file], [args.input_file, *files])
    if output.finished:
        return
    total = count_rows(args.input_file, needs, skip_malformed=bool(output.reject))
    judged = bool(args.judge_model)
    if args.reweight:
        judged = check_terms(args.input_file, read_rows(args.input_file, needs, reject=output.ignore), weights)
    if weights.get("judge") and not judged:
        log.warning("--judge-base-url: there is no judge; the weights of the other terms are rescaled to a sum of one")
    # What computes the terms
    bert = judge = likelihood = None
    if args.judge_model:
        judge = Judge(args.judge_base_url, args.judge_model, args.judge_cache, args.judge_concurrency, args.judge_limit, args.judge_format)
    if weights.get("bert") and not args.reweight:
        from dynamicrag.models.device import pick_device

        output.record(**place(args.device))
        bert = BertScore(args.bert_model, args.bert_layer, pick_device(args.device), args.bert_baseline)
    if weights.get("likelihood") and not args.reweight:
        from dynamicrag.models.device import pick_device
        from dynamicrag.reward.likelihood import Likelihood

        output.record(**place(args.device, "auto"))
        likelihood = Likelihood(args.llm_model, args.template, args.prompts, pick_device(args.device), args.answer_order)
    prompts = Prompts(args.prompts)

    def reward(rows: list[Row]) -> list[Row]:
        if args.reweight:
            return [rewarded(row, row["score_terms"], weights) for row in rows]
        terms = terms_of_answers(rows, bert, judge, prompts, args.answer_match)
        terms = [with_scores(row, with_length(row, of_row, args.length_of), weights, args.metric) for row, of_row in zip(rows, terms, strict=True)]
        if likelihood:
            terms = [[{**term, "likelihood": value} for term, value in zip(*pair, strict=True)] for pair in zip(terms, likelihood.of_trajectories(rows), strict=True)]
        return [rewarded(row, of_row, weights) for row, of_row in zip(rows, terms, strict=True)]

    # Reward
    try:
        output.process(read_rows(args.input_file, needs, reject=output.reject), args.chunk_size, reward, total, "reward")
    finally:
        if judge:
            said = {name: "not known" if value is None else value for name, value in judge.usage.counts().items()}
            log.info("judge: %(calls)s calls, %(cached)s cached grades; tokens: %(prompt_tokens)s in prompts, "
                     "%(generated_tokens)s generated", said)
    # Summarise
    trajectories, summary = summarise(output.written())
    log.info("rewards, and the correlation of each term with correctness (em) and with k:\n%s", summary_table(summary))
    usage = judge.usage.counts() if judge else {}
    scored = {"likelihoods": likelihood.computed, "likelihood_tokens": likelihood.prompt_tokens} if likelihood else {}
    output.finish(summary, trajectories=trajectories, **scored, **{f"judge_{name}": value for name, value in usage.items()})


if __name__ == "__main__":
    stage.run(main)

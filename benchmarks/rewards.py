"""Measure the speed of rewarding trajectories, compared with one BERTScore call per pair and with the encoder's limit,
in one run.

The published loop calls bert_score.score for every trajectory and gold answer, which loads the model each time. A
second loop loads it once. The limit is the encoder alone on the same distinct texts, in full batches of equal length.
The stage is timed on one chunk, including exact match and ROUGE, without a judge. The input is the output of sampling,
by default that of `bash scripts/demo.sh`.

    python benchmarks/rewards.py --bert_model models/minilm \\
        --input_file runs/demo_default/results/training_data_dpo_sampling.json
"""

import argparse
import sys
from collections.abc import Sequence

import bert_score
import measure
import numpy as np
from bert_score import BERTScorer

import reward_trajectories
from dynamicrag.llm.prompts import Prompts
from dynamicrag.models.batches import default_batch_tokens
from dynamicrag.reward.bertscore import BertScore
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS
from dynamicrag.stage import ArgumentParser, UserError

LIMIT = "encoder, padding-free limit"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--input_file", default="runs/demo_default/results/training_data_dpo_sampling.json")
    parser.add_argument("--bert_model", default="models/minilm", help="an encoder folder")
    parser.add_argument("--published_pairs", type=int, default=5, help="number of pairs for timing the published loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    try:
        rows = list(read_rows(args.input_file, STAGE_KEYS["reward_trajectories"].reads))
    except UserError as error:
        sys.exit(f"error: {error}; bash scripts/demo.sh creates the default input")
    # The pairs and their lengths in tokens
    pairs = [(response, gold) for row in rows for response in row["responses"] for gold in row["answers"] if response.strip() and gold.strip()]
    trajectories = sum(len(row["responses"]) for row in rows)
    bert = BertScore(args.bert_model, None, args.device, "none")
    texts = list(dict.fromkeys(text.strip() for pair in pairs for text in pair))
    lengths = [len(tokens) for tokens in bert._tokenizer(texts, truncation=True)["input_ids"]]
    sample = [pairs[number] for number in np.random.default_rng(0).choice(len(pairs), args.published_pairs, replace=False)]

    # What is compared
    def published() -> float:
        for response, gold in sample:
            bert_score.score([response], [gold], model_type=args.bert_model, num_layers=bert.layer, device=args.device)
        return len(sample) * trajectories / len(pairs)

    scorer = BERTScorer(model_type=args.bert_model, num_layers=bert.layer, device=args.device)

    def loaded_once() -> float:
        some = pairs[:: max(len(pairs) // 200, 1)]
        for response, gold in some:
            scorer.score([response], [gold])
        return len(some) * trajectories / len(pairs)

    def ours() -> float:
        reward_trajectories.terms_of_answers(rows, bert, None, Prompts(), "exact")
        return trajectories

    def limit() -> float:
        passes = measure.encoder_alone(bert._model, lengths, default_batch_tokens(args.device), args.device)
        return passes * trajectories / len(texts)

    systems = {
        "bert_score.score per pair, as published": published, "one call per pair, model loaded once": loaded_once,
        "reward_trajectories.py": ours, LIMIT: limit,
    }
    # Measure and report
    seconds = measure.in_turns(systems, args.rounds)
    rows_of_table = [
        [name, f"{1 / s:.1f}", f"{seconds['bert_score.score per pair, as published'] / s:.1f}", f"{seconds[LIMIT] / s:.2f}"]
        for name, s in seconds.items()
    ]
    title = (f"Rewards, {trajectories} trajectories, {len(pairs)} pairs, {len(texts)} unique texts of {np.mean(lengths):.0f} tokens "
             f"({min(lengths)} to {max(lengths)}), {args.device}")
    measure.report(title, ["", "trajectories/s", "to the published loop", "to the limit"], rows_of_table, {n: 1 / s for n, s in seconds.items()}, args.output_file)


if __name__ == "__main__":
    main()

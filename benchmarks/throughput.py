"""Measure the throughput of sampling, reward and inference on this machine with one model, loaded once.

Each stage is timed on its own work without loading models; the reward is timed without a judge. The engine's prefix
cache is emptied before each stage. Model and questions are those of the demo by default (`bash scripts/demo.sh`). On a
GPU, give enough questions to keep it busy.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --llm_model DynamicRAG_llama3_8b --template template/llama3.jinja --topn 20 --max_model_len 8192 \\
        --input_file training_data/training_data_dpo.jsonl --bert_model roberta-large --questions 500 --rounds 1
"""

import argparse
import sys
from collections.abc import Sequence

import measure

import inference
import sampling_dpo_trajectories
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.requests import load_builders
from dynamicrag.models.device import pick_device
from dynamicrag.reward.bertscore import BertScore
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import ArgumentParser, UserError, options_from
from reward_trajectories import terms_of_answers

DEMO = "runs/demo_default"
UNITS = ("questions", "trajectories", "prompt_tokens", "generated_tokens")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--llm_model", default=f"{DEMO}/DynamicRAG_smollm2_135m/sft")
    parser.add_argument("--template", default="template/smollm2.jinja")
    parser.add_argument("--bert_model", default="models/minilm", help="an encoder folder")
    parser.add_argument("--input_file", default=f"{DEMO}/training_data/training_data_dpo.jsonl", help="questions with docs and answers")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--topn", type=int, default=5, help="documents shown")
    parser.add_argument("--max_model_len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output_file", help="JSON file to which the results are added")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    try:
        rows = list(read_rows(args.input_file, ("docs", "answers")))[: args.questions]
        settings = sampling_dpo_trajectories.parse_args([
            "--llm-model", args.llm_model, "--template", args.template, "--topn", str(args.topn), "--max-model-len", str(args.max_model_len),
        ])
        builders = load_builders(options_from(settings, EngineOptions), options_from(settings, CallOptions))
        device = pick_device("auto")
        bert = BertScore(args.bert_model, None, device, "none")
    except UserError as error:
        sys.exit(f"error: {error}; bash scripts/demo.sh creates the default files")
    made: dict[str, list[Row]] = {}

    def sampling() -> float:
        builders[0].engine._llm.reset_prefix_cache()
        made["sampling"] = sampling_dpo_trajectories.sample_trajectories(rows, builders, settings)
        return len(rows)

    def reward() -> float:
        terms_of_answers(made["sampling"], bert, None, Prompts(), "exact")
        return len(rows)

    def answering() -> float:
        builders[0].engine._llm.reset_prefix_cache()
        made["inference"] = inference.answer_rows(rows, builders, "dynamic", args.topn, args.input_file)
        return len(rows)

    seconds = measure.in_turns({"sampling": sampling, "reward": reward, "inference": answering}, args.rounds)
    figures: dict[str, dict[str, float]] = {}
    for stage, one in seconds.items():
        figures[stage] = {"questions": 1 / one}
        if stage != "inference":
            figures[stage]["trajectories"] = settings.num_samples / one
        for row in made.get(stage, ()):
            for unit in ("prompt_tokens", "generated_tokens"):
                figures[stage][unit] = figures[stage].get(unit, 0) + row["usage"][unit] / len(rows) / one
    lines = [[stage, *(f"{of_stage[unit]:,.1f}" if unit in of_stage else "" for unit in UNITS)] for stage, of_stage in figures.items()]
    title = f"Stages on {device}, {len(rows)} questions of {args.topn} documents, {settings.num_samples} trajectories each"
    measure.report(title, ["per second", *(unit.replace("_", " ") for unit in UNITS)], lines, figures, args.output_file)


if __name__ == "__main__":
    main()

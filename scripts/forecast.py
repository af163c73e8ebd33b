"""Forecast the tokens, GPU hours and disk of an experiment, from its rows and a stated throughput. It starts nothing.

Every row is counted. Of a random sample the prompts are built and their tokens counted, in memory that does not depend on
the size of the file. Nobody knows in advance how many documents a model chooses (--docs_chosen), and an answer counts with
the longest that is allowed. The second table says what was assumed.

    answer    evaluation files; after -- the flags of inference.py
    train     a training file, through scripts/03_rerank.sh to scripts/08_dpo.sh; after -- the flags of
              sampling_dpo_trajectories.py

Reads    data/prepared/dynamicrag_nq.jsonl      rows with docs
Writes   standard output                        two tables in Markdown

    PYTHONPATH=. python scripts/forecast.py answer --gpus 8 -- --llm-model models/DynamicRAG-8B --topn 40 \\
        --input-json data/prepared/dynamicrag_nq.jsonl
"""

import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from statistics import fmean

from forecast_costs import Cost, Plan, Rates, answering, pair_limits, reranking, total, training
from forecast_rows import Counted, Lengths, means_of, parameters_of

import construct_dpo
import inference
import process_training_data
import sampling_dpo_trajectories
import split_for_sft_dpo
from dynamicrag import stage
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.stage import log

MEASURED = "measured on one NVIDIA H200 (docs/scale.md)"
# Flag: default, what it is, where the default is from; in the order of Rates.
ASSUMED: dict[str, tuple[float, str, str]] = {
    "--parameters": (8e9, "parameters of the LLM", "a guess: the model is not here"),
    "--flops": (4e14, "operations per second, reading prompts and training", "a guess: 40 % of what an H100 can do in bfloat16"),
    "--generated_per_second": (2000, "tokens per second that an engine generates", "a guess; benchmarks/throughput.py measures it"),
    "--reranked_per_second": (1233, "documents per second that the reranker scores", MEASURED),
    "--scored_per_second": (1035, "answers per second that BERTScore scores", MEASURED),
    "--docs_chosen": (5, "documents that the model chooses per question", "a guess"),
}


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("experiment", choices=["answer", "train"])
    parser.add_argument("--gpus", type=int, default=1, help="GPUs among which every stage is divided")
    parser.add_argument("--parts", type=int, default=1, help="parts of every file (NUM_SHARDS); each is written as well")
    parser.add_argument("--sample", type=int, default=200, help="rows of a file whose tokens are counted")
    parser.add_argument("--disk", default=".", help="folder whose free space is compared")
    parser.add_argument("--rerank", action="store_true", help="answer: the rows are reranked first")
    rates = parser.add_argument_group("throughput", "of one GPU")
    for flag, (default, unit, _) in ASSUMED.items():
        rates.add_argument(flag, type=float, help=f"{unit} (default: {default:g})")
    trained = parser.add_argument_group("training")
    for name, default in (("sft", 3.0), ("dpo", 1.0)):
        trained.add_argument(f"--{name}_epochs", type=float, default=default, help="num_train_epochs of the recipe")
        trained.add_argument(f"--{name}_adapters", action="store_true", help="the recipe trains adapters (LoRA)")
    trained.add_argument("--no_reference", action="store_true", help="SimPO: there is no reference model")
    trained.add_argument("--cutoff_len", type=int, help="of the recipe (default: the window)")
    for name in ("expert", "split", "pair"):
        trained.add_argument(f"--{name}_flags", default="", help=f"{name.upper()}_FLAGS of the settings file")
    stage.add_seed_flag(parser)
    argv = sys.argv[1:] if argv is None else list(argv)
    own = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:own])
    args.asked = (inference if args.experiment == "answer" else sampling_dpo_trajectories).parse_args(argv[own + 1 :])
    if args.gpus < 0 or min(args.parts, args.sample, *given(args).values()) <= 0:
        parser.error("--gpus must be at least 0, and every other number above 0")
    return args


def given(args: Namespace) -> dict[str, float]:
    """Return the figures that flags give."""
    return {flag: value for flag in ASSUMED if (value := getattr(args, flag.lstrip("-"))) is not None}


def assumptions(args: Namespace) -> dict[str, tuple[float, str]]:
    """Return each assumed figure and its source: a flag, the files of the model, or a default."""
    counted = parameters_of(args.asked.llm_model)
    figures = {flag: (default, source) for flag, (default, _, source) in ASSUMED.items()}
    if counted:
        figures["--parameters"] = counted, f"counted in {args.asked.llm_model}"
    return figures | {flag: (value, "given") for flag, value in given(args).items()}


def plan_of(args: Namespace, file: Counted) -> Plan:
    """Return how the stages divide the rows, by their own flags."""
    expert_flags, split, pair = (
        module.parse_args(shlex.split(flags)) for module, flags in
        ((process_training_data, args.expert_flags), (split_for_sft_dpo, args.split_flags), (construct_dpo, args.pair_flags))
    )
    expert = expert_flags.max_rows or min(process_training_data.PUBLISHED_EXPERT_ROWS, max(1, file.rows // process_training_data.EXPERT_SHARE))
    sft, dpo, _ = map(len, split_for_sft_dpo.places(file.rows - expert, split.sft_size, split.dpo_size, split.dev_size))
    samples = args.asked.num_samples + args.asked.include_expert
    pairs = pair_limits(pair.pairs, samples, dpo, pair.max_pairs_per_question, pair.max_reranker_pairs, pair.max_generator_pairs)
    return Plan(file.rows, file.labelled, expert, sft, dpo, samples, args.asked.num_samples if args.asked.permute else 1, *pairs, args.parts,
                args.sft_epochs, args.dpo_epochs, args.sft_adapters, args.dpo_adapters, not args.no_reference)


def cost_table(costs: list[Cost]) -> str:
    """Return one line per stage: rows, million tokens, GPU hours and gigabytes."""
    def cell(amount: float, unit: float = 1) -> str:
        return "" if not amount else f"{amount / unit:,.0f}" if amount >= 100 * unit else f"{amount / unit:.3g}"

    header = ["stage", "rows", "M tokens read", "M tokens written", "M tokens trained", "GPU hours", "GB kept", "GB meanwhile"]
    rows = [
        [cost.stage, str(cost.rows or ""), *(cell(tokens, 1e6) for tokens in (cost.read, cost.written, cost.trained)), cell(cost.hours),
         *(cell(size, 1e9) for size in (cost.kept, cost.meanwhile))]
        for cost in costs
    ]
    return markdown_table(header, rows)


def assumption_table(figures: dict[str, tuple[float, str]], rates: Rates, sample: int, counted: str) -> str:
    """Return one line per assumption, with where it is from."""
    rows = [[flag, f"{value:,.0f}", ASSUMED[flag][1], source] for flag, (value, source) in figures.items()]
    for what, operations in (("prompt tokens per second", 2), ("tokens per second of SFT of all weights", 8)):
        rows.append(["", f"{rates.flops / rates.parameters / operations:,.0f}", what, f"computed: {operations} operations per parameter"])
    rows.append(["--sample", f"{sample}", "rows of each file whose tokens are counted", counted])
    return markdown_table(["flag", "value", "what", "source"], rows)


def forecast(args: Namespace, rates: Rates, lengths: Lengths) -> list[Cost]:
    """Return the costs of the stages. Raises UserError for a file that cannot be used."""
    if args.experiment == "train":
        file = Counted(args.asked.input_json, args.sample, args.seed)
        # training rows and prompts of sampling, which show the same documents
        lengths.window.cutoff_len = args.cutoff_len or lengths.window.cutoff_len
        return [*training(plan_of(args, file), means_of(file, lengths), rates)]
    costs, selectors = [], args.asked.selector
    for path in args.asked.input_json:
        file = Counted(path, args.sample, args.seed)
        if args.rerank:
            costs.append(reranking(f"rerank {file.name}", file.rows, fmean(len(row["docs"]) for row in file.sample), file.bytes, args.parts, rates))
        asked = [[lengths.question(row, selector) for selector in selectors] for row in file.sample]
        read, written = (fmean(sum(tokens[column] for tokens in row) for row in asked) for column in (0, 1))
        costs.append(answering(f"answer {file.name}", file.rows, read, written, file.bytes, len(selectors), args.parts, rates))
    return costs


def main(argv=None):
    args = parse_args(argv)
    figures = assumptions(args)
    *per_second, docs_chosen = (value for value, _ in figures.values())
    rates, lengths = Rates(*per_second), Lengths(args.asked, int(docs_chosen))
    costs = forecast(args, rates, lengths)
    whole = total(costs)
    print(f"{cost_table([*costs, whole])}\n\nAssumed:\n\n{assumption_table(figures, rates, args.sample, lengths.source)}\n")
    disk = next(folder for folder in (Path(args.disk), *Path(args.disk).resolve().parents) if folder.exists())
    free, most = shutil.disk_usage(disk).free, whole.kept + whole.meanwhile
    hours = f"{whole.hours / args.gpus:.1f} hours on {args.gpus} GPUs, if each stage uses all of them" if args.gpus else "no GPU is here"
    print(f"In all {whole.hours:.1f} GPU hours ({hours}), and at most {most / 1e9:.1f} GB of disk at one time; {free / 1e9:.1f} GB are free.")
    if most > free:
        log.warning("%s: %.1f GB are free, and up to %.1f GB are needed; free some, or set WORK to a folder of a larger disk", disk, free / 1e9, most / 1e9)


if __name__ == "__main__":
    stage.run(main)

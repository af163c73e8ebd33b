"""Train the selector with GRPO: it samples selections, and a frozen generator's answers from them are the reward.

Only the selector changes. Eight selections are sampled per question, constrained to valid identifiers. Each is answered by
the generator (in this process, or a server at --api-base), exactly as inference.py would answer it, and scored as
evaluate.py would score it. Answers are kept by question and documents, so that none is generated twice. Questions whose
samples all have the same score, because all are right or all are wrong, are left out of the step and counted. With
--dev_file, the greedy selections of held-out questions are scored every --eval_steps steps: the best model is kept, and
training stops after --patience evaluations without a better one. An interrupted run continues from its last checkpoint.

Reads    training_data/training_data_dpo.jsonl       rows with docs and answers
Writes   DynamicRAG_llama3_8b/grpo_reranker/         the trained selector, an ordinary checkpoint
         DynamicRAG_llama3_8b/grpo_reranker/grpo.jsonl      one row per step and per evaluation; the manifest has the costs

    python grpo_selector.py --llm-model DynamicRAG_llama3_8b --dev_file training_data/training_data_dev.jsonl
"""

import argparse
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from dynamicrag import stage
from dynamicrag.evaluation.answers import score_question
from dynamicrag.evaluation.metrics import METRIC_NAMES
from dynamicrag.files.jsonio import dump_line
from dynamicrag.llm.choosing import choose_among
from dynamicrag.llm.engine import add_engine_flags, engine_inputs, load_engine, resolve_model, window_of
from dynamicrag.llm.frozen import FrozenEngine
from dynamicrag.llm.model_files import prompts_for, pull
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.policy import PolicyEngine
from dynamicrag.llm.requests import RequestBuilder, add_call_flags, load_builders
from dynamicrag.llm.templates import in_threads, load_prompts
from dynamicrag.reward.grpo import Groups, GrpoOptions, Score, Scored, last_checkpoint, make_trainer
from dynamicrag.reward.preferences import worth_learning_from
from dynamicrag.reward.trajectories import bounds
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.rows.shown import DOCUMENTS_HELP, DOCUMENTS_SHOWN, check_shown
from dynamicrag.stage import UserError, log, options_from
from inference import answer_rows

NEEDS = STAGE_KEYS["grpo_selector"].reads


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/training_data_dpo.jsonl", help="questions to train on")
    files.add_argument("--dev_file", help="held-out questions, which choose the model that is kept (default: none; the last one is)")
    files.add_argument("--output_dir", default="DynamicRAG_llama3_8b/grpo_reranker", help="folder of the trained selector")
    files.add_argument("--topn", "--n-docs", dest="topn", type=int, default=DOCUMENTS_SHOWN, help=DOCUMENTS_HELP)
    files.add_argument("--keep-mean", metavar="LO,HI", type=bounds, default=(0.0, 1.0),
                       help="of rewarded rows, use those whose trajectories have a mean correctness in this range, such as 0.01,0.99")
    reward = parser.add_argument_group("reward")
    reward.add_argument("--reward", choices=["score", "likelihood"], default="score",
                        help="score of the generator's answer, or the likelihood of the gold answer under it, without decoding")
    reward.add_argument("--metric", choices=METRIC_NAMES, help="metric of the score (default: that of each data set)")
    reward.add_argument("--document-cost", type=float, default=0.0, help="subtracted from the reward for each document")
    training = parser.add_argument_group("training")
    training.add_argument("--num-samples", type=int, default=8, help="selections per question")
    training.add_argument("--temperature", type=float, default=1.0, help="temperature of the selections")
    training.add_argument("--questions_per_step", type=int, default=8, help="questions between two updates of the weights")
    training.add_argument("--rows_per_pass", type=int, default=8, help="selections in memory at a time; divides questions x samples")
    training.add_argument("--epochs", type=float, default=1.0, help="passes over the questions")
    training.add_argument("--max_steps", type=int, help="maximum number of steps (default: as many as the epochs have)")
    training.add_argument("--learning_rate", type=float, default=1e-6, help="highest learning rate; ten times as much is common with --lora_rank")
    training.add_argument("--beta", type=float, default=0.04, help="weight of the KL divergence from the model at the start")
    training.add_argument("--loss_type", choices=["dapo", "grpo", "dr_grpo"], default="dapo", help="normalisation of the loss, as in TRL")
    training.add_argument("--lora_rank", type=int, default=0, help="train an adapter of this rank and merge it at the end (default: all weights)")
    training.add_argument("--eval_steps", type=int, default=10, help="steps between two checkpoints, and evaluations on --dev_file")
    training.add_argument("--patience", type=int, default=3, help="evaluations without a better score after which training stops")
    add_engine_flags(parser)
    add_call_flags(parser, in_chunks=False)
    parser.set_defaults(chunk_size=CallOptions.chunk_size)  # all questions of a step are one batch
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if min(args.num_samples - 1, args.questions_per_step, args.rows_per_pass, args.eval_steps, args.patience, args.max_steps or 1) < 1 or args.lora_rank < 0:
        parser.error("--num-samples must be at least 2, --lora_rank at least 0, and the other numbers at least 1")
    if args.max_steps is None and not args.epochs > 0:
        parser.error("--epochs must be above 0")
    if args.questions_per_step * args.num_samples % args.rows_per_pass or not args.temperature > 0 or not args.beta > 0:
        parser.error("--rows_per_pass must divide --questions_per_step times --num-samples; --temperature and --beta must be above 0")
    if args.api_base and (args.reward == "likelihood" or not args.reranker_model):
        parser.error("--api-base: needs --reranker-model, the folder of the selector, and --reward score")
    return args


def score_by_answers(rows: Sequence[Row], chooser: RequestBuilder, generator: RequestBuilder, args: argparse.Namespace) -> list[Scored]:
    """Return what the selections of `chooser` are worth: as inference.py answers from them, and evaluate.py scores the answers."""
    answered = answer_rows(list(rows), (chooser, generator), "dynamic", args.topn, args.input_file)
    outcomes = [score_question(row, args.metric, "dataset", args.input_file) for row in answered]
    return [Scored(outcome.score, outcome.documents) if outcome else Scored(0.0, None) for outcome in outcomes]


def load_score(engine: EngineOptions, calls: CallOptions, output: Path, args: argparse.Namespace) -> tuple[Score, Callable[[], dict[str, int | None]]]:
    """Load the frozen generator. Returns the score of selections, and a function that gives its costs so far."""
    if args.reward == "likelihood":
        from dynamicrag.models.device import pick_device
        from dynamicrag.reward.likelihood import Likelihood

        likelihood = Likelihood(engine.llm_model, engine.template, calls.prompts, pick_device("auto"), calls.answer_order)

        def by_likelihood(rows: Sequence[Row], chooser: RequestBuilder) -> list[Scored]:
            shown = in_threads(lambda row: chooser.shown(row["question"], row["docs"][: args.topn]), rows)
            choices, _ = choose_among(list(rows), shown, chooser)
            chosen = {number: [shown[number][position - 1] for position in choice] for number, choice in enumerate(choices) if isinstance(choice, list)}
            values = likelihood.cached([(rows[number], docs) for number, docs in chosen.items()])
            scored = dict(zip(chosen, values, strict=True))
            return [Scored(scored.get(number, 0.0), len(chosen[number]) if number in chosen else None) for number in range(len(rows))]

        return by_likelihood, lambda: {"answers": 0, "likelihoods": likelihood.computed, "generator_prompt_tokens": likelihood.prompt_tokens, "generator_generated_tokens": 0}
    frozen: list[FrozenEngine] = []

    def load(options: EngineOptions) -> FrozenEngine:
        frozen.append(FrozenEngine(load_engine(options), output, options.llm_model))
        if args.overwrite:
            frozen[0].cache.remove()
        return frozen[0]

    _, generator = load_builders(engine, replace(calls, reranker_model=None), both=False, load=load)

    def costs() -> dict[str, int | None]:
        usage = frozen[0].usage
        return {"answers": usage.calls, "generator_prompt_tokens": usage.prompt_tokens, "generator_generated_tokens": usage.generated_tokens}

    return lambda rows, chooser: score_by_answers(rows, chooser, generator, args), costs


def read_questions(path: str, args: argparse.Namespace, output: Output) -> list[Row]:
    """Return the rows of a file that can be trained on or scored: those with documents, and in the range of --keep-mean if rewarded."""
    rows = [row for row in read_rows(path, NEEDS, args.dataset, output.reject) if row["docs"]]
    kept = [row for row in rows if not row.get("score_terms") or path == args.dev_file or worth_learning_from(row, args.keep_mean)]
    check_shown(path, kept, "--topn", args.topn)
    if len(kept) < (1 if path == args.dev_file else args.questions_per_step):
        raise UserError(f"{path}: only {len(kept)} questions can be used; give more, or lower --questions_per_step")
    return kept


def save(trainer: Any, folder: Path, start: str, unchanged: bool) -> None:
    """Write the selector as an ordinary checkpoint in the precision of the model that it started from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynamicrag.models.checkpoints import NO_CODE

    dtype = AutoConfig.from_pretrained(start, **NO_CODE).dtype
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype="auto", **NO_CODE) if unchanged else trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    (model.to(dtype) if dtype else model).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    engine, calls, options = options_from(args, EngineOptions), options_from(args, CallOptions), options_from(args, GrpoOptions)
    if missing := [name for name in ("trl", "peft") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]}: is not installed, but trains the selector; install it with: pip install 'dynamicrag[grpo]'")
    folder = Path(args.output_dir)
    start = resolve_model(args.reranker_model or args.llm_model)
    inputs = [args.input_file, *filter(None, [args.dev_file]), *dict.fromkeys([*engine_inputs(engine, calls), *([start] if Path(start).is_dir() else [])])]
    output = Output(vars(args), [str(folder / "grpo.jsonl")], inputs)
    if output.finished:
        return
    rows = read_questions(args.input_file, args, output)
    held_out = read_questions(args.dev_file, args, output) if args.dev_file else []
    output.begin()
    checkpoints = folder / "checkpoints"
    if args.overwrite:
        shutil.rmtree(checkpoints, ignore_errors=True)
    # The generator first: vLLM takes its share of a free GPU
    score, costs = load_score(engine, calls, folder / "answers", args)
    start = pull(start)
    template = args.reranker_template or args.template
    policy = PolicyEngine(load_prompts(start, template, args.enable_thinking == "on"), window_of(start, args.max_model_len))
    chooser = RequestBuilder(cast(Any, policy), replace(calls, prompts=prompts_for(start, calls.prompts)))
    shown = in_threads(lambda row: chooser.shown(row["question"], row["docs"][: args.topn]), rows)
    # Train
    groups = Groups(rows, shown, chooser, policy, score, options)
    dev = (lambda: score(held_out, chooser)) if held_out else None
    trainer = make_trainer(load_model(start, args.lora_rank), groups, [row["id"] for row in rows], policy, dev, options, checkpoints)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    # Keep the best model
    history = trainer.state.log_history
    scores = {entry["step"]: entry["eval_score"] for entry in history if "eval_score" in entry}
    unchanged = len(scores) > 1 and scores[0] >= max(value for step, value in scores.items() if step)
    if unchanged:
        log.warning("%s: no evaluation scored higher than the selector at the start, which is kept; train longer, at another --learning_rate "
                    "or on more questions", args.output_dir)
    save(trainer, folder, start, unchanged)
    steps = [entry for entry in history if "left_out" in entry]
    groups_sampled, left_out = len(steps) * args.questions_per_step, round(sum(entry["left_out"] for entry in steps))
    if left_out > groups_sampled / 2:
        log.warning("%s: %d of %d groups taught nothing, because all their answers were right or all were wrong; give rewarded rows with --keep-mean, "
                    "more --num-samples, or a graded --metric", args.input_file, left_out, groups_sampled)
    output.append(map(dump_line, history))
    output.rows = len(history)
    summary = {"start_score": scores.get(0), "best_score": max(scores.values(), default=None), "best_step": max(scores, key=lambda step: (scores[step], -step), default=None)}
    output.finish(summary, steps=trainer.state.global_step, groups=groups_sampled, left_out=left_out,
                  selector_tokens=int(trainer.state.num_input_tokens_seen), **costs())
    shutil.rmtree(checkpoints, ignore_errors=True)
    (folder / "answers.partial.completions.jsonl").unlink(missing_ok=True)


def load_model(path: str, lora_rank: int) -> Any:
    """Return the model to train: in float32 if all weights change, because small updates are lost in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from dynamicrag.models.checkpoints import load_weights, loading
    from dynamicrag.models.device import pick_device, pick_dtype, refuse_gpus_named_twice

    refuse_gpus_named_twice()
    if torch.cuda.device_count() > 1:
        raise UserError("CUDA_VISIBLE_DEVICES: GRPO trains on one GPU; make one visible, and serve the generator from another one with --api-base")
    with loading(path, "a language model"):
        return load_weights(AutoModelForCausalLM, path, dtype=pick_dtype("auto", pick_device("auto")) if lora_rank else torch.float32)


if __name__ == "__main__":
    stage.run(main)

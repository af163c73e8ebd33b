"""Construct preference pairs from rewarded trajectories, for the reranker and the generator (DynamicRAG, DPO stage).

Reranker: the prompt is the question with its documents; a trajectory is preferred to one of lower reward (see --pairs).
Generator: the prompt is the question with the best trajectory's documents; the gold answer is preferred to the
lowest-scoring wrong response. The published recipe (--recipe published) rejects the first response that differs from
the gold answer, and divides the questions: the first 10,000 of 50,000 give generator pairs, the others reranker pairs.
If a pair exceeds the trainer's cutoff_len, whole documents are removed from the end. A pair that names a removed
document, or still does not fit, is left out and counted.

Reads    training_data/llama3_8b_output_dpo.jsonl        rows with id_lists, responses, response_scores, score_terms
Writes   training_data/llama3_8b_reranker_dpo.json       LLaMA-Factory rows: instruction, input, chosen, rejected, system
         training_data/llama3_8b_generator_dpo.json      likewise

    python construct_dpo.py
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dynamicrag import stage
from dynamicrag.llm.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.llm.recipe import LengthOptions, add_length_flags, check_columns, resolve_length_flags
from dynamicrag.llm.training_rows import Fitted, TrainingWindow, load_window
from dynamicrag.models.chat_templates import Messages
from dynamicrag.reward.pair_figures import TargetLengths, Taught, figures, say_what_they_teach
from dynamicrag.reward.preferences import PAIRS, capped, distinct, generator_pair, reranker_pairs, worth_learning_from
from dynamicrag.reward.trajectories import add_keep_mean_flag, read_trajectories, warn_of_defaults
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.output import Output
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.stage import UserError, options_from

PUBLISHED_QUESTIONS = 50_000
PUBLISHED_GENERATOR_QUESTIONS = 10_000
GENERATOR_SHARE = 5  # in a smaller data set, one fifth of the questions give generator pairs
NEEDS = STAGE_KEYS["construct_dpo"].reads


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/llama3_8b_output_dpo.jsonl", help="rewarded trajectories")
    files.add_argument("--reranker_file", default="training_data/llama3_8b_reranker_dpo.json", help="reranker pairs")
    files.add_argument("--generator_file", default="training_data/llama3_8b_generator_dpo.json", help="generator pairs")
    add_prompts_flag(files)
    questions = parser.add_argument_group("questions")
    questions.add_argument("--recipe", choices=["default", "published"], default="default", help="see above")
    add_keep_mean_flag(questions)
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--pairs", default="best-worst",
        help="pairs of a question's distinct trajectories: best-worst; all; or top-bottom:M, each of the M best with each "
        "of the M worst",
    )
    pairs.add_argument("--pair-by", choices=["set", "order"],
                       help="set: the same documents in another order are equal, so that no pair differs in the order "
                            "only; order: they are distinct (default: set, or order with --recipe published)")
    pairs.add_argument("--min-margin", type=float, default=0.0, help="minimum difference in reward of a reranker pair")
    pairs.add_argument("--max-pairs-per-question", type=int, help="maximum number of reranker pairs per question; the widest margins are kept")
    pairs.add_argument("--generator-chosen", choices=["gold", "best"], default="gold", help="chosen answer: the gold answer, or the best sampled one")
    pairs.add_argument("--max-reranker-pairs", type=int, help="maximum number of reranker pairs, drawn at random (default: all)")
    pairs.add_argument("--max-generator-pairs", type=int, help="maximum number of generator pairs, drawn at random (default: all)")
    pairs.add_argument("--group_by", default="dataset", help="key of the rows by which pairs and target lengths are reported")
    add_length_flags(parser, "recipes/llama3_8b/dpo.yaml")
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    # Values, and flags that exclude each other
    if not PAIRS.fullmatch(args.pairs):
        parser.error(f"--pairs {args.pairs}: expected best-worst, all or top-bottom:M")
    caps = (args.max_pairs_per_question, args.max_reranker_pairs, args.max_generator_pairs)
    if not args.min_margin >= 0 or any(cap is not None and cap < 1 for cap in caps):
        parser.error("--min-margin must be at least 0, and each --max-... at least 1")
    published = args.recipe == "published"
    args.pair_by = args.pair_by or ("order" if published else "set")
    if published and (args.pairs, args.pair_by, args.min_margin, args.generator_chosen) != ("best-worst", "order", 0.0, "gold"):
        parser.error("--recipe published uses best against worst by order, no margin and the gold answer; omit --pairs, "
                     "--pair-by, --min-margin and --generator-chosen")
    return args


def fit_pair(
    build: Callable[[Sequence[Doc]], Messages], docs: list[Doc], named: int, targets: tuple[str, str], window: TrainingWindow, about: dict[str, Any]
) -> Fitted:
    """Return a pair with the documents that fit together with the longer of `targets`; no row if document `named` is removed."""
    shown = window.documents(build, docs, *targets)
    if shown is None or (len(shown) < len(docs) and (len(shown) < named or not shown)):
        return Fitted(None)
    row = training_row(build(shown), chosen=targets[0], rejected=targets[1])
    return Fitted(row, len(docs) - len(shown), {**about, "target size": sum(map(window.size, targets))})


def reranker_pairs_of(row: Row, prompts: Prompts, args: argparse.Namespace, window: TrainingWindow) -> list[Fitted]:
    """Return the reranker pairs of a question, each with its figures."""
    docs, pairs = row["docs"][: row["docs_shown"]], []

    def build(some: Sequence[Doc]) -> Messages:
        return prompts.reranker(row["question"], some)

    for pair in reranker_pairs(row, args.pairs, args.min_margin, args.max_pairs_per_question, args.pair_by):
        chosen, rejected = row["id_lists"][pair.chosen], row["id_lists"][pair.rejected]
        targets, named = (format_ids(chosen, prompts.notation), format_ids(rejected, prompts.notation)), max([*chosen, *rejected], default=0)
        pairs.append(fit_pair(build, docs, named, targets, window, figures(row, pair, args.input_file) | {"group": str(row.get(args.group_by) or "")}))
    return pairs


def generator_pairs_of(row: Row, prompts: Prompts, args: argparse.Namespace, window: TrainingWindow) -> list[Fitted]:
    """Return the generator pair of a question, if there is one. It has no figures but its group."""
    pair = generator_pair(row, args.generator_chosen, args.recipe == "published")
    if not pair:
        return []
    best, chosen, rejected = pair
    positions = row["id_lists"][best]
    docs, instruction = [row["docs"][position - 1] for position in positions], prompts.instruction(row)

    def build(some: Sequence[Doc]) -> Messages:
        return prompts.generator(row["question"], some, instruction, positions[: len(some)])

    return [fit_pair(build, docs, 0, (chosen, rejected), window, {"group": str(row.get(args.group_by) or "")})]


def training_rows(
    pairs_of: Callable[..., list[Fitted]], rows: Iterable[Row], prompts: Prompts, args: argparse.Namespace,
    window: TrainingWindow | None = None, total: int | None = None,
) -> Iterator[tuple[dict[str, str], Mapping[str, Any]]]:
    """Yield the training row and the figures of every pair that fits the window."""
    window = window or TrainingWindow()
    work = partial(pairs_of, prompts=prompts, args=args, window=window)
    for pair in window.kept(rows, work, total, pairs_of.__name__.replace("_", " "), args.input_file):
        if pair.row is not None:
            yield pair.row, pair.about


reranker_rows = partial(training_rows, reranker_pairs_of)
generator_rows = partial(training_rows, generator_pairs_of)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    inputs = [args.input_file, *filter(None, [args.prompts]), *resolve_length_flags(args)]
    output = Output(vars(args), [args.reranker_file, args.generator_file], inputs)
    if output.finished:
        return
    prompts, window = Prompts(args.prompts), load_window(options_from(args, LengthOptions))
    defaults: Counter[str] = Counter()
    count, differing = 0, bytearray()  # for each question used, whether its rewards differ

    # Read once: which questions are used, and which set each belongs to
    for row in read_trajectories(args.input_file, NEEDS, output.reject, defaults):
        count += 1
        if worth_learning_from(row, args.keep_mean):
            differing.append(len(set(row["response_scores"])) > 1)
    warn_of_defaults(defaults, args.input_file)
    for_generator = PUBLISHED_GENERATOR_QUESTIONS if count >= PUBLISHED_QUESTIONS else max(1, sum(differing) // GENERATOR_SHARE)

    def questions(start: int, stop: int | None) -> Iterator[Row]:
        """Return the questions of one set.

        In the published recipe, each belongs to one set and only if its rewards differ.
        """
        kept = (row for row in read_trajectories(args.input_file, NEEDS, output.ignore, Counter()) if worth_learning_from(row, args.keep_mean))
        return kept if args.recipe == "default" else itertools.islice(itertools.compress(kept, differing), start, stop)

    def generator(window: TrainingWindow) -> Iterator[tuple[dict, Mapping]]:
        return distinct(generator_rows(questions(0, for_generator), prompts, args, window, len(differing)))

    def reranker(window: TrainingWindow) -> Iterator[tuple[dict, Mapping]]:
        return distinct(reranker_rows(questions(for_generator, None), prompts, args, window, len(differing)))

    # Refuse an empty set before writing
    for name, pairs in (("reranker", reranker), ("generator", generator)):
        if next(pairs(window.again()), None) is None:
            raise UserError(
                f"{args.input_file}: no {name} pair from {len(differing)} of {count} questions, but DPO needs both "
                "kinds; sample at a higher --temperature or from more questions, or relax --min-margin and --keep-mean"
            )
    # Write both sets
    taught, lengths = Taught(), TargetLengths()

    def noted(pairs: Iterable[tuple[dict, dict]], role: str) -> Iterator[dict]:
        for row, about in pairs:
            lengths.add(role, about["group"], about["target size"])
            if role == "reranker":
                taught.add(about)
            yield row

    of_reranker = output.publish(args.reranker_file, noted(capped(reranker(window), args.max_reranker_pairs, args.seed), "reranker"))
    of_generator = output.publish(args.generator_file, noted(capped(generator(window), args.max_generator_pairs, args.seed), "generator"))
    # Say what they teach
    summary = taught.summary()
    say_what_they_teach(summary, lengths, window.unit)
    for path in (args.reranker_file, args.generator_file):
        check_columns(args.train_recipe, path)
    targets = {f"{role}_target_{window.unit}": lengths.of_role(role).length for role in ("reranker", "generator")}
    output.finish({**summary, "groups": lengths.summary()}, questions=count, kept=len(differing), reranker_pairs=of_reranker, generator_pairs=of_generator, **targets, **window.counts())


if __name__ == "__main__":
    stage.run(main)

"""Training rows with one output each from rewarded trajectories: the sets of best-of-n SFT and of KTO.

A stage says which trajectories of a question it trains on (Single). This module fits them into the trainer's window and
writes one set per role: the reranker's, whose output is a selection, and the generator's, whose output is an answer.
"""

import itertools
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.llm.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.llm.recipe import LengthOptions, check_columns, resolve_length_flags
from dynamicrag.llm.training_rows import Fitted, TrainingWindow, load_window
from dynamicrag.models.chat_templates import Messages
from dynamicrag.reward.preferences import worth_learning_from
from dynamicrag.reward.trajectories import read_trajectories, warn_of_defaults
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.output import Output
from dynamicrag.rows.row import Doc, Row
from dynamicrag.rows.seen import Seen
from dynamicrag.stage import UserError, log, options_from

ROLES = ("reranker", "generator")
QUESTIONS_PER_BLOCK = 256  # whose rows are interleaved


class Single(NamedTuple):
    """One training example of a question: the 1-based positions of a selection, the answer (of the generator), and further keys of
    the training row.
    """

    ids: Sequence[int]
    answer: str = ""
    more: Mapping[str, Any] = MappingProxyType({})


Singles = Callable[[Row, str], list[Single]]  # of a row and a role


def add_file_flags(parser: ArgumentParser, kind: str) -> None:
    """Add the input, the prompts, --roles, and the output files of a set called `kind`."""
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", default="training_data/llama3_8b_output_dpo.jsonl", help="rewarded trajectories")
    group.add_argument("--reranker_file", default=f"training_data/llama3_8b_reranker_{kind}.json", help="rows of the reranker")
    group.add_argument("--generator_file", default=f"training_data/llama3_8b_generator_{kind}.json", help="rows of the generator")
    group.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES), help="roles to write rows for; the file of another role is not written")
    add_prompts_flag(group)


def output_of(args: Namespace) -> Output:
    """Return the outputs of a run: the files of its roles. Fills the length flags from the recipe."""
    inputs = [args.input_file, *filter(None, [args.prompts]), *resolve_length_flags(args)]
    return Output(vars(args), list(files_of(args).values()), inputs)


def files_of(args: Namespace) -> dict[str, str]:
    """Return the output file of each role, in the order of ROLES."""
    return {role: getattr(args, f"{role}_file") for role in ROLES if role in args.roles}


def best_trajectory(row: Row) -> int:
    """Return the trajectory with the highest reward; of several, the one with the fewest documents, then the first."""
    scores, lists = row["response_scores"], row["id_lists"]
    return min(range(len(scores)), key=lambda trajectory: (-scores[trajectory], len(lists[trajectory]), trajectory))


def fitted(numbered: tuple[int, Row], role: str, singles: Singles, prompts: Prompts, window: TrainingWindow) -> list[Fitted]:
    """Return the training rows of a numbered question. A row whose selection names a removed document is left out."""
    number, row = numbered
    question, results = row["question"], []
    for single in singles(row, role):
        if role == "reranker":
            docs, target, least = row["docs"][: row["docs_shown"]], format_ids(single.ids, prompts.notation), max(single.ids, default=0)
            build: Callable[[Sequence[Doc]], Messages] = partial(prompts.reranker, question)
        else:
            docs, target, least = [row["docs"][position - 1] for position in single.ids], single.answer, 0
            build = partial(_answering, prompts, row, single.ids)
        shown = window.documents(build, docs, target)
        if shown is None or (len(shown) < len(docs) and (len(shown) < least or not shown)):
            results.append(Fitted(None))
            continue
        made = {**training_row(build(shown), output=target), **single.more}
        results.append(Fitted(made, len(docs) - len(shown), {"question": number, "target size": window.size(target)}))
    return results


def _answering(prompts: Prompts, row: Row, ids: Sequence[int], docs: Sequence[Doc]) -> Messages:
    return prompts.generator(row["question"], docs, prompts.instruction(row), ids[: len(docs)])


def distinct(rows: Iterable[Fitted]) -> Iterator[Fitted]:
    """Yield the first of several rows with one prompt and one output, because a data set may contain a question twice."""
    seen = Seen()
    for fit in rows:
        if fit.row is not None and seen.add("\x1f".join([fit.row["instruction"], fit.row["output"]])) is None:
            yield fit


def interleaved(rows: Iterable[Fitted], questions: int = QUESTIONS_PER_BLOCK) -> Iterator[Fitted]:
    """Yield the rows in another order: in each block of `questions` questions, the first row of every question, then the second ones.

    Rows of one question are consecutive in `rows`.
    """
    by_question = (list(group) for _, group in itertools.groupby(rows, key=lambda fit: fit.about["question"]))
    while block := list(itertools.islice(by_question, questions)):
        yield from filter(None, itertools.chain.from_iterable(itertools.zip_longest(*block)))


def make_single_rows(args: Namespace, needs: tuple[str, ...], singles: Singles, mixed: bool = False) -> None:
    """Make the sets of a stage from its rewarded trajectories. With `mixed`, rows of one question are not neighbours.

    Raises UserError, before anything is written, if a role has no row.
    """
    output = output_of(args)
    if output.finished:
        return
    window, defaults, questions = load_window(options_from(args, LengthOptions)), Counter(), Counter()

    # Read once for the counts and the malformed rows, then once per role
    def read(reject: Callable | None, defaults: Counter) -> Iterator[Row]:
        return (row for row in read_trajectories(args.input_file, needs, reject, defaults) if worth_learning_from(row, args.keep_mean))

    for row in read(output.reject, defaults):
        questions["kept"] += 1
        questions["differing"] += len(set(row["response_scores"])) > 1
    warn_of_defaults(defaults, args.input_file)
    counts, sizes = write_single_rows(args, output, lambda: read(output.ignore, Counter()), singles, window, mixed)
    output.finish(**questions, **say_rows(args, counts, sizes, window))


def write_single_rows(
    args: Namespace, output: Output, read: Callable[[], Iterable[Row]], singles: Singles, window: TrainingWindow, mixed: bool
) -> tuple[Counter, Counter]:
    """Write the file of each role. Returns the numbers of rows and the sizes of their targets, by role. Raises UserError like make_single_rows."""
    prompts = Prompts(args.prompts)

    def rows(role: str, window: TrainingWindow) -> Iterator[Fitted]:
        made = distinct(window.kept(enumerate(read()), partial(fitted, role=role, singles=singles, prompts=prompts, window=window), None, role, args.input_file))
        return interleaved(made) if mixed else made

    for role in files_of(args):
        if next(rows(role, window.again()), None) is None:
            raise UserError(f"{args.input_file}: no training row of the {role}; sample at a higher --temperature or from more questions, "
                            "or give --roles another role")
    counts, sizes = Counter(), Counter()  # of a role; and of a role with a kto_tag

    def noted(role: str) -> Iterator[dict]:
        for fit in rows(role, window):
            counts[role] += 1
            sizes[role] += int(fit.about["target size"])
            counts[role, (fit.row or {}).get("kto_tag")] += 1
            yield fit.row or {}

    for role, path in files_of(args).items():
        output.publish(path, noted(role))
        check_columns(args.train_recipe, path)
    return counts, sizes


def say_rows(args: Namespace, counts: Counter, sizes: Counter, window: TrainingWindow) -> dict[str, int]:
    """Log the rows of each role, and return the numbers for the manifest."""
    tags = (True, False) if any(counts[role, tag] for role in ROLES for tag in (True, False)) else ()
    lines, numbers = [], {}
    for role in files_of(args):
        by_tag = {("desirable" if tag else "undesirable"): counts[role, tag] for tag in tags}
        lines.append([role, f"{counts[role]:,}", *map(str, by_tag.values()), f"{sizes[role]:,}", f"{sizes[role] / counts[role]:.1f}"])
        numbers |= {f"{role}_rows": counts[role], **{f"{role}_{name}": count for name, count in by_tag.items()}, f"{role}_target_{window.unit}": sizes[role]}
    log.info("rows by role, with the length of their targets:\n%s",
             markdown_table(["", "rows", *(["desirable", "undesirable"] if tags else []), f"target {window.unit}", "per row"], lines))
    return numbers | window.counts()

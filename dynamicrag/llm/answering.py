"""Answer evaluation files: expand list flags into runs, and answer the rows of each run.

inference.py accepts several files and selectors, top_inference.py several files and numbers of documents. Each
combination is a run with its own output files. All runs share the models, which are loaded once.
"""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dynamicrag.llm.completion import Completion, Usage
from dynamicrag.llm.completion_cache import CompletionCache
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import Builders, RequestBuilder, asking, work_on_fitting
from dynamicrag.llm.templates import in_threads
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row, fail_unanswered, unanswered
from dynamicrag.rows.tasks import name_with_folder
from dynamicrag.stage import UserError

NEEDS = STAGE_KEYS["inference"].reads  # top_inference.py reads the same


@dataclass(frozen=True)
class AnswerRun:
    """One run: an input file and one value of the stage's list flag `choice`, with their own output files."""

    input_json: str
    output_json: str
    remain_output_json: str
    choice: str
    value: Any
    arguments: Mapping[str, Any]  # every flag of the stage by name, with the values of this run


Answer = Callable[[list[Row], Builders, AnswerRun], list[Row]]


def add_files_flags(group, input_json: str, output_json: str) -> None:
    """Add the input and output flags of a stage that answers evaluation files, with the given defaults."""
    group.add_argument("--input-json", "--input-jsonl",
                       nargs="+", default=[input_json], help="one or more files of questions")
    group.add_argument("--output-json", "--output-jsonl", default=output_json,
                       help="answered rows; {input} stands for the name of the input file")
    group.add_argument("--remain-output-json", help="rows without an answer (default: <output>_remain)")


def remain_path(output: str) -> str:
    """Return the default path for the rows that a run to `output` could not answer."""
    path = Path(output)
    return str(path.with_name(f"{path.stem}_remain{path.suffix}"))


def runs_of(args: Namespace, choice: str) -> list[AnswerRun]:
    """Return one run for each pair of an input file and a value of the list flag `choice`, with placeholders in paths replaced.

    Raises UserError if two runs would write the same file.
    """
    runs = []
    for input_json, value in itertools.product(args.input_json, getattr(args, choice)):
        named = {"{input}": Path(input_json).stem, f"{{{choice}}}": str(value).replace(":", "")}
        paths = {"output_json": args.output_json, "remain_output_json": args.remain_output_json or remain_path(args.output_json)}
        for flag, path in paths.items():
            for placeholder, name in named.items():
                path = path.replace(placeholder, name)
            paths[flag] = path
        files = {"input_json": input_json, **paths}
        runs.append(AnswerRun(**files, choice=choice, value=value, arguments={**vars(args), **files, choice: value}))
    for flag in ("output_json", "remain_output_json"):
        paths = [getattr(run, flag) for run in runs]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            inputs = dict.fromkeys(run.input_json for run in runs if getattr(run, flag) == twice)
            if len(inputs) > 1 and len({Path(path).stem for path in inputs}) == 1 and "{input}" in (getattr(args, flag) or args.output_json):
                raise UserError(
                    f"{' and '.join(inputs)}: have the same name, so that {{input}} gives {twice} for both; rename "
                    f"one and keep the data set in its name: {name_with_folder(list(inputs)[-1])}"
                )
            raise UserError(
                f"{twice}: would be written by {paths.count(twice)} runs; put {{input}} in --{flag.replace('_', '-')} for several "
                f"input files with different names, and {{{choice}}} for several values of --{choice}"
            )
    return runs


def place_of(builders: Builders) -> dict[str, str]:
    """Return device and dtype of the models for Output.record(); an empty dictionary for a server, where they are not known."""
    places = [place_of_engine() for builder in builders if (place_of_engine := getattr(builder.engine, "place", None))]
    return {key: ", ".join(dict.fromkeys(place[key] for place in places)) for key in ("device", "dtype")} if places else {}


def answer_from(rows: list[Row], chosen: Mapping[int, Sequence[Doc]], generator: RequestBuilder) -> dict[int, Completion]:
    """Return the answers by number of the question, each from its `chosen` documents, with the same numbers."""
    completions = generator.ask(in_threads(lambda number: generator.answer(rows[number], chosen[number]), chosen))
    return dict(zip(chosen, completions, strict=True))


def assemble_result(
    row: Row, about: Mapping[str, object], chosen: tuple[Sequence[int], Sequence[Doc]] | str, answer: Completion | None, usage: Usage
) -> Row:
    """Return the row with the keys `about`, then its answer or an `error`, then its cost.

    `chosen` holds the positions and the documents of the selection, or the reason why it cannot be read. `answer` is
    None if there was no selection to answer from. Its cost is added to `usage`.
    """
    result: dict[str, object] = {**unanswered(row), **about}
    if answer is not None:
        usage.add(answer)
    if isinstance(chosen, str) or answer is None:
        result["error"] = chosen
    elif reason := answer.reason("answer"):
        result["error"] = reason
    else:
        ids, docs = chosen
        result |= {"id_list": ids, "final_docs": [doc["id"] for doc in docs], "response": answer.texts[0]}
    return cast(Row, {**result, "usage": vars(usage)})


def _work_of(answer: Answer, builders: Builders, run: AnswerRun) -> Callable[[list[Row]], list[Row]]:
    """Return a function that answers the rows of a chunk; a row whose question exceeds the window gets an `error`."""
    return lambda rows: work_on_fitting(rows, builders, lambda fitting: answer(fitting, builders, run), fail_unanswered)


def answer_runs(
    runs: list[AnswerRun],
    calls: CallOptions,
    inputs: list[str],
    load: Callable[[list[AnswerRun]], Builders],
    answer: Answer,
) -> None:
    """Answer the files of every unfinished run. `load` gets these runs and is called only if there are any.

    `inputs` are the files that all runs read (engine_inputs). Every input is read completely before a model is loaded,
    so that a malformed row is reported at once.
    """
    outputs = [Output(run.arguments, [run.output_json, run.remain_output_json], [run.input_json, *inputs]) for run in runs]
    unfinished = [(run, output) for run, output in zip(runs, outputs, strict=True) if not output.finished]
    for output in outputs:
        if output.finished:
            CompletionCache(output.path).remove()  # left by an interruption just after the manifest was written
    if not unfinished:
        return
    skip = bool(outputs[0].reject)
    totals = {path: count_rows(path, NEEDS, skip) for path in dict.fromkeys(run.input_json for run, _ in unfinished)}
    builders = load([run for run, _ in unfinished])
    for run, output in unfinished:
        output.record(**place_of(builders))
        output.started = time.monotonic()  # excludes loading the models and earlier runs
        rows = read_rows(run.input_json, NEEDS, calls.dataset, output.reject)
        work = _work_of(answer, builders, run)
        with asking(builders, run.output_json, run.arguments["overwrite"]):
            output.process(rows, calls.chunk_size, work, totals[run.input_json], f"{Path(run.input_json).stem}, {run.choice} {run.value}")
            output.finish_answers()

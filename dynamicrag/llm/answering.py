"""Answer evaluation files: expand list flags into runs, and answer the rows of each run.

inference.py accepts several files and selectors, top_inference.py several files and numbers of documents. Each
combination is a run with its own output files. All runs share the models, which are loaded once.
"""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dynamicrag.llm.completion_cache import CompletionCache
from dynamicrag.llm.engine import engine_inputs
from dynamicrag.llm.requests import Caller, asking, work_on_fitting
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import Row, fail_unanswered
from dynamicrag.rows.tasks import name_with_folder
from dynamicrag.stage import UserError


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


def runs_of(args: Namespace, choice: str) -> list[Namespace]:
    """Return one run for each pair of an input file and a value of the list flag `choice`, with placeholders in paths
    replaced.

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
        runs.append(Namespace(**{**vars(args), **paths, "input_json": input_json, choice: value}))
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


def place_of(callers: tuple[Caller, Caller]) -> dict[str, str]:
    """Return device and dtype of the models for Output.record(); an empty dictionary for a server, where they are not
    known.
    """
    places = [caller.engine.place() for caller in callers if hasattr(caller.engine, "place")]
    return {key: ", ".join(dict.fromkeys(found[key] for found in places)) for key in ("device", "dtype")} if places else {}


def answer_runs(
    runs: list[Namespace],
    load: Callable[[list[Namespace]], tuple[Caller, Caller]],
    answer: Callable[[list[Row], tuple[Caller, Caller], Namespace], list[Row]],
    choice: str,
) -> None:
    """Answer the files of every unfinished run. `load` gets these runs and is called only if there are any.

    `choice` is the list flag given to runs_of; the progress bar shows its value and the input file. Every input is read
    completely before a model is loaded, so that a malformed row is reported at once.
    """
    outputs = [Output(run, [run.output_json, run.remain_output_json], [run.input_json, *engine_inputs(run)]) for run in runs]
    unfinished = [(run, out) for run, out in zip(runs, outputs, strict=True) if not out.finished]
    for out in outputs:
        if out.finished:
            CompletionCache(out.path).remove()  # left by an interruption just after the manifest was written
    if not unfinished:
        return
    skip = bool(outputs[0].reject)
    totals = {path: count_rows(path, ("docs",), skip) for path in dict.fromkeys(run.input_json for run, _ in unfinished)}
    callers = load([run for run, _ in unfinished])
    for run, out in unfinished:
        out.record(**place_of(callers))
        out.started = time.monotonic()  # excludes loading the models and earlier runs
        rows = read_rows(run.input_json, ("docs",), run.dataset, out.reject)
        work = partial(work_on_fitting, callers=callers, work=partial(answer, callers=callers, run=run), fail=fail_unanswered)
        with asking(callers, run.output_json, run.overwrite):
            out.process(rows, run.chunk_size, work, totals[run.input_json], f"{Path(run.input_json).stem}, {choice} {getattr(run, choice)}")
            out.finish_answers()

"""Evaluation files answered: the runs one command makes of its lists of flags, and how the rows of a run are answered.

inference.py takes several files and selectors, top_inference.py several files and numbers of documents. Each combination
is a run with files of its own, and all of them share the models, which are loaded once.
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
from dynamicrag.rows.records import Row, count_rows, fail_unanswered, read_rows
from dynamicrag.rows.tasks import name_with_folder
from dynamicrag.stage import UserError


def add_files_flags(group, input_json: str, output_json: str) -> None:
    """The input and output flags of a stage that answers evaluation files, with its defaults."""
    group.add_argument("--input-json", "--input-jsonl", nargs="+", default=[input_json], help="questions, one file or several")
    group.add_argument("--output-json", "--output-jsonl", default=output_json, help="answered rows; {input} is the input's name")
    group.add_argument("--remain-output-json", help="rows without an answer (default: <output>_remain)")


def remain_path(output: str) -> str:
    """Where the rows go that a run to `output` could not answer, unless a flag says otherwise."""
    path = Path(output)
    return str(path.with_name(f"{path.stem}_remain{path.suffix}"))


def runs_of(args: Namespace, choice: str) -> list[Namespace]:
    """One run for each input file and each value of the list flag `choice`; each value takes its place in the paths.

    Raises UserError where two runs would write the same file.
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
                    f"{' and '.join(inputs)}: are called the same, so {{input}} gives both the output {twice}; rename one so that its name "
                    f"keeps the data set: {name_with_folder(list(inputs)[-1])}"
                )
            raise UserError(
                f"{twice}: would be written by {paths.count(twice)} runs; put {{input}} in --{flag.replace('_', '-')} for several "
                f"input files, of different names, and {{{choice}}} for several values of --{choice}"
            )
    return runs


def place_of(callers: tuple[Caller, Caller]) -> dict[str, str]:
    """Device and dtype of the models, for Output.record(); nothing for a server, which does not say."""
    places = [caller.engine.place() for caller in callers if hasattr(caller.engine, "place")]
    return {key: ", ".join(dict.fromkeys(found[key] for found in places)) for key in ("device", "dtype")} if places else {}


def answer_runs(
    runs: list[Namespace],
    load: Callable[[list[Namespace]], tuple[Caller, Caller]],
    answer: Callable[[list[Row], tuple[Caller, Caller], Namespace], list[Row]],
    choice: str,
) -> None:
    """Answer the files of every run that is not finished. `load` gets those, and is not called where there is none.

    `choice` is what runs_of made the runs by; with it and the input file the progress of a run is titled.

    Every input is read to its end before a model is loaded: a malformed row is found at once, not after hours.
    """
    outputs = [Output(run, [run.output_json, run.remain_output_json], [run.input_json, *engine_inputs(run)]) for run in runs]
    unfinished = [(run, out) for run, out in zip(runs, outputs, strict=True) if not out.finished]
    for out in outputs:
        if out.finished:
            CompletionCache(out.path).remove()  # left by an interruption right after the manifest
    if not unfinished:
        return
    skip = bool(outputs[0].reject)
    totals = {path: count_rows(path, ("docs",), skip) for path in dict.fromkeys(run.input_json for run, _ in unfinished)}
    callers = load([run for run, _ in unfinished])
    for run, out in unfinished:
        out.record(**place_of(callers))
        out.started = time.monotonic()  # its own time, without that of loading the models and of the runs before
        rows = read_rows(run.input_json, ("docs",), run.dataset, out.reject)
        work = partial(work_on_fitting, callers=callers, work=partial(answer, callers=callers, run=run), fail=fail_unanswered)
        with asking(callers, run.output_json, run.overwrite):
            out.process(rows, run.chunk_size, work, totals[run.input_json], f"{Path(run.input_json).stem}, {choice} {getattr(run, choice)}")
            out.finish_answers()

"""A stage run in this process as its script would run, on good files of every kind."""

import contextlib
import functools
import importlib
import io
import json
import re
import signal
from pathlib import Path

import pytest
from conftest import write_jsonl
from stages import STAGES, row
from stubs import ShortWindow, StubEngine, select_and_answer
from tqdm import tqdm

from dynamicrag import stage
from dynamicrag.llm import requests
from dynamicrag.models.chat_templates import read_template

SECONDS = 20  # no bad file keeps a stage busy for longer


def make_good(folder: Path, encoder: Path) -> Path:
    """Good files of every kind, in `folder`."""
    write_jsonl(folder / "rows_0.jsonl", [row(n) for n in range(1, 6)])
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(f"p{n}\triver number {n}\tTitle {n}\n" for n in range(1, 9)))
    (folder / "reranker.run").write_text("".join(f"q{n} Q0 p{d} {d} {1 / d} run\n" for n in range(1, 6) for d in range(1, 5)))
    (folder / "chat.jinja").write_text("{% for turn in messages %}{{ turn['content'] }}{% endfor %}")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    (folder / "encoder").symlink_to(encoder)
    return folder


def good_input(name: str, good: Path) -> Path:
    """The good file that a stage reads: the corpus if it reads no rows."""
    return good / ("corpus.tsv" if STAGES[name].input == "--passages" else "rows_0.jsonl")


def retriever_manifest(rows: Path, **changes) -> None:
    """Write the manifest that retriever.py writes beside its output. aggregate.py refuses a shard without one."""
    made = {"stage": "retriever", "arguments": {"n_docs": 4, "corpus_shard": "0/1"}, "inputs": {}, "outputs": [str(rows)], "counts": {"rows": 5}}
    Path(f"{rows}.manifest.json").write_text(json.dumps({**made, **changes}))


def run(name: str, flags: list[str], monkeypatch, engine: StubEngine | None = None) -> tuple[int, list[str]]:
    """Exit status and lines on stderr of a stage in this process, with a stub for the LLM and without progress bars."""
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))
    monkeypatch.setattr("tqdm.contrib.logging.logging_redirect_tqdm", contextlib.nullcontext)  # pytest captures the log
    monkeypatch.setattr(requests, "load_engine", lambda args: (read_template(args.template), engine or ShortWindow(select_and_answer))[1])
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flags])
    module = importlib.import_module(name)

    def too_long(*_) -> None:
        raise AssertionError(f"{name} is still busy after {SECONDS} s")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    said, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            stage.run(lambda: module.main(flags))
    except SystemExit as error:
        status = error.code
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return status, said.getvalue().splitlines()


def assert_refused(status: int, said: list[str], says: str, out: Path) -> None:
    """The stage wrote one line, which matches `says`, and no file that looks like a finished output."""
    assert status == 2, said
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert re.search(says, said[0]), said[0]
    assert len(said[0]) < 1500 and said[0].isprintable(), said[0]
    assert [path for path in out.rglob("*.manifest.json") if not path.name.endswith(".partial.manifest.json")] == []


def refused(name: str, path: str, *flags: str) -> str:
    """The message with which a stage refuses a file. If the stage needs a model, the model's folder does not exist."""
    model = STAGES[name].model
    with pytest.raises(stage.UserError) as error:
        importlib.import_module(name).main([STAGES[name].input, path, *([model, "missing/model"] if model else []), *flags])
    return str(error.value)

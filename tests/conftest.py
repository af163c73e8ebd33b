"""Fixtures of all tests, and patterns with which they check messages."""

import csv
import functools
import gc
import json
import os
import random
import re
import signal
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machines import machine  # noqa: F401  (a fixture)
from stubs import (  # noqa: F401  (other code imports some of these from here)
    CHATML_TOKENS,
    StubEngine,
    _bert_config,
    _bert_tokenizer,
    make_text,
    make_tiny_cross_encoder,
    make_tiny_encoder,
    make_tiny_llama,
    make_tiny_monot5,
    question,
)
from warm import Warm

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell; the programs that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Each worker and its processes get cores of their own: threads of two processes that share cores wait for each other.
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])


def pytest_collection_modifyitems(config, items):
    """Run the files with slow tests first, so that the processes of a parallel run end at about the same time. Tests of FULL=1 need it."""
    if not os.environ.get("FULL"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _lookaheads(values: tuple[object, ...]) -> str:
    """One lookahead per value. A value counts as a whole word; a number does not count within another number or a quoted text."""
    found = []
    for value in values:
        near = r"\w'\"" if isinstance(value, int | float) else r"\w"
        found.append(rf"(?=.*(?<![{near}])(?<!\d[.,]){re.escape(str(value))}(?![{near}]|[.,]\d))")
    return "".join(found)


def naming(*values: object) -> str:
    """A pattern of any message that names each value (key, number, file, flag)."""
    return f"(?s)^{_lookaheads(values)}"


def at(place: str | Path, *values: object) -> str:
    """A pattern of any message that begins with its place and then names each value. A place is a flag, or a file with its line, row or key."""
    return rf"(?s)^(?:error: )?(?:\S*/)?{re.escape(str(place))}: {_lookaheads(values)}"


def names(text: str, *values: object) -> bool:
    """Whether a text names each value."""
    return re.search(naming(*values), text) is not None


def logged(caplog, *values: object, level: str = "WARNING") -> int:
    """How many records of the level name each value."""
    return sum(record.levelname == level and names(record.getMessage(), *values) for record in caplog.records)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """With one thread the tests of a parallel run do not slow each other down, and sums do not depend on the number of cores."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is imported by now stays: the garbage collector need not look at a million objects again and again


@pytest.fixture(scope="session")
def warm():
    """Processes that start with their heavy modules imported (tests/warm.py)."""
    with Warm() as servers:
        yield servers


@pytest.fixture(scope="session", autouse=True)
def one_ssl_context():
    """All clients share one SSL context: to read the certificates again takes longer than most tests last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def encoding_in_this_process():
    """The retriever encodes in this process: a new one takes longer to start than most tests last. test_kill.py starts the new process."""
    import retriever

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever, "process_of_its_own", lambda: ThreadPoolExecutor(1))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch) -> list[StubEngine]:
    """The working folder has a model, a template and the three questions of q.jsonl. Returns the engines that are loaded."""
    from dynamicrag.llm import requests

    monkeypatch.chdir(tmp_path)
    Path("t.jinja").write_text("x")
    Path("DynamicRAG_llama3_8b").mkdir()
    Path("DynamicRAG_llama3_8b/config.json").write_text("{}")
    write_jsonl(Path("q.jsonl"), [question(n) for n in (1, 2, 3)])
    loaded = []

    def load_engine(args):
        loaded.append(StubEngine(lambda request, kind, titles: (
            "an answer" if kind == "answer" else "Yes" if kind == "judge"
            else "prose" if "is 2?" in request.messages[1]["content"] else "[1]"
        )))
        loaded[-1].model = args.llm_model
        loaded[-1].memory = args.gpu_memory_utilization
        return loaded[-1]

    monkeypatch.setattr(requests, "load_engine", load_engine)
    return loaded


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory) -> Path:
    """A BERT of width 32."""
    folder = tmp_path_factory.mktemp("encoder")
    make_tiny_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def cross_encoder_dirs(tmp_path_factory) -> dict[int, Path]:
    """BERT classifiers with one label and with two."""
    folders = {labels: tmp_path_factory.mktemp(f"cross_encoder_{labels}") for labels in (1, 2)}
    for labels, folder in folders.items():
        make_tiny_cross_encoder(folder, labels)
    return folders


@pytest.fixture(scope="session")
def monot5_dir(tmp_path_factory) -> Path:
    """A T5 of width 32."""
    folder = tmp_path_factory.mktemp("monot5")
    make_tiny_monot5(folder)
    return folder


@pytest.fixture(scope="session")
def corpus() -> list[dict]:
    """120 passages, two of which have the same text."""
    rng = random.Random(7)
    passages = [{"id": f"p{number}", "title": f"Title {number % 9}", "text": make_text(rng)} for number in range(120)]
    passages[40]["text"], passages[40]["title"] = passages[3]["text"], passages[3]["title"]
    return passages


@pytest.fixture(scope="session")
def corpus_tsv(tmp_path_factory, corpus) -> Path:
    """The corpus in the format of DPR."""
    path = tmp_path_factory.mktemp("corpus") / "passages.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "text", "title"])
        writer.writerows([passage["id"], passage["text"], passage["title"]] for passage in corpus)
    return path


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory, encoder_dir, corpus_tsv) -> Path:
    """The vectors of the corpus, in two shards."""
    import generate_passage_embeddings

    folder = tmp_path_factory.mktemp("shards")
    for shard in (0, 1):
        generate_passage_embeddings.main([
            "--model_name_or_path", str(encoder_dir), "--passages", str(corpus_tsv), "--output_dir", str(folder),
            "--shard_id", str(shard), "--num_shards", "2", "--dtype", "float32", "--device", "cpu",
        ])
    return folder

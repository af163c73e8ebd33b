"""What the tests of hostile input share: good files of every stage, and a stage run as its script would be."""

import contextlib
import functools
import importlib
import io
import json
import re
import signal
from pathlib import Path

from conftest import write_jsonl
from test_inference import StubEngine
from tqdm import tqdm

from dynamicrag import stage
from dynamicrag.llm import requests
from dynamicrag.models.chat_templates import read_template

SECONDS = 20  # no bad file keeps a stage busy for longer
DOCS = [
    {
        "id": f"p{n}", "title": f"Title {n}", "text": f"river number {n}", "score": 9.0 - n,
        "rerank_score": 0.9 if n < 3 else 0.1, "rerank_label": "true" if n < 3 else "false",
    }
    for n in range(1, 5)
]


def row(number: int = 1, **changes) -> dict:
    """A row with everything any stage asks for; a change of None takes the key away. The labels are of as many documents as there are."""
    count = len(changes["docs"]) if isinstance(changes.get("docs"), list) else len(DOCS)
    whole = {
        "id": f"q{number}", "question": f"which river is number {number}?", "answers": ["oil"], "docs": [dict(doc) for doc in DOCS],
        "true_id": [1, 2][:count], "false_id": list(range(3, count + 1)), "true_count": min(count, 2), "sequence": [2, 1], "sequence_length": 2, "docs_shown": 4,
        "id_lists": [[1], [2, 3]], "responses": ["oil", "gas"], "response_tokens": [1, 1], "from_expert": [False, False],
        "response_scores": [0.9, 0.1], "score_terms": [{"em": 1.0, "rouge": 1.0, "length": 0.5}, {"em": 0.0, "rouge": 0.0, "length": 0.3}],
        "id_list": [1], "final_docs": ["p1"], "response": "oil", "usage": {"calls": 2, "prompt_tokens": 10, "generated_tokens": 2},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


# Flags of each stage: {rows} is the file under test, {good} the folder of good files, {out} that of the outputs.
LLM = "--template {good}/chat.jinja --llm-model {good}/model"
STAGES = {
    "split_data": "--input_file {rows} --output_dir {out}/splits --num_splits 2",
    "retriever": "--query {rows} --passages {good}/corpus.tsv --passage_store {good}/store --index bm25 --output_file {out}/retrieved.jsonl",
    "aggregate": "--input_files {rows} --output_file {out}/all.jsonl --splits_dir {out}/none",
    "reranker": "--input_file {rows} --run {good}/reranker.run --output_file {out}/reranked.jsonl",
    "process_training_data": "--input_file {rows} --sequence_file {out}/sequence.jsonl --normal_file {out}/normal.jsonl",
    "reranker_sequence": "--input_file {rows} --output_file {out}/bc.json",
    "split_for_sft_dpo": "--input_file {rows} --sft_file {out}/sft.jsonl --dpo_file {out}/dpo.jsonl",
    "construct_generator_sft": "--input_file {rows} --output_file {out}/generator.json",
    "sampling_dpo_trajectories": f"{LLM} --input-json {{rows}} --output-json {{out}}/sampled.json --num-samples 2",
    "reward_trajectories": "--input_file {rows} --output_file {out}/rewarded.jsonl --weights em=.5,rouge=.5",
    "construct_dpo": "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json",
    "inference": f"{LLM} --input-json {{rows}} --output-json {{out}}/answered.json --constrain-ids off",
    "top_inference": f"{LLM} --input-json {{rows}} --output-json {{out}}/windows.jsonl --max-context-window 3",
    "evaluate": "--results_file {rows} --output_file {out}/metrics.json",
    "evaluate_retrieval": "--results_file {rows} --output_file {out}/retrieval.json",
}
ROW_STAGES = tuple(STAGES)
STAGES["generate_passage_embeddings"] = "--passages {rows} --passage_store {out}/store --output_dir {out}/embeddings --device cpu --model_name_or_path {good}/encoder"


def answer(request, kind: str, titles: list[str]) -> str:
    return {"select": "[2], [1]" if len(titles) > 1 else "[1]" if titles else "None", "judge": "Yes"}.get(kind, "an answer")


class ShortWindow(StubEngine):
    """A window of 200,000 characters."""

    def fits(self, messages, max_tokens: int) -> bool:
        return sum(len(message["content"]) for message in messages) < 200_000


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


def retriever_manifest(rows: Path, **changes) -> None:
    """What retriever.py writes beside its output: aggregate.py takes no shard without."""
    made = {"stage": "retriever", "arguments": {"n_docs": 4, "corpus_shard": "0/1"}, "inputs": {}, "outputs": [str(rows)], "counts": {"rows": 5}}
    Path(f"{rows}.manifest.json").write_text(json.dumps({**made, **changes}))


def run(name: str, flags: list[str], monkeypatch, engine: StubEngine | None = None) -> tuple[int, list[str]]:
    """Exit status and lines on stderr of a stage in this process, with a stub for the LLM and without progress bars."""
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))
    monkeypatch.setattr("tqdm.contrib.logging.logging_redirect_tqdm", contextlib.nullcontext)  # what is logged, pytest has
    monkeypatch.setattr(requests, "load_engine", lambda args: (read_template(args.template), engine or ShortWindow(answer))[1])
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


def flags_of(name: str, good: Path, out: Path, rows: Path, more: str = "") -> list[str]:
    return [part.format(good=good, out=out, rows=rows) for part in f"{STAGES[name]} {more}".split()]


def assert_refused(status: int, said: list[str], says: str, out: Path) -> None:
    """One line that says so, and nothing that looks like a finished output."""
    assert status == 2, said
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert re.search(says, said[0]), said[0]
    assert len(said[0]) < 1500 and said[0].isprintable(), said[0]
    assert [path for path in out.rglob("*.manifest.json") if not path.name.endswith(".partial.manifest.json")] == []

"""A kill -9 in the middle of the long stages: what a second start completes is what an undisturbed run writes, byte for byte."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_text, write_jsonl

REPO = Path(__file__).parents[2]


def killed_in_the_middle(script, flags, partial, least):
    """Run a stage in a process of its own, and kill it once its partial file has more than `least` bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as the undisturbed run in this process has
    process = subprocess.Popen([sys.executable, f"{script}.py", *map(str, flags)], cwd=REPO, env=environment, stderr=subprocess.PIPE)
    while not (partial.exists() and partial.stat().st_size > least):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


def complete_after_a_kill(tmp_path, script, flags, output_flag, name, least=0):
    """The files of an undisturbed run and those of one that was killed and started again."""
    stage = importlib.import_module(script)
    flags = [*flags, "--dtype", "float32", "--device", "cpu"]
    undisturbed, disturbed = tmp_path / "undisturbed" / name, tmp_path / "disturbed" / name
    of = (lambda path: path.parent) if output_flag == "--output_dir" else (lambda path: path)
    stage.main([*map(str, flags), output_flag, str(of(undisturbed))])
    partial = Path(f"{disturbed}.partial")
    killed_in_the_middle(script, [*flags, output_flag, of(disturbed)], partial, least)
    assert 0 < partial.stat().st_size < undisturbed.stat().st_size and not disturbed.exists()
    kept = partial.stat().st_size
    stage.main([*map(str, flags), output_flag, str(of(disturbed))])
    assert not partial.exists() and kept > least
    for path in undisturbed.parent.iterdir():
        if not path.name.endswith(".manifest.json"):
            assert (disturbed.parent / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_embedding(tmp_path, encoder_dir):
    passages = write_jsonl(tmp_path / "passages.jsonl", [{"id": n, "text": make_text(random.Random(n))} for n in range(12_000)])
    flags = ["--model_name_or_path", encoder_dir, "--passages", passages]
    complete_after_a_kill(tmp_path, "generate_passage_embeddings", flags, "--output_dir", "passages_00.npy", least=2048 * 64 + 1000)


@pytest.mark.slow
def test_retrieval(tmp_path, encoder_dir, corpus_tsv, shards_dir):
    query = write_jsonl(tmp_path / "q.jsonl", [{"id": f"q{n}", "question": make_text(random.Random(n), 3, 9)} for n in range(4000)])
    flags = ["--model_name_or_path", encoder_dir, "--passages", corpus_tsv, "--passages_embeddings", f"{shards_dir}/*",
             "--query", query, "--n_docs", 20, "--questions_per_pass", 100]
    complete_after_a_kill(tmp_path, "retriever", flags, "--output_file", "retrieved.jsonl")


@pytest.mark.slow
def test_reranking(tmp_path, monot5_dir):
    rows = [{"id": f"q{n}", "question": make_text(random.Random(n), 3, 9), "docs": [
        {"id": f"d{doc}", "title": "", "text": make_text(random.Random(10 * n + doc))} for doc in range(5)
    ]} for n in range(1500)]
    flags = ["--model_name_or_path", monot5_dir, "--input_file", write_jsonl(tmp_path / "in.jsonl", rows)]
    complete_after_a_kill(tmp_path, "reranker", flags, "--output_file", "reranked.jsonl")

"""The stages between the models on many small rows: no memory grows with the rows, apart from some bytes per row."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import REPO

from dynamicrag.evaluation.means import Mean
from dynamicrag.reward.moments import Moments
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.seen import Seen
from dynamicrag.rows.stored import Stored
from dynamicrag.stage import shuffled

FEW, MANY = 4000, 14_000
STAGES = {
    "split_data": "--input_file {rows} --output_dir {out} --num_splits 2",
    "aggregate": "--input_files {rows} --splits_dir none --output_file {out}/all.jsonl",
    "evaluate_retrieval": "--results_file {rows} --output_file {out}/retrieval.json",
    "process_training_data": "--input_file {rows} --sequence_file {out}/sequence.jsonl --normal_file {out}/normal.jsonl --targets padded",
    "split_for_sft_dpo": "--input_file {rows} --sft_file {out}/sft.jsonl --dpo_file {out}/dpo.jsonl",
    "reranker_sequence": "--input_file {rows} --output_file {out}/reranker_bc_training.json --tokenizer none",
    "construct_generator_sft": "--input_file {rows} --output_file {out}/generator_sft_training.json --tokenizer none",
    "reward_trajectories": "--input_file {rows} --output_file {out}/rewarded.jsonl --weights em=.5,rouge=.5 --chunk_size 100",
    "construct_dpo": "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json --tokenizer none",
    "construct_best_of_n": "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json --tokenizer none",
    "construct_kto": "--input_file {rows} --reranker_file {out}/reranker.json --generator_file {out}/generator.json --tokenizer none",
    "evaluate": "--results_file {rows} --eval_file {rows} --metric match --output_file {out}/metrics.json",
}
# Each stage runs in a fork of one process that has imported them all. VmHWM is the peak of the fork alone.
PROGRAM = """
import importlib, json, os, sys
import dynamicrag.evaluation.metrics, ir_measures, numpy, rouge_score.rouge_scorer, tqdm
runs = json.loads(sys.argv[1])
stages = {name: importlib.import_module(name) for name, _, _ in runs}
for name, size, flags in runs:
    sys.stdout.flush()
    if os.fork() == 0:
        told = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        stages[name].main(flags.split())
        peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
        os.write(told, f"{name} {size} {peak}\\n".encode())
        os._exit(0)
    os.wait()
"""


def write_rows(path: Path, count: int) -> None:
    """Write rows with the keys of every stage, and the manifest of a finished output."""
    docs = [{"title": "", "text": f"gold {n}", "score": 1 - n / 9, "rerank_score": 1 - n / 3, "rerank_label": str(n == 0).lower()} for n in range(3)]
    terms = [{"em": 1.0, "rouge": 1.0, "length": 0.5}, {"em": 0.0, "rouge": 0.0, "length": 0.25}]
    with path.open("wb") as file:
        for number in range(count):
            row = {
                "id": f"question-{number}", "question": "which?", "dataset": "nq", "answers": ["gold"], "gold_docs": [f"{number}-1"],
                "docs": [{"id": f"{number}-{n}", **doc} for n, doc in enumerate(docs)], "true_id": [1], "false_id": [2, 3], "true_count": 1,
                "sequence": [1], "sequence_length": 1, "docs_shown": 3, "id_lists": [[1], [1, 2]], "responses": ["gold", "wrong"],
                "response_scores": [0.9, 0.1], "score_terms": terms, "id_list": [1], "final_docs": [f"{number}-0"], "response": "gold",
                "usage": {"calls": 2, "prompt_tokens": number, "generated_tokens": 7},
            }
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    Path(f"{path}.manifest.json").write_text(json.dumps({"arguments": {}, "inputs": {}, "outputs": [str(path)], "counts": {"rows": count}}))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_no_stage_needs_more_memory_for_more_rows(tmp_path, monkeypatch):
    """10,000 more rows may need 200 bytes each, which is less than their ids need in a dictionary."""
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    for count in (FEW, MANY):
        Path(f"{count}").mkdir()
        write_rows(Path(f"{count}/rows_0.jsonl"), count)
    runs = [(name, count, flags.format(rows=f"{count}/rows_0.jsonl", out=f"out_{name}_{count}")) for name, flags in STAGES.items() for count in (FEW, MANY)]
    for name, count, _ in runs:
        Path(f"out_{name}_{count}").mkdir()
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(runs)], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    peaks = {(name, int(count)): int(kilobytes) for name, count, kilobytes in map(str.split, done.stdout.splitlines())}
    assert peaks.keys() == {(name, count) for name, count, _ in runs}, done.stderr[-2000:]
    grown = {name: peaks[name, MANY] - peaks[name, FEW] for name in STAGES}
    assert max(grown.values()) < 2000, grown


def test_ids_take_few_bytes_however_long_they_are():
    tracemalloc.start()
    seen = Seen()
    for number in range(20_000):
        assert seen.add(f"{number:0200d}", number) is None
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 40 * 20_000
    assert len(seen) == 20_000
    assert [seen.add(f"{number:0200d}") for number in range(20_000)] == [*range(20_000)]
    assert (seen.find(f"{7:0200d}"), seen.find("7"), len(seen)) == (7, None, 20_000)


def test_a_reader_keeps_only_some_bytes_of_an_id():
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.writelines(b'{"id": "%0200d", "question": "which?"}\n' % number for number in range(5000))
        file.flush()
        rows = read_rows(file.name)
        tracemalloc.start()
        for count, _ in enumerate(rows, start=1):
            if count == 1000:
                before = tracemalloc.get_traced_memory()[0]
            if count == 5000:
                break
        kept = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert kept < 40 * 4000


def test_values_on_disk_are_those_that_were_added():
    stored = Stored(dict)
    added = {f"q{number}": {"answers": ["é" * number], "gold_docs": [number]} for number in range(50)}
    for key, value in added.items():
        stored.add(key, value)
    assert dict(stored) == added and len(stored) == 50 and "q50" not in stored
    assert stored.get("q50") is None and stored.view(lambda value: value["gold_docs"])["q49"] == [49]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1) | st.integers(0, 9) | st.floats(-1e9, 1e9), min_size=1))
def test_a_mean_is_rounded_once(values):
    mean = Mean()
    for value in values:
        mean.add(value)
    assert mean.value() == statistics.fmean(values)
    assert Mean().value() is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=2), st.integers(1, 5))
def test_moments_do_not_depend_on_the_blocks(rows, size):
    table, moments = np.array(rows), Moments(3)
    for start in range(0, len(table), size):
        moments.add(table[start : start + size])
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, table.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.products / len(rows), np.cov(table.T, bias=True), atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), st.integers())
def test_a_random_order_is_that_of_a_sample(count, seed):
    assert list(shuffled(count, random.Random(seed))) == random.Random(seed).sample(range(count), count)

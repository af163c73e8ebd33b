"""The whole chain, on made-up data and tiny models, writes what tests/frozen.json has recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import freeze
import pytest
from stages import REPO, STAGES


@pytest.mark.slow
def test_every_stage_writes_what_is_recorded():
    """If a change is meant to change an output: python tests/freeze.py --record tests/frozen.json."""
    command = [sys.executable, "tests/freeze.py", "--compare", "tests/frozen.json"]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"


def test_every_stage_script_is_run():
    run = {command.split()[0] for command in freeze.COMMANDS.values()}
    assert run == {f"{name}.py" for name in STAGES}


@pytest.mark.parametrize(
    ("changed", "differ"),
    [
        ({}, []), ({"a": "2"}, ["a"]), ({"a": None}, ["a"]), ({"c": "1"}, ["c"]), ({"b": {"sha256": "2", "numbers": [0.1, 0.2]}}, ["b"]),
        ({"b": {"sha256": "1", "numbers": [0.1, 0.2004]}}, []), ({"b": {"sha256": "1", "numbers": [0.1, 0.2006]}}, ["b"]),
        ({"b": {"sha256": "1", "numbers": [0.1]}}, ["b"]), ({"b": "1"}, ["b"]),
    ],
)
def test_files_that_differ_are_named(changed, differ):
    recorded = {"a": "1", "b": {"sha256": "1", "numbers": [0.1, 0.2]}}
    found = {path: content for path, content in {**recorded, **changed}.items() if content is not None}
    assert [line.split(":")[0] for line in freeze.differing(recorded, found)] == differ


@pytest.mark.parametrize(
    ("row", "hash_changes", "numbers"),
    [
        ({"id": 1, "docs": [{"id": "p", "score": 0.5}], "error": "words"}, False, [0.5]),
        ({"id": 1, "docs": [{"id": "q", "score": 0.25}], "error": "words"}, True, [0.25]),
        ({"id": 1, "docs": [{"id": "p", "score": 0.7}], "error": "other words"}, False, [0.7]),
        ({"id": 1, "docs": [{"id": "p", "score": 0.25}]}, True, [0.25]),
    ],
)
def test_words_of_errors_and_numbers_of_models_are_not_in_the_hash(tmp_path, monkeypatch, row, hash_changes, numbers):
    monkeypatch.chdir(tmp_path)
    path = Path("output/bm25.jsonl")
    path.parent.mkdir()
    frozen = []
    for content in ({"id": 1, "docs": [{"id": "p", "score": 0.25}], "error": "words"}, row):
        path.write_text(json.dumps(content))
        frozen.append(freeze.freeze(path))
    assert (frozen[0]["sha256"] != frozen[1]["sha256"]) is hash_changes and frozen[1]["numbers"] == numbers

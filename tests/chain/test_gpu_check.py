"""The check of a machine with a GPU: a wrong result fails its part, nothing ends the others, and a dry run works on a CPU."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import at, naming

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_check import __main__ as runner  # noqa: E402
from gpu_check.part import Run, Skipped, execute  # noqa: E402


def check(output, *flags):
    done = subprocess.run(["bash", "scripts/gpu_check.sh", "--output", str(output), *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable})
    results = Path(output) / "gpu_check.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return done, {record["name"]: record for record in records}


# ---------------------------------------------------------------- a part


def test_one_wrong_case_fails_the_part_and_the_next_case_runs(tmp_path):
    def part(run):
        run.case("wrong", lambda: 1 / 0)
        run.case("absent", skip)
        run.case("right", lambda: {"figure": 3})

    def skip():
        raise Skipped("no such package")

    record = execute(part, Run(tmp_path, dry=True, notes=tmp_path / "notes"))
    assert record["status"] == "failed" and "ZeroDivisionError" in record["failures"][0]
    assert record["figures"] == {"right": {"figure": 3}} and record["skipped_cases"] == {"absent": "no such package"}
    kept = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert [next(iter(entry)) for entry in kept] == ["failures", "skipped", "figures"], "kept at once, should the part be ended"


def test_a_part_whose_cases_cannot_run_is_skipped(tmp_path):
    def part(run):
        run.case("late", lambda: {"figure": 3})

    record = execute(part, Run(tmp_path, dry=True, until=time.monotonic()))
    assert (record["status"], record["figures"]) == ("skipped", {}) and record["reason"]


# ---------------------------------------------------------------- what a part finds


@pytest.fixture(scope="module")
def small_search():
    """Vectors and questions of a moment's work."""
    from gpu_check import data

    vectors = data.passage_vectors(3000, 24, "cpu")
    return vectors, data.questions_about(vectors, 8)


def test_brute_force_agrees_with_the_index_and_not_with_a_wrong_one(small_search, monkeypatch):
    from gpu_check.search import check_exact

    from dynamicrag.search import candidates

    vectors, questions = small_search
    assert check_exact(vectors, questions, "cpu", (1, 50), cuts=(70,))["compared"] == 8 * 51
    right, consider = candidates.inner_products, candidates.Candidates.consider
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=at("k 50", 8 * 50)):
        patch.setattr(candidates, "inner_products", lambda *given: right(*given) * (1 + 2.0**-22))
        check_exact(vectors, questions, "cpu", (50,))
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=at("k 50", 8 * 50)):
        patch.setattr(candidates.Candidates, "consider", lambda self, rough, *given: consider(self, -rough, *given))
        check_exact(vectors, questions, "cpu", (50,))


def test_equal_scores_in_another_order_are_wrong(monkeypatch):
    import torch
    from gpu_check import data
    from gpu_check.search import check_exact

    from dynamicrag.search import exact

    vectors = data.passage_vectors(400, 24, "cpu").repeat(3, 1)
    questions = data.questions_about(vectors, 4)
    check_exact(vectors, questions, "cpu", (50,))
    search = exact.ExactIndex.search

    def twice(self, *given):
        scores, positions = search(self, *given)
        positions[:, 1] = positions[:, 0]
        return scores, positions

    monkeypatch.setattr(exact.ExactIndex, "search", twice)
    with pytest.raises(AssertionError, match=at("k 50")):
        check_exact(vectors, questions, "cpu", (50,))
    assert torch.equal(vectors[:400], vectors[400:800])


def test_a_wrong_reranker_fails(tmp_path, monkeypatch):
    from gpu_check import encoders

    from dynamicrag.models.monot5 import MonoT5

    pairs = [(f"what {number}?", text) for number, text in enumerate(encoders.data.texts(6, 12))]
    run = Run(tmp_path, dry=True)
    assert encoders._monot5(run, pairs, True, False, {}, "cpu")
    first = MonoT5._first_token
    monkeypatch.setattr(MonoT5, "_first_token", lambda self, hidden, mask: first(self, hidden, mask) * 1.01)
    with pytest.raises(AssertionError, match="float32, own forward"):
        encoders._monot5(run, pairs, True, False, {}, "cpu")


def test_a_loss_that_rises_fails(tmp_path):
    from gpu_check.training import _trained

    (tmp_path / "trained_on.sha256").touch()
    losses = [{"loss": float(value)} for value in (1, 2, 3, 4)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": losses}))
    with pytest.raises(AssertionError, match=naming([1.0, 2.0, 3.0, 4.0])):
        _trained(tmp_path, tmp_path, 4)


# ---------------------------------------------------------------- the runner


def test_without_time_every_part_is_skipped_by_name(tmp_path):
    done, records = check(tmp_path / "out", "--dry", "--minutes", "0.1")
    assert done.returncode == 0 and list(records) == list(runner.PARTS)
    assert {(record["status"], bool(record["reason"])) for record in records.values()} == {("skipped", True)}
    assert all(name in (tmp_path / "out/gpu_check.md").read_text() for name in runner.PARTS)


def test_a_part_that_takes_too_long_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    """It fails; the next one runs."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'benchmarks'}")
    with (tmp_path / "log").open("w") as log:
        record = runner.run_part("tests", 0.5, runner.parse_args(["--dry"]), {}, log)
    assert record["status"] == "failed" and record["seconds"] < 10 and "0 s" in record["failures"][0]
    process = subprocess.Popen(["bash", "-c", "sleep 60 & setsid sleep 60 & wait"])
    while len(runner.tree(process.pid)) < 3:
        time.sleep(0.01)
    below = runner.tree(process.pid)[1:]
    runner.end(process)
    alive = [pid for pid in below if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"]
    assert not alive


def test_what_was_ended_holds_no_lock_any_more(tmp_path):
    """A process gives its memory back before its files: one that has much of it holds its locks for a while after the kill."""
    holder = (
        "import fcntl, sys, time; memory = b'x' * (600 << 20); file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(["bash", "-c", '"$0" -c "$1" "$2" & wait', sys.executable, holder, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    process.stdout.readline()
    runner.end(process)
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_part_is_the_exit_status_and_the_table_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run_part", lambda name, *_: {"name": name, **runner.record_of({"rate": 7}, ["case: 3 of 4 are wrong"], {}, "", 0, 1.0)})
    assert runner.main(["--dry", "--only", "fork", "exactness", "--output", str(tmp_path)]) == 1
    assert "3 of 4 are wrong" in capsys.readouterr().out and len((tmp_path / "gpu_check.jsonl").read_text().splitlines()) == 2

    def crash(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(runner, "run_part", crash)
    assert runner.main(["--dry", "--only", "fork", "exactness", "--output", str(tmp_path / "two")]) == 1
    assert "no more processes" in (tmp_path / "two/gpu_check.md").read_text()


@pytest.mark.slow
def test_a_dry_run_of_every_part(tmp_path):
    done, records = check(tmp_path / "out", "--dry")
    assert done.returncode == 0, done.stdout
    ran = {name for name, record in records.items() if record["status"] == "ok"}
    assert ran >= {"versions", "tests", "exactness", "speed", "encoder", "reranker", "bertscore"}, done.stdout
    assert all(record["reason"] for record in records.values() if record["status"] == "skipped")

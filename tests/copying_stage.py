"""A stage that copies rows: the tests of files, outputs and locks run it."""

import threading
import time
from pathlib import Path

import pytest
from conftest import at, write_jsonl

from dynamicrag.files.jsonio import read_json
from dynamicrag.files.locks import in_turn
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import read_rows
from dynamicrag.stage import UserError

ROWS = [{"id": str(number), "question": f"question {number}"} for number in range(10)]


def arguments(**changes):
    return {"overwrite": False, "seed": 1, "flag": "x", "device": "cpu", "on_error": "fail", **changes}


class Killed(Exception):
    pass


def run_stage(folder, suffix=".jsonl", stop_after=None, rows=ROWS, tear=b"", **changes):
    """Copy rows in chunks of 3. Returns how many rows were computed."""
    source, target = folder / "in.jsonl", folder / f"out{suffix}"
    if not source.exists():
        write_jsonl(source, rows)
    output = Output(arguments(**changes), [str(target)], [str(source)])
    computed = 0
    if output.finished:
        return 0
    for number, chunk in enumerate(output.chunks(read_rows(source), 3)):
        if number == stop_after:
            output._file.write(tear)
            output._file.close()
            raise Killed
        output.write([{**row, "length": len(row["question"])} for row in chunk])
        computed += len(chunk)
    output.finish()
    return computed


def values(path):
    return [value for _, value in read_json(path)]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def check_that_a_second_run_is_refused(folder: Path) -> None:
    source = write_jsonl(folder / "in.jsonl", ROWS)
    first = Output(arguments(), [str(folder / "out.jsonl")], [str(source)])
    next(first.chunks(iter(ROWS), 3))
    with pytest.raises(UserError, match=at("out.jsonl.partial")):
        run_stage(folder)


def check_that_workers_take_turns(folder: Path) -> None:
    log, lock, ready = [], threading.Lock(), threading.Barrier(4)

    def worker(number: int) -> None:
        ready.wait()
        time.sleep(0.02 * number)  # all workers have started before the first one ends
        with in_turn(folder / "work"):
            for event in ("begins", "ends"):
                with lock:
                    log.append(event)
                time.sleep(0.1)
        with lock:
            log.append("goes on")

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert log == ["begins", "ends"] * 4 + ["goes on"] * 4

"""Every stage is interrupted: killed at any moment or within a write, asked to stop, without disk, permission, input or engine, or run twice.

Then the same command completes the files, byte for byte as an undisturbed run writes them, and leaves no others. The exit status
says what happened. Stages run in forked processes, as their scripts would run, on tiny models. A stub stands in for the LLM, since
these tests are about files.

    KILLS=20 pytest tests/faults/test_interruption.py -s       20 kills per stage instead of 3
"""

import ctypes
import errno
import importlib
import itertools
import json
import logging
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import write_jsonl
from running import make_good, run
from stages import CONTINUING, LLM_STAGES, STAGES, flags_of
from stubs import StubEngine, make_text
from tqdm import tqdm

from dynamicrag import stage
from dynamicrag.llm import requests

KILLS = int(os.environ.get("KILLS", "3"))
QUESTIONS = 40

# Files of a stage's outputs that later stages read: they are copied to the inputs.
HANDED_ON = {"embeddings", *(path.replace("*", "0") for path in (STAGES[name].reads for name in CONTINUING))}


def reply(request, kind: str, titles: list[str]) -> str | list[str]:
    """The reply depends on the request alone, as the engine's does."""
    rng = random.Random(request.seed)
    if kind == "answer":
        return rng.choice(["oil", "gas", make_text(rng, 1, 5)])
    return ["prose" if rng.random() < 0.05 else f"[{rng.randint(1, len(titles))}]" if titles else "None" for _ in range(request.n)]


@dataclass(frozen=True)
class Undisturbed:
    """The files of an undisturbed run, its seconds, and the number of its operations on files."""

    files: dict[str, bytes]
    seconds: float
    operations: int


def in_a_process(name: str, inputs: Path, out: Path, prepare: Callable[[], None] = lambda: None, interfere=lambda pid: None) -> tuple[int, str]:
    """Run a stage as its script would. Returns the exit status, or minus the signal that ended it, and the text on stderr."""
    said = out.with_name(f"{out.name}.stderr")
    said.touch()  # the process may be killed before it opens the file
    module = importlib.import_module(name)
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with said.open("w") as file:
                os.dup2(file.fileno(), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - open until the process ends
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            logging.root.handlers.clear()  # pytest's handlers; stage.run makes its own
            tqdm.set_lock(threading.RLock())  # the lock of tqdm is shared with earlier processes, one of which was killed while it held the lock
            requests.load_engine = lambda args: StubEngine(reply)
            prepare()
            stage.run(lambda: module.main(flags_of(name, inputs, out, inputs / STAGES[name].reads, full=True)))
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    interfere(pid)
    _, ended = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(ended), said.read_text(errors="replace")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path. Manifests are without their times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".lock", ".started"):
            found[str(path.relative_to(folder))] = path.read_bytes()
            if path.name.endswith(".manifest.json"):
                manifest = json.loads(path.read_bytes())
                text = json.dumps({key: value for key, value in manifest.items() if key != "seconds"}).replace(str(folder), "")
                found[str(path.relative_to(folder))] = "".join(part for part in text.split('"') if "passages/s" not in part).encode()
            if "store" in path.parts and path.suffix == ".json":  # Arrow's own files name their time and place
                found[str(path.relative_to(folder))] = b""
    return found


def each_operation(act: Callable[[], None]) -> Callable[[], None]:
    """A `prepare` that calls `act` each time the process is about to open a file for writing, or to rename, remove, truncate or lock one."""

    def hook(event: str, arguments: tuple) -> None:
        if event in ("os.rename", "os.remove", "os.truncate", "fcntl.flock") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+")
        ):
            act()

    return lambda: sys.addaudithook(hook)


def on_operation(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A `prepare` that calls `act` at the `number`-th of those operations. The first one is number 1."""
    left = itertools.count(number - 1, -1)
    return each_operation(lambda: act() if next(left) == 0 else None)


def ended_by(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def within_bytes(size: int, then: int) -> Callable[[], None]:
    """A `prepare` after which no file can have more than `size` bytes. A longer write is cut there and raises the signal whose handler is `then`."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, then)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoder_dir, monot5_dir, corpus_tsv) -> tuple[Path, dict[str, Undisturbed]]:
    """The folder of all inputs, and the undisturbed run of each stage."""
    inputs = make_good(tmp_path_factory.mktemp("inputs"), encoder_dir)
    (inputs / "monot5").symlink_to(monot5_dir)
    shutil.copy(corpus_tsv, inputs / "corpus.tsv")
    rng = random.Random(11)
    questions = [{"id": f"q{n}", "question": make_text(rng, 3, 9), "answers": [make_text(rng, 1, 2)]} for n in range(QUESTIONS)]
    write_jsonl(inputs / "train.jsonl", questions)
    undisturbed = {}
    operations = mmap.mmap(-1, 8)  # shared with the forked processes

    def count() -> None:
        operations[:] = (int.from_bytes(operations[:], "big") + 1).to_bytes(8, "big")

    for name in CONTINUING:
        with pytest.MonkeyPatch.context() as patch:  # this run imports every module that the forked processes need
            flags = flags_of(name, inputs, tmp_path_factory.mktemp(name), inputs / STAGES[name].reads, full=True)
            assert run(name, flags, patch, StubEngine(reply)) == (0, [])
        out, before = tmp_path_factory.mktemp(name), time.monotonic()
        operations[:] = bytes(8)
        status, said = in_a_process(name, inputs, out, each_operation(count))
        seconds = time.monotonic() - before
        assert status == 0, said
        for made in out.iterdir():
            if made.name.removesuffix(".manifest.json") in HANDED_ON:
                (shutil.copytree if made.is_dir() else shutil.copy)(made, inputs / made.name)
        undisturbed[name] = Undisturbed(contents(out), seconds, int.from_bytes(operations[:], "big"))
    return inputs, undisturbed


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def assert_completes(name: str, inputs: Path, out: Path, undisturbed: Undisturbed) -> None:
    status, said = in_a_process(name, inputs, out)
    assert status == 0, said
    found = contents(out)
    assert found.keys() == undisturbed.files.keys()
    assert [path for path in found if found[path] != undisturbed.files[path]] == []
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".npy")}
    status, said = in_a_process(name, inputs, out)
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before


def torn(out: Path) -> bool:
    """Whether a write was cut off: there is a temporary file, or a line without its end."""
    return any(
        path.name.endswith(".writing") or (path.name.endswith(".jsonl.partial") and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0)
        for path in out.rglob("*")
    )


@pytest.mark.parametrize("name", CONTINUING)
def test_killed_at_any_moment(runs, tmp_path, name, capsys):
    inputs, undisturbed = runs[0], runs[1][name]
    rng = random.Random(f"{name} {os.environ.get('KILL_SEED', 0)}")
    largest = max(map(len, undisturbed.files.values()))
    within_a_write, longest = 0, undisturbed.seconds
    for kill in range(KILLS):
        out = tmp_path / f"killed_{kill}"
        out.mkdir()
        ended = 0
        while ended not in (-signal.SIGKILL, -signal.SIGXFSZ):
            way = kill % 3
            if way == 0:
                moment = rng.uniform(0, longest)

                def strike(pid: int, moment: float = moment) -> None:
                    time.sleep(moment)
                    os.kill(pid, signal.SIGKILL)

                ended, said = in_a_process(name, inputs, out, interfere=strike)
            elif way == 1:
                ended, said = in_a_process(name, inputs, out, on_operation(rng.randint(1, undisturbed.operations), ended_by(signal.SIGKILL)))
            else:
                ended, said = in_a_process(name, inputs, out, within_bytes(rng.randrange(largest), signal.SIG_DFL))
            assert ended in (0, -signal.SIGKILL, -signal.SIGXFSZ), said
            if ended == 0:  # the stage ended before the kill: the machine is faster now than in the undisturbed run
                longest *= 0.8
                shutil.rmtree(out)
                out.mkdir()
        within_a_write += torn(out)
        assert_completes(name, inputs, out, undisturbed)
        shutil.rmtree(out)
    with capsys.disabled():
        print(f"\n{name}: {KILLS} of {KILLS} kills, {within_a_write} of them within a write", end=" ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", CONTINUING)
def test_asked_to_stop(runs, out, name, number, status):
    inputs, undisturbed = runs[0], runs[1][name]
    operation = random.Random(f"{name} {number}").randint(1, undisturbed.operations)
    ended, said = in_a_process(name, inputs, out, on_operation(operation, ended_by(number)))
    assert ended == status, said
    assert said.strip() and not re.search("Traceback|error:", said)
    assert_completes(name, inputs, out, undisturbed)


@pytest.mark.parametrize("name", CONTINUING)
def test_a_full_disk_is_one_line_and_loses_nothing(runs, out, name):
    inputs, undisturbed = runs[0], runs[1][name]
    size = random.Random(name).randrange(max(map(len, undisturbed.files.values())))
    ended, said = in_a_process(name, inputs, out, within_bytes(size, signal.SIG_IGN))
    assert ended == 2, said
    assert "Traceback" not in said
    [error] = re.findall("error: .*", said)
    assert os.strerror(errno.EFBIG) in error and str(out) in error
    assert_completes(name, inputs, out, undisturbed)


def without_privileges() -> None:
    """Give up all capabilities of this process, since root may write anywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


@pytest.mark.parametrize("name", CONTINUING)
def test_a_disk_that_was_full_has_room_again(runs, out, name):
    """The disk is a real one, too small for the largest file. The test is skipped if this user may not mount it."""
    inputs, undisturbed = runs[0], runs[1][name]
    pages = random.Random(name).randint(1, max(max(map(len, undisturbed.files.values())) // 4096, 1))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        status, said = in_a_process(name, inputs, out)
        assert status == 2 and "Traceback" not in said, said
        [error] = re.findall("error: .*", said)
        assert os.strerror(errno.ENOSPC) in error and str(out) in error
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        assert_completes(name, inputs, out, undisturbed)
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.parametrize("name", CONTINUING)
def test_a_folder_that_may_not_be_written_is_named(runs, out, name):
    inputs, undisturbed = runs[0], runs[1][name]
    made = {out / Path(path).parts[0] for path in undisturbed.files if len(Path(path).parts) > 1 and not path.startswith("store")}
    for path in made:
        path.mkdir()
    for path in (out, *made):
        path.chmod(0o555)
    status, said = in_a_process(name, inputs, out, without_privileges)
    assert status == 2, said
    assert said.splitlines()[-1].startswith("error: ") and str(out) in said.splitlines()[-1]
    assert not [path for path in out.rglob("*") if path.is_file()]
    for path in (out, *made):
        path.chmod(0o755)
    assert_completes(name, inputs, out, undisturbed)


@pytest.mark.parametrize("name", CONTINUING)
def test_an_input_that_vanished_is_named_and_what_was_done_is_kept(runs, out, tmp_path, name):
    inputs, undisturbed = runs[0], runs[1][name]
    last = on_operation(undisturbed.operations, ended_by(signal.SIGKILL))
    ended, said = in_a_process(name, inputs, out, last)
    assert ended == -signal.SIGKILL, said
    kept = contents(out)
    [path] = inputs.glob(STAGES[name].reads)
    path.rename(tmp_path / "vanished")
    try:
        status, said = in_a_process(name, inputs, out)
    finally:
        (tmp_path / "vanished").rename(path)
    assert status == 2, said
    assert STAGES[name].reads in said.splitlines()[-1] and "Traceback" not in said
    assert contents(out) == kept
    assert_completes(name, inputs, out, undisturbed)


@pytest.mark.parametrize("name", LLM_STAGES)
def test_an_engine_that_dies_costs_its_batch(runs, out, name):
    inputs, undisturbed = runs[0], runs[1][name]

    def dies_in_its_fifth_batch() -> None:
        def complete(engine: StubEngine, requests: list) -> list:
            if len(engine.batches) == 4:
                raise RuntimeError("EngineCore encountered an issue")
            return StubEngine.complete(engine, requests)

        requests.load_engine = lambda args: type("DyingEngine", (StubEngine,), {"complete": complete})(reply)

    status, said = in_a_process(name, inputs, out, dies_in_its_fifth_batch)
    assert status not in (0, 2, 130) and "EngineCore" in said
    [partial] = out.glob("*.partial")
    assert len(partial.read_bytes().splitlines()) in (7, 14), "the chunks before it"
    assert_completes(name, inputs, out, undisturbed)


@pytest.mark.parametrize("name", CONTINUING)
def test_two_runs_at_once_do_not_mix(runs, out, name):
    """The first run is stopped while it holds the lock, the second run is refused, and the first one continues."""
    inputs, undisturbed = runs[0], runs[1][name]

    def stops_with_the_lock() -> None:
        """Stop once, at the first file that is opened after the partial file is locked."""
        state = ["before"]

        def hook(event: str, arguments: tuple) -> None:
            if event == "fcntl.flock" and state[0] == "before" and os.readlink(f"/proc/self/fd/{arguments[0]}").endswith(".partial"):
                state[0] = "locked"
            elif event == "open" and state[0] == "locked":
                state[0] = "stopped"
                os.kill(os.getpid(), signal.SIGSTOP)

        sys.addaudithook(hook)

    refused = []

    def second_run(pid: int) -> None:
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "it ended without taking a lock"
        refused.append(in_a_process(name, inputs, out))
        os.kill(pid, signal.SIGCONT)

    status, said = in_a_process(name, inputs, out, stops_with_the_lock, second_run)
    assert status == 0, said
    assert refused[0][0] == 2 and re.search(rf"^error: {re.escape(str(out))}\S*\.partial: ", refused[0][1], re.MULTILINE)
    assert_completes(name, inputs, out, undisturbed)

"""The fingerprint of a run, the place of its output, and its locks."""

import contextlib
import errno
import fcntl
import functools
import importlib
import itertools
import json
import os
import re
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import at, logged, naming, write_jsonl
from copying_stage import (
    ROWS,
    Killed,
    arguments,
    check_that_a_second_run_is_refused,
    check_that_workers_take_turns,
    put,
    run_stage,
    values,
)
from tqdm import tqdm

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.locks import exclusive, in_turn, locked
from dynamicrag.llm.answering import place_of
from dynamicrag.rows import manifest
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import read_rows
from dynamicrag.stage import UserError

# ---------------------------------------------------------------- fingerprints


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty folder of fingerprints."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_a_change_is_seen_in_a_file_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SETTLED_NS", -1)
    path = put(tmp_path / "large", os.urandom(1 << 20) * 65)
    seen = {manifest.fingerprint(path)}
    for place in (0, (1 << 20) + 5000, path.stat().st_size // 2, path.stat().st_size - 1):
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # some editors keep the time of a file
        seen.add(manifest.fingerprint(path))
    assert len(seen) == 5
    assert manifest.fingerprint(put(tmp_path / "copy", path.read_bytes())) in seen


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that were read for their fingerprint. Files of more than a thousand bytes count as large."""
    found, real = [], manifest.hashlib.file_digest

    def file_digest(file, digest):
        found.append(os.path.basename(file.name))
        return real(file, digest)

    monkeypatch.setattr(manifest.hashlib, "file_digest", file_digest)
    monkeypatch.setattr(manifest, "LARGE", 1000)
    monkeypatch.setattr(manifest, "SETTLED_NS", -1)
    return found


def test_a_large_file_is_read_once_while_it_stays_what_it_was(tmp_path, reads, cache, monkeypatch):
    path, small = put(tmp_path / "large", b"x" * 2000), put(tmp_path / "small", b"x")
    first = manifest.fingerprint(path)
    assert manifest.fingerprint(path) == first and manifest.fingerprint(small) == manifest.fingerprint(small)
    assert reads == ["large", "small", "small"]
    put(tmp_path / "other", b"y" * 2000)
    os.utime(tmp_path / "other", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(tmp_path / "other", path)  # as many bytes, the same time
    second = manifest.fingerprint(path)
    assert second != first
    for content in ("[]", "{", '{"state": 1, "sha256": "x"}'):
        for kept in cache.rglob("*_*"):
            kept.write_text(content)
        assert manifest.fingerprint(path) == second
    del reads[:]
    assert manifest.fingerprint(path) == second and reads == []
    monkeypatch.setattr(manifest, "SETTLED_NS", 10**12)  # the file has just changed, and may change again within one tick of the clock
    put(path, b"z" * 2000)
    assert manifest.fingerprint(path) == manifest.fingerprint(path) and reads == ["large", "large"]


def test_without_a_place_to_keep_it_a_fingerprint_is_made_again(tmp_path, reads, monkeypatch):
    path = put(tmp_path / "large", b"x" * 2000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert manifest.fingerprint(path) == manifest.fingerprint(path) and reads == ["large", "large"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_an_earlier_version_goes_on_and_a_changed_input_is_seen(tmp_path, monkeypatch, caplog, finished):
    """The earlier version made the fingerprint of a large file from 64 samples."""
    monkeypatch.setattr(manifest, "LARGE", 2 << 20)
    rows = [{**row, "text": "x" * (300 << 10)} for row in ROWS]
    with monkeypatch.context() as patch:
        sampled = manifest._samples
        patch.setattr(manifest, "_content", sampled)
        with contextlib.nullcontext() if finished else pytest.raises(Killed):
            run_stage(tmp_path, rows=rows, stop_after=None if finished else 2)
    assert run_stage(tmp_path) == (0 if finished else 4) and logged(caplog, "in.jsonl") == 1
    content = (tmp_path / "in.jsonl").read_bytes()
    (tmp_path / "in.jsonl").write_bytes(content.replace(b"question 0", b"question 1", 1))
    with pytest.raises(UserError, match=naming("inputs", tmp_path / "in.jsonl")):
        run_stage(tmp_path)


# ---------------------------------------------------------------- the same input, the same arguments


def test_the_same_file_by_another_path_is_the_same_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "linked").symlink_to("data")
    (tmp_path / "by_link.jsonl").symlink_to("data/rows.jsonl")
    for name in ("rows.jsonl", "nq.jsonl"):
        write_jsonl(tmp_path / "data" / name, ROWS)
    write_jsonl(tmp_path / "data/other.jsonl", ROWS[1:])
    shard = put(tmp_path / "data/shard_0.npy", b"vectors")
    put(tmp_path / "data/shard_1.npy", b"others")

    def finished(path: str, output: str = "out.jsonl", shard: str = "data/shard_0.npy", folder: str = "data") -> bool:
        out = Output(arguments(input_file=path, files=[path], folder=folder, output_file=output), [output], [path, shard])
        if not out.finished:
            out.process(read_rows(path), 3, list, 10, "")
            out.finish()
            return False
        return True

    assert not finished("data/rows.jsonl")
    write_jsonl(tmp_path / "a_copy.jsonl", ROWS)
    for path in ("./data/rows.jsonl", str(tmp_path / "data/rows.jsonl"), "linked/rows.jsonl", "by_link.jsonl", "a_copy.jsonl"):
        assert finished(path) and finished(path, str(tmp_path / "out.jsonl"), str(shard), str(tmp_path / "linked"))
    for path in ("data/other.jsonl", "data/nq.jsonl"):  # other rows; a name that gives the data set of the rows
        with pytest.raises(UserError, match=naming("arguments", "files, input_file")):
            finished(path)
    with pytest.raises(UserError, match=naming("inputs", "data/shard_0.npy")):
        finished("data/rows.jsonl", shard="data/shard_1.npy")
    with pytest.raises(UserError, match=naming("arguments", "folder")):
        finished("data/rows.jsonl", folder="elsewhere")


def test_two_inputs_that_changed_places_are_other_inputs(tmp_path):
    one, other = write_jsonl(tmp_path / "one.jsonl", ROWS), write_jsonl(tmp_path / "other.jsonl", ROWS[1:])
    inputs, output = [str(one), str(other)], str(tmp_path / "out")
    out = Output(arguments(one=inputs[0], other=inputs[1]), [output], inputs)
    out.publish(output, ROWS)
    out.finish()
    with pytest.raises(UserError, match=naming("arguments", "one, other")):
        Output(arguments(one=inputs[1], other=inputs[0]), [output], inputs)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(UserError, match=naming("inputs", one, other)):
        Output(arguments(one=inputs[0], other=inputs[1]), [output], inputs)


def test_shards_that_changed_their_names_are_other_inputs(tmp_path):
    """A glob finds the shards in the order of their names."""
    for folder, contents in (("a", b"xy"), ("b", b"xy"), ("c", b"yx")):
        (tmp_path / folder).mkdir()
        for number, content in enumerate(contents):
            put(tmp_path / folder / f"shard_{number}", bytes([content]))
    output = str(tmp_path / "out")

    def run(folder: str) -> Output:
        return Output(arguments(), [output], [str(tmp_path / folder / f"shard_{number}") for number in (0, 1)])

    out = run("a")
    out.publish(output, ROWS)
    out.finish()
    assert run("b").finished
    with pytest.raises(UserError, match=naming("inputs", "shard_0")):
        run("c")


def test_where_a_server_listens_is_not_what_a_run_is_but_whether_there_is_one_is(tmp_path):
    with pytest.raises(Killed):
        run_stage(tmp_path, stop_after=2, api_base="http://one:1/v1", judge_base_url=None)
    assert run_stage(tmp_path, api_base="http://two:2/v1", judge_base_url=None) == 4
    for key, changed in (("api_base", {"judge_base_url": None}), ("judge_base_url", {"api_base": "http://one:1/v1"})):
        with pytest.raises(UserError, match=naming("arguments", key)):
            run_stage(tmp_path, **changed, **{key: None if key == "api_base" else "http://one:1/v1"})


# ---------------------------------------------------------------- device and precision

GPU, CPU = {"device": "NVIDIA H100", "dtype": "bfloat16"}, {"device": "cpu", "dtype": "float32"}


def computed(folder, resolved: dict, chunks: int = 9, dtype: str = "auto") -> Output:
    """Run a stage that writes at most so many chunks. Its manifest has the resolved --dtype and --device."""
    source = write_jsonl(folder / "in.jsonl", ROWS)
    out = Output(arguments(dtype=dtype), [str(folder / "out.jsonl")], [str(source)])
    if out.finished:
        return out
    out.record(**resolved)
    for number, chunk in enumerate(out.chunks(read_rows(source), 3)):
        if number == chunks:
            out._file.close()
            return out
        out.write(chunk)
    out.finish()
    return out


def test_a_run_goes_on_in_the_precision_it_began_in(tmp_path, caplog):
    computed(tmp_path, GPU, chunks=2)
    with pytest.raises(UserError, match=at("out.jsonl.partial", "arguments", "dtype", "'bfloat16'", "'float32'")):
        computed(tmp_path, CPU)
    assert not logged(caplog, "out.jsonl.partial")
    computed(tmp_path, {**CPU, "dtype": "bfloat16"}, dtype="bfloat16", chunks=1)  # the type is asked for by name
    assert logged(caplog, "out.jsonl.partial", "NVIDIA H100", "cpu") == 1
    computed(tmp_path, GPU)
    assert logged(caplog, "out.jsonl.partial") == 1, "on the device it was begun on there is nothing to say"
    made = read_manifest(tmp_path / "out.jsonl")
    assert (made["device"], made["resolved"]) == ("NVIDIA H100", {"dtype": "bfloat16"})
    assert computed(tmp_path, {}).finished and computed(tmp_path, {}, dtype="bfloat16").finished, "without a look at the device"
    with pytest.raises(UserError, match=naming("dtype", "'auto'", "'float32'")):
        computed(tmp_path, {}, dtype="float32")


def test_a_run_of_an_earlier_version_that_noted_no_precision_goes_on(tmp_path, caplog):
    computed(tmp_path, {}, chunks=2)
    begun = tmp_path / "out.jsonl.partial.manifest.json"
    begun.write_text(json.dumps({key: value for key, value in json.loads(begun.read_text()).items() if key not in ("device", "resolved")}))
    assert computed(tmp_path, CPU).rows == 10 and not logged(caplog)


# ---------------------------------------------------------------- outputs that are links


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("name", ["out", "elsewhere"])
def test_an_output_that_is_a_link_stays_one(tmp_path, suffix, name):
    """The home folder may be small, so nothing is written there except the link."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    link, target = home / f"out{suffix}", scratch / f"{name}{suffix}"
    link.symlink_to(os.path.relpath(target, home))
    with pytest.raises(Killed):
        run_stage(home, suffix, stop_after=2)
    assert sorted(os.listdir(home)) == ["in.jsonl", link.name] and f"{target.name}.partial" in os.listdir(scratch)
    assert run_stage(home, suffix) == 4 and run_stage(home, suffix) == 0
    assert link.is_symlink() and len(values(target)) == 10 and read_manifest(link)["counts"] == read_manifest(target)["counts"] == {"rows": 10}
    assert sorted(os.listdir(home)) == ["in.jsonl", link.name] and sorted(os.listdir(scratch)) == sorted([target.name, f"{target.name}.manifest.json"])
    assert run_stage(home, suffix, overwrite=True) == 10 and link.is_symlink()


def test_every_whole_file_is_written_where_its_link_leads(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "table.md").symlink_to("far/table.md")
    for content in (b"one", b"two"):
        with atomic_writer(tmp_path / "table.md") as file:
            file.write(content)
        assert (tmp_path / "table.md").is_symlink() and (tmp_path / "far/table.md").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["far", "table.md"] and os.listdir(tmp_path / "far") == ["table.md"]


# ---------------------------------------------------------------- file systems and their locks


class NfsLocks:
    """flock as in Linux' NFS client: byte-range locks that need a matching file mode and cannot be upgraded."""

    def __init__(self):
        self.shared, self.flock = set(), fcntl.flock

    def __call__(self, fd: int, operation: int) -> None:
        mode, kind = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, operation & ~fcntl.LOCK_NB
        if (kind == fcntl.LOCK_SH and mode == os.O_WRONLY) or (kind == fcntl.LOCK_EX and mode == os.O_RDONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if kind == fcntl.LOCK_EX and fd in self.shared:
            raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK))
        self.flock(fd, operation)
        (self.shared.add if kind == fcntl.LOCK_SH else self.shared.discard)(fd)


def test_locks_work_as_nfs_has_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", NfsLocks())
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError, match=rf"Errno {errno.EBADF}\b"):
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
    with open(tmp_path / "file", "w+") as file, pytest.raises(OSError, match=rf"Errno {errno.EDEADLK}\b"):
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    monkeypatch.setattr(fcntl, "flock", NfsLocks())
    check_that_workers_take_turns(tmp_path)
    with exclusive(tmp_path / "store"):
        pass
    assert run_stage(tmp_path) == 10
    (tmp_path / "two").mkdir()
    check_that_a_second_run_is_refused(tmp_path / "two")
    assert not logged(caplog)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=at("out.jsonl.partial", "flock")):
        run_stage(tmp_path)
    with pytest.raises(UserError, match=at("store.lock", "flock")), exclusive(tmp_path / "store"):
        raise AssertionError("it goes on without the lock")
    went_on = False
    with in_turn(tmp_path / "corpus"):  # this lock only saves memory
        went_on = True
    assert went_on and logged(caplog, "flock") == 1


def on_lock(monkeypatch, act, number: int = 1) -> None:
    """Call `act` when a file is open and about to be locked for the `number`-th time."""
    real, left = fcntl.flock, itertools.count(number - 1, -1)

    def flock(*given) -> None:
        if next(left) == 0:
            act()
        real(*given)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.rename(f"{path}.old"), lambda path: (path.unlink(), path.write_text("new"))])
def test_a_lock_is_of_the_file_that_has_the_name(tmp_path, monkeypatch, change):
    path = put(tmp_path / "file", "old")
    on_lock(monkeypatch, lambda: change(path))
    with locked(path) as file:
        file.write(b"!")
    assert path.read_text() in ("!", "new!") and all(other.read_text() == "old" for other in tmp_path.glob("*.old"))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_a_file_that_another_machine_has_removed_is_opened_again(tmp_path, monkeypatch, number):
    def gone():
        (tmp_path / "file").unlink()
        raise OSError(number, os.strerror(number))

    on_lock(monkeypatch, gone)
    with locked(tmp_path / "file") as file:
        assert os.path.samestat(os.fstat(file.fileno()), (tmp_path / "file").stat())


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("when", ["before its file is opened", "before it has the lock"])
def test_a_run_that_finishes_while_another_one_starts_keeps_its_output(tmp_path, monkeypatch, suffix, when):
    """The second run has seen no finished output. On another machine this takes as long as a model takes to load."""
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    second = Output(arguments(), [str(tmp_path / f"out{suffix}")], [str(source)])
    with pytest.raises(Killed):  # its partial file is there, for the second run to open
        run_stage(tmp_path, suffix, stop_after=1)
    if when == "before its file is opened":
        run_stage(tmp_path, suffix)
    else:
        on_lock(monkeypatch, lambda: run_stage(tmp_path, suffix))
    with pytest.raises(UserError, match=at(f"out{suffix}")):
        next(second.chunks(iter(ROWS), 3))
    assert len(values(tmp_path / f"out{suffix}")) == 10 and read_manifest(tmp_path / f"out{suffix}")["counts"]["rows"] == 10
    assert sorted(os.listdir(tmp_path)) == sorted(["in.jsonl", f"out{suffix}", f"out{suffix}.manifest.json"])


def test_a_run_between_its_rename_and_its_manifest_keeps_its_output(tmp_path, monkeypatch):
    refused = []

    def interrupted(*given):
        if not refused:
            refused.append(None)
            with pytest.raises(UserError, match=at("out.jsonl", os.getpid())):
                run_stage(tmp_path)
        return atomic_writer(*given)

    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    first = Output(arguments(), [str(tmp_path / "out.jsonl")], [str(source)])
    for chunk in first.chunks(read_rows(source), 3):
        first.write(chunk)
    monkeypatch.setattr("dynamicrag.rows.output.atomic_writer", interrupted)
    first.finish()
    assert refused and len(values(tmp_path / "out.jsonl")) == 10
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.manifest.json"]


def test_overwrite_does_not_remove_the_files_of_a_run_that_writes_them(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    first = Output(arguments(), [str(tmp_path / "out.jsonl")], [str(source)])
    chunks = first.chunks(read_rows(source), 3)
    first.write(next(chunks))
    with pytest.raises(UserError, match=at("out.jsonl.partial", os.getpid(), socket.gethostname())):
        run_stage(tmp_path, overwrite=True)
    for chunk in chunks:
        first.write(chunk)
    first.finish()
    assert len(values(tmp_path / "out.jsonl")) == 10
    assert run_stage(tmp_path, overwrite=True) == 10


def test_a_finished_output_that_another_machine_wrote_a_moment_ago_is_seen(tmp_path, monkeypatch):
    """An NFS client remembers that a file did not exist, until its own process changes the folder."""
    assert run_stage(tmp_path) == 10
    news, is_file, temporary = [], Path.is_file, tempfile.TemporaryFile
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and (bool(news) or not path.name.endswith(".manifest.json")))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: news.append(dir) or temporary(dir=dir))
    assert run_stage(tmp_path) == 0 and news == [tmp_path]


def test_a_worker_that_waits_says_for_whom(tmp_path, caplog):
    caplog.set_level("INFO")
    waiting = threading.Thread(target=lambda: exclusive(tmp_path / "store").__enter__())
    with exclusive(tmp_path / "store"):
        assert not logged(caplog, level="INFO")
        waiting.start()
        until = time.monotonic() + 10
        while not logged(caplog, level="INFO") and time.monotonic() < until:
            time.sleep(0.01)
    waiting.join(timeout=10)
    assert logged(caplog, "store", os.getpid(), socket.gethostname(), level="INFO") == 1 and not waiting.is_alive()


def test_a_rename_whose_answer_was_lost_has_worked(tmp_path, monkeypatch):
    """An NFS client that gets no answer asks again, and the server finds the file no more."""
    real = os.rename

    def twice(path, target):
        real(path, target)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", twice)
    with atomic_writer(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole" and os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(Path, "replace", lambda path, target: real(tmp_path / "nothing", target))
    with pytest.raises(FileNotFoundError), atomic_writer(tmp_path / "file") as file:
        file.write(b"other")
    assert (tmp_path / "file").read_bytes() == b"whole" and os.listdir(tmp_path) == ["file"]


def test_turns_are_of_one_machine_and_leave_nothing_beside_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))
    (tmp_path / "machine").mkdir()
    (tmp_path / "linked").symlink_to("corpus.tsv")
    for name in ("corpus.tsv", "linked"):
        with in_turn(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["linked", "machine"]
    assert len(os.listdir(tmp_path / "machine")) == 2, "the same corpus by two names"
    for path in (tmp_path / "machine").iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    with in_turn(tmp_path / "corpus.tsv"):
        pass
    assert not (tmp_path / "elsewhere").exists(), "in a folder that others may write to, no link is followed"


# ---------------------------------------------------------------- what stages note and show


def test_stages_note_device_and_precision_and_show_no_bar_that_is_disabled(tmp_path, monkeypatch, capfd, encoder_dir, monot5_dir, corpus_tsv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))  # as TQDM_DISABLE=1 does if it is set before the import
    write_jsonl(tmp_path / "questions.jsonl", [{**row, "answers": ["x"]} for row in ROWS])
    write_jsonl(tmp_path / "sampled.jsonl", [
        {"id": "1", "question": "what?", "answers": ["a"], "docs": [], "id_lists": [[], []], "responses": ["a", "b"], "response_tokens": [1, 1]},
    ])
    encode = f"--model_name_or_path {encoder_dir} --passages {corpus_tsv} --passage_store store --device cpu"
    for command in (
        "split_data --input_file questions.jsonl --output_dir splits --num_splits 1",
        f"generate_passage_embeddings {encode} --output_dir embeddings",
        f"retriever {encode} --passages_embeddings embeddings --query splits/split_0.json --output_file found_0.jsonl --index flat bm25 --n_docs 3 --dtype float32",
        "aggregate --input_files found_*.jsonl --splits_dir splits --output_file all.jsonl",
        f"reranker --model_name_or_path {monot5_dir} --input_file all.jsonl --output_file reranked.jsonl --dtype bfloat16 --device cpu",
        f"reward_trajectories --input_file sampled.jsonl --output_file rewarded.jsonl --bert_model {encoder_dir} --bert_layer 1 --device cpu",
        "evaluate_retrieval --results_file reranked.jsonl",
    ):
        name, *flags = command.split()
        importlib.import_module(name).main(flags)
    assert not re.search(r"\d%\||it/s|/s\]", capfd.readouterr().err)
    noted = {name: read_manifest(tmp_path / name) for name in ("embeddings/passages_00.npy", "found_0.jsonl", "reranked.jsonl", "rewarded.jsonl")}
    assert {made["device"] for made in noted.values()} == {"cpu"}
    automatic, *given, none = (made["resolved"].get("dtype") for made in noted.values())
    assert automatic in ("float32", "bfloat16") and given == ["float32", "bfloat16"] and none is None


def test_an_llm_stage_notes_where_its_models_run():
    def caller(**place):
        return SimpleNamespace(engine=SimpleNamespace(place=lambda: place) if place else SimpleNamespace())

    one, other = caller(device="NVIDIA H100", dtype="bfloat16"), caller(device="NVIDIA H100", dtype="float16")
    assert place_of((one, one)) == {"device": "NVIDIA H100", "dtype": "bfloat16"}
    assert place_of((one, other)) == {"device": "NVIDIA H100", "dtype": "bfloat16, float16"}
    assert place_of((caller(), caller())) == {}, "a server does not say"


def test_an_output_that_is_a_folder_is_refused_even_to_be_overwritten(tmp_path):
    import split_for_sft_dpo

    (tmp_path / "rows.jsonl").write_text('{"id": "q", "question": "what?", "true_id": [], "docs": []}\n')
    (tmp_path / "sft.jsonl").mkdir()
    with pytest.raises(UserError, match=at("sft.jsonl")):
        split_for_sft_dpo.main(["--input_file", str(tmp_path / "rows.jsonl"), "--sft_file", str(tmp_path / "sft.jsonl"), "--dpo_file",
                                str(tmp_path / "dpo.jsonl"), "--overwrite"])
    assert (tmp_path / "sft.jsonl").is_dir()

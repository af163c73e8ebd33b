"""A fork of a server does what a new interpreter would do (tests/warm.py). The servers here import nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
sys.path.append(str(HERE.parents[1]))  # for the tests that run this file as a program

from warm import Warm  # noqa: E402

REPO = HERE.parents[2]
FORKED = "sys.orig_argv[-1] == 'serve'"


def double(number: int) -> tuple[int, bool]:
    return 2 * number, sys.orig_argv[-1] == "serve"


def facts() -> dict:
    """What a program sees of the process that it runs in, and what a process sees that it spawns."""
    os.umask(umask := os.umask(0))
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        doubled, of_a_fork = process.submit(double, 21).result()
    return {
        "argv": sys.argv, "path": sys.path, "file": __file__, "main": sys.modules["__main__"].__dict__.get("facts") is facts, "folder": os.getcwd(),
        "environment": {key: value for key, value in os.environ.items() if key not in ("_", "PWD")}, "umask": umask, "doubled": doubled, "spawned_as_this": of_a_fork == (sys.orig_argv[-1] == "serve"), "executable": sys.executable,
        "files": sorted(os.listdir("/proc/self/fd"))[:4], "ignores_hangup": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler, "read": sys.stdin.read(),
    }


@pytest.fixture(scope="module")
def light():
    with Warm("nothing", "nothing") as servers:
        yield servers


def run(python, *words: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run([python, *map(str, words)], capture_output=True, text=True, timeout=60, **more)


def both(light, *words: object, **more) -> list[subprocess.CompletedProcess]:
    return [run(python, *words, **more) for python in (light.python, sys.executable)]


def test_a_program_sees_what_it_would_see_in_a_new_interpreter(light, tmp_path):
    (tmp_path / "link.py").symlink_to(HERE)
    words = ["-c", "import signal, os, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.umask(0o27); os.execv(sys.argv[1], sys.argv[1:])"]
    programs = [str(light.python), sys.executable]
    seen = [run(sys.executable, *words, python, "link.py", "a b", "é", cwd=tmp_path, input="text", env={**os.environ, "MORE": "x"}) for python in programs]
    assert [one.returncode for one in seen] == [0, 0], seen[0].stderr
    forked, new = (json.loads(one.stdout) for one in seen)
    assert forked.pop("forked") and not new.pop("forked")
    assert forked == new and new["doubled"] == 42 and new["spawned_as_this"] and new["umask"] == 0o27 and new["ignores_hangup"] and new["read"] == "text"


@pytest.mark.parametrize("words", [
    ["-c", "import sys; print(sys.argv, sys.path[0])", "x"], ["-m", "dynamicrag.report", "--help"], ["split_data.py", "--help"],
    ["split_data.py", "--input_file", "/nowhere.jsonl"], ["-c", "raise SystemExit"], ["-c", "raise SystemExit(7)"], ["-c", "raise SystemExit('words')"],
    ["-c", "def f(): raise ValueError('x')\nf()"], ["-c", "raise KeyboardInterrupt"], ["-c", "import os; os.kill(os.getpid(), 9)"], ["-c", "not code"],
    ["-c", "import os; os._exit(3)"], ["-c", "import atexit; atexit.register(print, 'late'); print('soon', end='')"],
    ["-c", "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()"],
], ids=lambda words: words[-1])
def test_output_and_status_are_those_of_a_new_interpreter(light, words):
    forked, new = both(light, *words, cwd=REPO)
    assert run(light.python, "-c", f"import sys; sys.exit({FORKED})").returncode == 1, "the server answers"
    assert (forked.returncode, forked.stdout, forked.stderr) == (new.returncode, new.stdout, new.stderr)


def test_files_that_are_open_are_passed_on_and_files_that_are_left_open_are_written(light, tmp_path):
    read, write = os.pipe()
    code = f"import os, sys; os.write({write}, b'x' if {FORKED} else b'y'); left = open(r'{tmp_path}/left', 'w'); left.write('z')"
    assert run(light.python, "-c", code, pass_fds=[write]).returncode == 0
    assert os.read(read, 10) == b"x" and (tmp_path / "left").read_text() == "z"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(("words", "changed"), [
    (["-c", f"import sys; sys.exit(int({FORKED}))"], {"HF_HUB_OFFLINE": "0"}), (["-c", f"import sys; sys.exit(int({FORKED}))"], {"OMP_NUM_THREADS": "3"}),
    (["-S", "-c", f"import sys; sys.exit(int({FORKED}))"], {}), (["{folder}/other.py"], {}),
])
def test_what_a_fork_could_do_differently_is_run_by_the_real_interpreter(light, tmp_path, words, changed):
    (tmp_path / "other.py").write_text(f"import sys; sys.exit(int({FORKED}))")
    assert run(light.python, *(word.format(folder=tmp_path) for word in words), env={**os.environ, **changed}).returncode == 0


@pytest.mark.parametrize("changed", [
    {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},  # of every script
    {"KMP_DUPLICATE_LIB_OK": "True", "KMP_INIT_AT_FORK": "FALSE"},  # of every process that has imported scikit-learn
    {"PYTHONUNBUFFERED": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "WORK": "run"},
])
def test_variables_that_are_read_later_are_those_of_the_fork(light, changed):
    code = f"import os, sys; print({FORKED}, all(os.environ[name] == value for name, value in {changed}.items()))"
    assert run(light.python, "-c", code, env={**os.environ, **changed}).stdout == "True True\n"


SLEEPER = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_the_caller_ends_the_fork_too(light, sent, status):
    with subprocess.Popen([light.python, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as caller:
        pid = int(caller.stdout.readline())
        assert pid != caller.pid
        caller.send_signal(sent)
        assert caller.wait(10) == status and ends(pid)


def test_the_server_and_its_forks_end_with_the_process_that_started_them():
    code = (f"import subprocess, sys; sys.path.insert(0, r'{HERE.parents[1]}'); from warm import Warm; light = Warm('nothing', 'nothing')\n"
            f"print(light.folder, *[server.pid for server in light._servers], flush=True); subprocess.run([light.python, '-c', {SLEEPER!r}])")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as tests:
        folder, *servers = tests.stdout.readline().split()
        fork = int(tests.stdout.readline())
        tests.kill()
    assert ends(fork) and all(ends(int(server)) for server in servers)
    import shutil

    shutil.rmtree(folder)


if __name__ == "__main__":
    print(json.dumps({**facts(), "forked": sys.orig_argv[-1] == "serve"}))

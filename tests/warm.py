"""A fork server: processes of the tests that start with their heavy modules imported.

`import torch, transformers, vllm` takes longer than most stages of the tests. A server imports them once; `python` and
`llamafactory-cli` of Warm.folder ask it to fork, and the fork runs the script as a new interpreter would: with the caller's
arguments, folder, environment, open files and signals. The real interpreter runs instead whenever the fork could differ: another
program than this repository's, another value of a variable that modules read when they are imported, or a machine with a GPU.
"""

import contextlib
import marshal
import os
import select
import signal
import socket
import struct
import sys

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Environment -> the modules that its server imports.
MODULES = {
    "pipeline": (
        "from dynamicrag.llm.vllm_environment import prepare_vllm; prepare_vllm();"
        "import faiss, sentence_transformers, bert_score, datasets, matplotlib.pyplot, ir_measures, nltk, rouge_score;"
        "from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertModel;"
        "from transformers import LlamaForCausalLM, T5ForConditionalGeneration;"
        "from vllm import LLM, SamplingParams; from vllm.sampling_params import StructuredOutputsParams;"
        "import vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama"
    ),
    "trainer": "import llamafactory.launcher, llamafactory.train.tuner; from transformers import LlamaForCausalLM, PreTrainedTokenizerFast",
    "nothing": "",
}
# Modules read such variables when they are imported, so that they must be those of the server.
READ_AT_IMPORT = (
    "ACCELERATE_", "CUDA_", "HF_", "HOME", "KMP_", "LANG", "LC_", "LD_", "MKL_", "MPL", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_",
    "TOKENIZERS_", "TORCH_", "TQDM_", "TRANSFORMERS_", "TZ", "USE_", "VLLM_", "XDG_",
)
# Except these: a machine without a GPU hides, orders and checks none, vLLM reads the space when its engine starts, a fork never buffers its
# output, and scikit-learn sets the two of KMP when it is imported, which the tests may do before or after they start a server.
READ_LATER = {
    "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK", "VLLM_CPU_KVCACHE_SPACE", "PYTHONUNBUFFERED", "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
HIGH = 512  # the server's own files have numbers from here on, because a fork gets the numbers of its caller
SPAWNED = "from multiprocessing.spawn import spawn_main"


# ---------------------------------------------------------------- the caller


def can_be_forked(argv: list[str]) -> bool:
    """Whether the arguments of `python` run code of a test, a program of this repository or the trainer."""
    inside = REPO + os.sep
    match argv:
        case ["-c", code, *_]:
            return code.startswith(SPAWNED) or not code.startswith("from multiprocessing.")
        case ["-m", module, *_]:
            return module.split(".")[0] in ("dynamicrag", "llamafactory")
        case [script, *_]:
            return not script.startswith("-") and (os.path.realpath(script).startswith(inside) or os.path.abspath(script).startswith(inside))
    return False


def call(address: str, real: str, argv: list[str]) -> None:
    """Be `python ARGV`, by a fork of the server at `address` if possible."""
    connection = socket.socket(socket.AF_UNIX)
    words = argv[1:] if argv[:1] == ["-B"] else argv  # a spawned process gets this if PYTHONDONTWRITEBYTECODE is set, as it is for the server
    with contextlib.suppress(OSError):
        if can_be_forked(words):
            files = [int(name) for name in os.listdir("/proc/self/fd") if int(name) != connection.fileno()]
            files = [number for number in files if os.path.exists(f"/proc/self/fd/{number}") and number < HIGH]
            ignored = [int(number) for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
            umask = os.umask(0)
            os.umask(umask)
            request = marshal.dumps((words, os.getcwd(), dict(os.environ), files, ignored, umask))
            connection.connect(address)
            socket.send_fds(connection, [struct.pack("I", len(request))], files)
            connection.sendall(request)
            if answer := connection.recv(4):
                wait(connection, struct.unpack("i", answer)[0], ignored)
    connection.close()
    os.execv(real, [real, *argv])


def wait(connection: socket.socket, child: int, ignored: list[int]) -> None:
    """Pass signals to the fork, and end as it ends. Returns if the server does not fork this."""
    if child == 0:
        return
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda number, _: os.kill(child, number))
    answer = connection.recv(4)
    status = struct.unpack("i", answer)[0] if answer else 1
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# ---------------------------------------------------------------- the server


def end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT) and name not in READ_LATER}


def serve(listening: int, modules: str, launcher: str) -> None:
    """Import the modules when the first caller comes, then fork for each until the process that started this one has ended."""
    import fcntl
    import gc

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the callers pass it on
    listener = socket.socket(fileno=fcntl.fcntl(listening, fcntl.F_DUPFD_CLOEXEC, HIGH))
    os.close(listening)
    started_with = dict(os.environ)
    paths = sys.path[1:]
    select.select([listener], [], [])
    exec(MODULES[modules], {})
    changed = {name: value for name, value in os.environ.items() if started_with.get(name) != value}
    inherited = {name: value for name, value in changed.items() if not name.startswith("VLLM_")}  # the stages set vLLM's themselves
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the pages of all modules
    callers: dict[int, tuple[int, socket.socket]] = {}  # file descriptor of a fork -> its process, its caller
    while True:
        # A caller that is readable has ended: it sends nothing more.
        ready, _, _ = select.select([listener, *callers, *(caller for _, caller in callers.values())], [], [])
        for ended in [number for number in callers if number in ready]:
            child, caller = callers.pop(ended)
            os.close(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with caller, contextlib.suppress(OSError):
                caller.sendall(struct.pack("i", status))
        for child, caller in callers.values():
            if caller in ready:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
        if listener in ready:
            caller = listener.accept()[0]
            argv, folder, environment, numbers, ignored, umask, files = receive(caller)
            # A process that a fork starts, and one of the tests' own, may have the variables that the modules have set.
            given, expected = read_at_import(environment), read_at_import(started_with)
            differing = [name for name in given.keys() | expected.keys() if given.get(name) not in (expected.get(name), changed.get(name, expected.get(name)))]
            if modules == "trainer":
                differing = [name for name in differing if not name.startswith("VLLM_")]
            if not argv or differing:
                print("not forked:", argv, *differing, flush=True, file=sys.stderr)
                for number in files:
                    os.close(number)
                with caller, contextlib.suppress(OSError):
                    caller.sendall(struct.pack("i", 0))
                continue
            if (child := os.fork()) == 0:
                for number in (listener.fileno(), caller.fileno(), *callers, *(one.fileno() for _, one in callers.values())):
                    os.close(number)
                become(folder, {**inherited, **environment}, numbers, files, ignored, umask)
                sys.path[:] = paths
                run(argv, launcher)
            for number in files:
                os.close(number)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(child, child)
            moved = fcntl.fcntl(pidfd := os.pidfd_open(child), fcntl.F_DUPFD_CLOEXEC, HIGH)
            os.close(pidfd)
            callers[moved] = child, caller
            with contextlib.suppress(OSError):
                caller.sendall(struct.pack("i", child))


def receive(caller: socket.socket) -> tuple:
    """The request of a caller and its files; no arguments if it has ended before."""
    header, files, _, _ = socket.recv_fds(caller, 4, 250)
    request = b""
    size = struct.unpack("I", header)[0] if len(header) == 4 else 0
    while len(request) < size and (more := caller.recv(size - len(request))):
        request += more
    return (*(marshal.loads(request) if size and len(request) == size else ([], "", {}, [], [], 0)), files)


# ---------------------------------------------------------------- the fork


def become(folder: str, environment: dict[str, str], numbers: list[int], files: list[int], ignored: list[int], umask: int) -> None:
    """Take the place of the caller: its group of processes apart, its files, folder, environment and ignored signals."""
    import fcntl
    import multiprocessing.process
    import random
    import tempfile

    end_with_parent()
    os.setpgid(0, 0)
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, HIGH) for number in files]
    for number in files:
        os.close(number)
    for number, copy in zip(numbers, moved, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.umask(umask)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]
    tempfile.tempdir = None
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def run(argv: list[str], launcher: str) -> None:
    """Run `python ARGV` in this process, and end it."""
    import atexit
    import multiprocessing.spawn
    import runpy
    import threading
    import types

    multiprocessing.spawn.set_executable(launcher)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status = 0
    try:
        if argv[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *argv[2:]], [""]
            exec(compile(argv[1], "<string>", "exec", dont_inherit=True), main.__dict__)
        elif argv[0] == "-m":
            sys.argv, sys.path[:0] = ["-m", *argv[2:]], [os.getcwd()]
            runpy._run_module_as_main(argv[1])  # type: ignore[attr-defined]
        else:
            sys.argv, sys.path[:0] = argv, [os.path.dirname(os.path.realpath(argv[0]))]
            main.__file__ = os.path.abspath(argv[0])
            with open(argv[0], "rb") as file:
                program = file.read()
            exec(compile(program, main.__file__, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as leaving:
        if isinstance(leaving.code, int) or leaving.code is None:
            status = leaving.code or 0
        else:
            print(leaving.code, file=sys.stderr)
            status = 1
    except BaseException as error:
        outside = error.__traceback__ and error.__traceback__.tb_next  # without this function
        sys.excepthook(type(error), error.with_traceback(outside), outside)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    main.__dict__.clear()  # closes, and thereby writes, what the script has left open
    try:
        sys.stdout.flush()
    except OSError:
        status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


# ---------------------------------------------------------------- the tests


class Warm:
    """The servers of a process of tests, which end with it. WARM=0 in the environment runs the real interpreters; in the file
    WARM_LOG the servers say which processes they did not fork, and the variables that differed.

    `folder`, for PATH, has `python` and `llamafactory-cli`, which ask the servers; `environment` is for scripts; `python` and
    `trainer_python` are the interpreters of the two environments.
    """

    def __init__(self, pipeline: str = "pipeline", trainer: str = "trainer"):
        import tempfile
        from pathlib import Path

        self._servers = []
        self._temporary = tempfile.TemporaryDirectory(prefix="warm")  # pytest's folders have names that are too long for a socket
        self.folder = Path(self._temporary.name)
        self.python = self._launcher("python", ".venv", pipeline)
        self.trainer_python = self._launcher("llamafactory-cli", ".venv-train", trainer, script="llamafactory-cli")
        # scripts/common.sh puts .venv/bin before all other folders of PATH; a function comes before it.
        self.environment = {"BASH_FUNC_python%%": f'() {{ {self.python} "$@"; }}', "LLAMAFACTORY": str(self.folder / "llamafactory-cli")}

    def _launcher(self, name: str, environment: str, modules: str, script: str = ""):
        import shlex
        import subprocess
        from pathlib import Path

        home = Path(REPO, environment, "bin")
        python, address = str(home / "python"), str(self.folder / f"{environment}.socket")
        plain = self.folder / f"{environment}.python"
        real = sys.platform != "linux" or os.path.exists("/dev/nvidiactl") or os.environ.get("WARM") == "0"
        command = [python] if real else [python, "-IS", __file__, address, python]
        for path, words in ((plain, command), (self.folder / name, [*command, *([str(home / script)] if script else [])])):
            path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            path.chmod(0o755)
        if not real and home.exists():
            with socket.socket(socket.AF_UNIX) as listener, open(os.environ.get("WARM_LOG", os.devnull), "a") as log:
                listener.bind(address)
                listener.listen(64)
                more = {"DISABLE_VERSION_CHECK": "1"} if script else {}
                self._servers.append(subprocess.Popen(
                    [python, "-u", __file__, str(listener.fileno()), modules, str(plain), "serve"], env={**os.environ, **more}, stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=log, pass_fds=[listener.fileno()],
                ))
        return plain

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.kill()
            server.wait()
        self._temporary.cleanup()


if __name__ == "__main__":
    if sys.argv[-1] == "serve" and sys.argv[1].isdigit():
        serve(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    else:
        call(sys.argv[1], sys.argv[2], sys.argv[3:])

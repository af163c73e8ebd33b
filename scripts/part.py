"""Run one part on a node of a cluster, or tell what the node has. scripts/launch.py starts this on the nodes.

python scripts/part.py run LOG COMMAND           append to LOG; the part ends when the stdin of this process is closed
python scripts/part.py run LOG COMMAND --first   begin LOG again
python scripts/part.py facts SHARED_FILE         print as JSON what must be the same on every node
"""

import ctypes
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

GRACE = 10  # seconds in which an interrupted stage may finish its rows
INTERRUPTED = 143
CODE = ("*.py", "dynamicrag/**/*.py", "template/*", "scripts/*.py")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends, or to make it the parent of its orphaned descendants."""
    ctypes.CDLL(None).prctl(option, value)


def facts(marker: str) -> dict[str, str]:
    """What must be the same on every node: the shared folder, the project and the packages."""
    from dynamicrag.rows.manifest import versions

    code = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in Path().glob(pattern)):
        code.update(f"{path}\0".encode() + path.read_bytes())
    content = Path(marker).read_text() if os.path.exists(marker) else "does not exist"
    return {f"the shared folder {os.path.dirname(marker)}": content, f"the project {os.getcwd()}": code.hexdigest()[:12], **versions()}


def run(log: str, command: str, first: bool) -> int:
    """Run a command in a process group of its own, and end the whole group as soon as stdin is closed: the process that started
    this one has ended, in whatever way. The group holds a lock on its log, so that two runs of a part never overlap, on whatever
    nodes they are. Returns the exit status.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    with open(log, "a+b", buffering=0) as file:
        while not locked(file):
            if select.select([sys.stdin], [], [], 1)[0]:
                return INTERRUPTED
        if first:
            file.truncate(0)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        file.write(f"on {socket.gethostname()}, {f'GPUs {gpus}' if gpus else 'CPU'}: {command}\n".encode())
        leader = subprocess.Popen(["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                                  preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    ended = os.pidfd_open(leader.pid)
    interrupted = ended not in select.select([sys.stdin, ended], [], [])[0]
    end_group(leader)
    end_strays()
    return INTERRUPTED if interrupted else leader.returncode


def locked(file: BinaryIO) -> bool:
    """Return whether this process has the lock on a file now, or its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def end_group(leader: subprocess.Popen) -> None:
    """Stop all processes of a group, and wait until they have ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            while leader.poll() is not None and reap():
                pass
            try:
                os.killpg(leader.pid, number)
            except ProcessLookupError:
                return
            number = 0  # only asks whether the group exists
            time.sleep(0.05)


def end_strays() -> None:
    """Kill the descendants that had left the group. They are children of this process now."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while strays := children.read_text().split():
        for stray in strays:
            os.kill(int(stray), signal.SIGKILL)
        while reap():
            pass
        time.sleep(0.05)


def reap() -> bool:
    """Take the exit status of an ended descendant. Returns whether there was one."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", log, command, *first]:
            sys.exit(run(log, command, bool(first)))
        case ["facts", marker]:
            print(json.dumps(facts(marker)))
        case _:
            sys.exit(__doc__)

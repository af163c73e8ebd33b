"""A Ray cluster of several nodes on this machine, with pretended GPUs, for the tests.

As a program it runs the cluster and obeys the lines on stdin: `kill N` (a node), `head`. It prints the address, then each obeyed line.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TAG = "DYNAMICRAG_TEST"  # a variable of all processes of a run: the environment travels to the nodes


class RayCluster:
    """A cluster in a process of its own. `environment` is for scripts that use it. `within` is a command that runs the cluster."""

    def __init__(self, nodes: int, gpus: int = 1, within: tuple[str, ...] = ()):
        self.process = subprocess.Popen([*within, sys.executable, __file__, str(nodes), str(gpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
                                        env={**os.environ, "RAY_raylet_start_wait_time_s": "180"})
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the cluster has not started"
        self.environment = {"LAUNCHER": "ray", "RAY_ADDRESS": self.address}

    def do(self, order: str) -> None:
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == order

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def tagged(tag: str) -> dict[int, str]:
    """The command lines of all processes whose environment has the tag, by process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def wait_for(happens, seconds: float = 120):
    """The value of happens() as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := happens():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing in {seconds} s")


def locked_files(folder: Path) -> list[Path]:
    """The files in a folder that a process holds locked."""
    held = []
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".partial", ".lock", ".log"):
            with path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(path)
    return held


def main(count: int, gpus: int) -> None:
    from ray.cluster_utils import Cluster

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a cluster that was started in the background
    cluster = Cluster(initialize_head=True, connect=False, shutdown_at_exit=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(wait=False, num_cpus=1, num_gpus=gpus, include_dashboard=False, env_vars={"HOSTNAME": f"node{n}"}) for n in range(count)]
    cluster.wait_for_nodes(180)  # on a busy machine
    print(cluster.address, flush=True)
    for line in sys.stdin:
        match line.split():
            case ["kill", number]:
                nodes[int(number)].kill_all_processes(check_alive=False, allow_graceful=False)
            case ["head"]:
                cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        print(line.strip(), flush=True)
    for node in [*nodes, cluster.head_node]:
        with contextlib.suppress(Exception):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

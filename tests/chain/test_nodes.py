"""Training on several machines: two of one process each, on a CPU, which are killed, late, alone, silent or different.

As in test_processes.py, two processes compute the same numbers as one that accumulates twice as much, to the last bit.

    FULL=1 pytest tests/chain/test_nodes.py -s       every way in which a machine can be lost
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import make_text, make_tiny_llama, names
from stages import REPO
from training import SETTINGS, largest_difference, losses_of, weights_of

STEPS = 12
RECORDS = {"trained_on.sha256", "settings.txt", "processes.txt"}
WORDS = [*SETTINGS, "dataset=reranker_bc", "use_cpu=true", "deepspeed=null", "save_steps=2", "save_total_limit=2"]


@dataclass
class Run:
    """One training: its folder of results, and its machines by number."""

    work: Path
    environment: dict[str, str]
    port: int = 0
    scripts: dict[int, subprocess.Popen] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return self.work / "DynamicRAG_llama3_8b/sft"

    def said(self, node: int = 0) -> str:
        return (self.work / f"{node}.log").read_text(errors="replace")

    def start(self, node: int = 0, *words: str, nodes: int = 2, **variables: str) -> None:
        """Start a machine."""
        if nodes > 1:
            if not self.port:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    self.port = free.getsockname()[1]
            variables = {"NNODES": str(nodes), "NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), **variables}
        words = (*WORDS, f"model_name_or_path={self.work}/../tiny-llama", f"gradient_accumulation_steps={2 // nodes}", *words)
        command = f"source scripts/common.sh; train sft sft {self.work}/training_data/reranker_bc_training.json -- {' '.join(words)}"
        with (self.work / f"{node}.log").open("a") as log:
            self.scripts[node] = subprocess.Popen(
                ["bash", "-c", command], cwd=REPO, env={**self.environment, "WORK": str(self.work), "NODE": f"{self.work.name}.{node}", **variables}, stderr=log,
                stdout=log, start_new_session=True,
            )

    def wait(self, *nodes: int) -> list[int]:
        """The exit statuses of these machines, when they have ended."""
        return [self.scripts[node].wait(timeout=120) for node in nodes]

    def processes(self, node: int = 0) -> list[int]:
        """The processes of a machine, which have its NODE in their environment."""
        mine, found = f"NODE={self.work.name}.{node}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mine in (path / "environ").read_bytes().split(b"\0") and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(path.name))
            except OSError:
                pass
        return found

    def crash(self, node: int) -> None:
        """Kill all processes of a machine."""
        for process in self.processes(node):
            os.kill(process, signal.SIGKILL)
        self.scripts[node].wait(timeout=20)

    def checkpoint(self, step: int, beside: int = 0) -> None:
        """Wait for a checkpoint."""
        until = time.monotonic() + 120
        while not (self.output / f"checkpoint-{step}/trainer_state.json").exists():
            assert time.monotonic() < until and self.scripts[beside].poll() is None, self.said(beside)[-3000:]
            time.sleep(0.01)

    def assert_trained_as(self, other: "Run") -> None:
        """Losses and weights are those of `other`, the records are there once, and no process, lock or checkpoint is left."""
        assert losses_of(self.output) == losses_of(other.output) and len(losses_of(self.output)) == STEPS
        assert largest_difference(weights_of(self.output), weights_of(other.output)) == 0
        assert {path.name for path in self.output.iterdir()} >= RECORDS and not list(self.output.glob("checkpoint-*")) and not list(self.output.glob("training_on*"))
        for node in self.scripts:
            assert self.gone(node)
            assert subprocess.run(["flock", "--nonblock", f"{self.output}.{node}.lock", "true"]).returncode == 0

    def gone(self, node: int) -> bool:
        """Whether no process of a machine is left, after some seconds at most."""
        until = time.monotonic() + 15
        while (left := self.processes(node)) and time.monotonic() < until:
            time.sleep(0.1)
        return not left


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """trainings(NAME) is a new Run on the same rows."""
    folder = tmp_path_factory.mktemp("nodes")
    make_tiny_llama(folder / "tiny-llama")
    rng = random.Random(5)
    rows = [
        {"instruction": make_text(rng), "input": "", "system": "You choose.", "output": ["[1]", "None", "[2], [5]", "[3], [1], [4]"][n % 4]} for n in range(2 * STEPS)
    ]
    (folder / "training_data").mkdir()
    (folder / "training_data/reranker_bc_training.json").write_text(json.dumps(rows))
    made = []
    kept = {name: value for name, value in os.environ.items() if name not in ("NUM_SHARDS", "SHARDS")}

    def make(name: str) -> Run:
        shutil.copytree(folder / "training_data", folder / name / "training_data")
        made.append(Run(folder / name, {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "CONFIG": "configs/llama3_8b.env", "NODE_SECONDS": "60"}))
        return made[-1]

    yield make
    for run in made:
        for node in run.scripts:
            run.crash(node)


@pytest.fixture(scope="module")
def undisturbed(trainings, warm) -> Run:
    """One process that accumulates two batches per step."""
    run = trainings("undisturbed")
    run.start(nodes=1, **warm.environment)
    assert run.wait(0) == [0], run.said()[-3000:]
    return run


@pytest.mark.slow
def test_a_killed_machine_comes_back_and_the_model_is_that_of_one_process(trainings, undisturbed):
    """Machine 1 is killed after its first checkpoint and started again; machine 0 starts its part again by itself."""
    run = trainings("killed")
    run.start(1)
    run.start(0, MAX_RESTARTS="1")
    run.checkpoint(2)
    os.kill(run.scripts[1].pid, signal.SIGKILL)  # the other processes of the machine end with its script
    assert run.gone(1)
    run.start(1)
    assert run.wait(0, 1) == [0, 0], run.said(0)[-3000:] + run.said(1)[-3000:]
    run.assert_trained_as(undisturbed)


@pytest.mark.full
def test_every_way_to_lose_a_machine_ends_the_other_and_costs_no_more_than_the_steps_since_the_checkpoint(trainings, undisturbed):
    """The machines are lost after the checkpoints of steps 2, 4, 6, 8 and 10. Each time both are started again by hand, machine 1 first."""

    def torchrun_of(node: int) -> int:
        return next(process for process in run.processes(node) if b"torchrun" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[1])

    def trainer_of(node: int) -> int:
        return next(process for process in run.processes(node) if "train_process.py" in Path(f"/proc/{process}/cmdline").read_text() and process != torchrun_of(node))

    def silence(node: int) -> None:
        """As if the machine had lost its network: no connection is closed."""
        for process in run.processes(node):
            os.kill(process, signal.SIGSTOP)

    run = trainings("lost")
    for step, lose, lost in (
        (2, lambda: run.crash(0), 0),
        (4, lambda: os.kill(torchrun_of(1), signal.SIGKILL), 1),
        (6, lambda: os.kill(trainer_of(0), signal.SIGKILL), 0),
        (8, lambda: silence(1), 1),
        (10, lambda: run.scripts[0].send_signal(signal.SIGTERM), 0),
    ):
        for node in (1, 0):
            run.start(node, NODE_SECONDS="15")
        run.checkpoint(step)
        lose()
        assert run.wait(1 - lost)[0] not in (0, -signal.SIGKILL) and names(run.said(1 - lost).splitlines()[-1], run.output), run.said(1 - lost)[-2000:]
        run.crash(lost)
        assert run.gone(0) and run.gone(1)
        assert not (run.output / "trained_on.sha256").exists()
    for node in (1, 0):
        run.start(node)
    assert run.wait(0, 1) == [0, 0], run.said(0)[-3000:] + run.said(1)[-3000:]
    run.assert_trained_as(undisturbed)
    before = {path: path.stat().st_mtime_ns for path in run.output.iterdir()}
    for node in (0, 1):
        run.start(node)
    assert run.wait(0, 1) == [0, 0] and {path: path.stat().st_mtime_ns for path in run.output.iterdir()} == before


# ---------------------------------------------------------------- how the machines meet


@pytest.fixture
def meeting(tmp_path):
    """meeting(NODE, WORD...) starts a machine that comes to the meeting; meeting.port is its port."""
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "model"
    for step, whole in ((5, True), (20, True), (100, False)):
        (output / f"checkpoint-{step}").mkdir(parents=True)
        if whole:
            (output / f"checkpoint-{step}/trainer_state.json").write_text("{}\n")
    (output / "checkpoint-100").rename(output / "checkpoint-old")

    def come(node: int, *words: str, nodes: int = 3, seconds: int = 30) -> subprocess.Popen:
        flags = {"node": node, "nodes": nodes, "address": "127.0.0.1", "port": port, "seconds": seconds, "folder": output}
        command = [sys.executable, "scripts/meet.py", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), "sft.yaml", *words]
        started.append(subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    come.port, come.last = port, f"{output}/checkpoint-20"
    yield come
    for process in started:
        process.kill()
        process.communicate()


def test_machines_meet_in_any_order_and_continue_from_one_checkpoint(meeting):
    """A machine that has gone is not there, one that has come back is there once, and what is no machine is not counted."""
    gone, first = meeting(1), meeting(0)
    time.sleep(2)
    gone.kill()
    with socket.create_connection(("127.0.0.1", meeting.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(10) == b""
    last = meeting(2)
    time.sleep(2)
    assert first.poll() is None and last.poll() is None
    back = meeting(1)
    assert [process.communicate(timeout=20)[0].strip() for process in (first, back, last)] == [meeting.last] * 3
    assert [process.returncode for process in (first, back, last)] == [0, 0, 0]


def test_a_machine_waits_while_another_training_ends_at_the_port(meeting):
    with socket.create_server(("127.0.0.1", meeting.port)) as torchrun:
        other, first = meeting(1, nodes=2), meeting(0, nodes=2)
        torchrun.accept()[0].close()
        time.sleep(0.5)
        assert first.poll() is None and other.poll() is None
    assert [process.communicate(timeout=20)[0].strip() for process in (first, other)] == [meeting.last] * 2


@pytest.mark.parametrize(("nodes", "named"), [((0, 2), ("NODE_RANK=1", "NODE_SECONDS")), ((1,), ("127.0.0.1", "NODE_SECONDS"))])
def test_a_machine_that_does_not_come_is_named_after_the_time(meeting, nodes, named):
    came = [meeting(node, seconds=2) for node in nodes]
    said = came[0].communicate(timeout=20)[1]
    assert came[0].returncode == 2 and len(said.splitlines()) == 1 and names(said, *named)


def test_a_machine_that_would_train_otherwise_is_named_on_all(meeting):
    came = [meeting(0, "lr=1", "processes=3"), meeting(1, "lr=1", "processes=3"), meeting(2, "lr=2", "processes=3")]
    for process in came:
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 2 and len(said.splitlines()) == 1 and names(said, "NODE_RANK=2", "lr=2", "lr=1") and "processes" not in said

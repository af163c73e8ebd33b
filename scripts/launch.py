"""Run the parts of a file on the nodes of a Ray cluster (scripts/workers.sh calls this for LAUNCHER=ray).

A part is a command line of this project. It runs with GPUs of its own on any node, and writes the log LOGSPART.log. If its node or
its process dies, it runs again, on another node if there is one; a stage continues with its finished rows. If a part fails, the
others still finish. RAY_ADDRESS is a cluster to which this machine belongs; without it, a Ray of this machine is started.

    python scripts/launch.py --logs runs/out.jsonl.parts/ --gpus 1 <parts      on each line of stdin: PART, a tab, its command line
    python scripts/launch.py --workers --gpus 1                                print how many parts the cluster runs at a time
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cluster import Node, connect, outcome, reach, usable_nodes
from part import GRACE, PR_SET_PDEATHSIG, facts, prctl
from progress import Progress

from dynamicrag import stage
from dynamicrag.stage import UserError

TRIES = 4  # of a part whose node, process or engine dies
USER_ERROR = 2  # the exit status of a stage that would fail again
CHECK_SECONDS, HEAD_SECONDS = 120, 30  # in which a node answers, and in which a head starts again; Ray itself waits for 60 s
NODE = "ray.io/node-id"  # the label that Ray gives every node
OF_NODE = ("CUDA_VISIBLE_DEVICES", "HOSTNAME", "TMPDIR")  # variables that a node does not take from the driver


def run_here(python: str, folder: str, environment: dict[str, str], arguments: list[str]) -> tuple[int, str, str]:
    """Run scripts/part.py in `folder` of a node, with the environment of the driver. Returns exit status, stdout and node. Ray calls this."""
    import ray

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ray.cancel raises it; a cluster started in the background ignores it
    kept = {name: os.environ[name] for name in OF_NODE if name in os.environ}
    process = subprocess.Popen([python, "scripts/part.py", *arguments], cwd=folder, env={**environment, **kept}, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        while process.poll() is None:  # a cancelled task gets a KeyboardInterrupt between two looks
            time.sleep(0.1)
    finally:
        process.stdin.close()
        process.wait()
    return process.returncode, process.stdout.read(), ray.get_runtime_context().get_node_id()


def check_nodes(run, nodes: list[Node], logs: str) -> None:
    """Compare the shared folder, the project and the packages of every node with those of this machine. Ends with status 2 if one differs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    marker = Path(f"{logs}shared_{socket.gethostname()}_{os.getpid()}")
    marker.write_text(secrets.token_hex(8))
    try:
        here = facts(str(marker))
        on = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
        asked = {run(["facts", str(marker)], num_cpus=0, num_gpus=0, scheduling_strategy=one): node.name for one, node in zip(on, nodes, strict=True)}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_SECONDS)
        wrong = []
        for ref, name in asked.items():
            try:
                status, said, _ = ray.get(ref) if ref in answered else (f"none in {CHECK_SECONDS} s", "", "")
            except ray.exceptions.RayTaskError as error:
                status, said = str(error.cause), ""
            except ray.exceptions.RayError as error:
                stage.log.warning("%s: has just died (%s); it gets no part", name, type(error).__name__)
                continue
            there = json.loads(said) if status == 0 else {}
            differing = [f"{what} is {there.get(what, 'missing')}, here {value}" for what, value in here.items() if there.get(what) != value]
            if status:
                differing = [f"scripts/part.py does not run (exit status: {status})"]
            if differing:
                wrong.append(f"error: {name}: {'; '.join(differing)}; every node needs the same project, packages and shared folder at the same paths")
    finally:
        marker.unlink()
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        sys.exit(2)


def run_parts(ray, commands: dict[str, str], environment: dict[str, str], logs: str, gpus: int) -> list[str]:
    """Run all parts. Returns the parts that failed."""
    nodes = usable_nodes(ray, gpus)
    remote = ray.remote(max_retries=0, scheduling_strategy="SPREAD", **nodes[0].needs)(run_here)

    def run(arguments: list[str], **options):
        return remote.options(**options).remote(sys.executable, os.getcwd(), environment, arguments)

    check_nodes(run, nodes, logs)
    nodes = usable_nodes(ray, gpus, without_gpu="num_gpus" not in nodes[0].needs)
    places = sum(node.places for node in nodes)
    stage.log.info("%d parts, %d at a time on %d nodes; their logs are %s*.log", len(commands), min(places, len(commands)), len(nodes), logs)
    progress, tries, failed = Progress(logs, list(commands)), dict.fromkeys(commands, 0), []
    ended_early: dict[str, set[str]] = {part: set() for part in commands}  # the nodes on which a try of the part did

    def start(part: str):
        tries[part] += 1
        # A broken node ends its parts at once, is free again, and would get them all.
        elsewhere = {node.id for node in nodes} - ended_early[part]
        avoided = {"label_selector": {NODE: f"!in({','.join(ended_early[part])})"}} if ended_early[part] and elsewhere else {}
        return run(["run", f"{logs}{part}.log", commands[part], *(["--first"] if tries[part] == 1 else [])], **avoided)

    running = {start(part): part for part in commands}
    head, answered = ray.get_runtime_context().gcs_address, time.monotonic()
    try:
        while running:
            ended, _ = ray.wait(list(running), num_returns=len(running), timeout=1)
            progress.show(list(running.values()))
            try:
                reach(head)
                answered = time.monotonic()
            except OSError as error:
                if time.monotonic() - answered > HEAD_SECONDS:
                    raise UserError(f"{head}: the head of the cluster has not answered for {HEAD_SECONDS} s ({error}); start it, and run "
                                    "the same command again to continue") from None
            for ref in ended:
                status, reason, node = outcome(ray, ref)
                part = running.pop(ref)
                progress.end(part, status == 0)
                if status not in (0, USER_ERROR) and tries[part] < TRIES:
                    nodes = usable_nodes(ray, gpus, without_gpu="num_gpus" not in nodes[0].needs)
                    ended_early[part] |= {node} - {""}
                    stage.log.warning("part %s ended early (%s); it runs again, try %d of %d", part, reason, tries[part] + 1, TRIES)
                    running[start(part)] = part
                elif status:
                    progress.all.write(f"error: part {part} failed ({reason}); see its log, {logs}{part}.log", file=sys.stderr)
                    failed.append(part)
    except BaseException:
        for ref in running:
            ray.cancel(ref)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=2 * GRACE + 5)
        raise
    progress.all.close()
    return failed


def main() -> None:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--logs", help="beginning of the names of the logs")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a part")
    parser.add_argument("--local_gpus", type=int, default=0, help="GPUs of this machine, if RAY_ADDRESS is not set")
    parser.add_argument("--workers", action="store_true", help="print how many parts the cluster runs at a time")
    args = parser.parse_args()
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # the script that started this has ended
    environment = {name: value for name, value in os.environ.items() if name not in OF_NODE and not name.startswith(("RAY_", "SLURM_"))}
    ray = connect(args.local_gpus)  # which changes the environment
    if args.workers:
        print(sum(node.places for node in usable_nodes(ray, args.gpus)))
        return
    commands = dict(line.rstrip("\n").split("\t", 1) for line in sys.stdin)
    # If a node dies, Ray prints twenty lines of its log to stdout, also at the end of this process.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(1 if run_parts(ray, commands, environment, args.logs, args.gpus) else 0)


if __name__ == "__main__":
    stage.run(main)
